// fused_rnn._C: what is not a tensor operator. Versions, instruction sets, and the plan of a call for inspection;
// beside them the functions of csrc/ops that Python calls without the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "cells/cells.h"
#include "cpu/kernels.h"
#include "cuda/cost.h"
#include "cuda/device.h"
#include "cuda/plan.h"
#include "python_calls.h"

namespace py = pybind11;

namespace {

std::vector<std::string> supported_sets() {
  std::vector<std::string> names;
  for (int k = 0; k < frnn::kInstructionSetCount; ++k)
    if (frnn::kInstructionSets[k].supported()) names.emplace_back(frnn::kInstructionSets[k].name);
  return names;
}

void set_isa(const std::string& name) {
  for (int k = 0; k < frnn::kInstructionSetCount; ++k) {
    const frnn::InstructionSet& set = frnn::kInstructionSets[k];
    if (name == set.name && set.supported()) return frnn::use_instruction_set(set);
  }
  std::string known;
  for (const std::string& set : supported_sets()) known += (known.empty() ? "" : ", ") + set;
  throw py::value_error("unknown instruction set '" + name + "': this machine can run " + known);
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
#ifdef FRNN_CUDA_ARCHS
  std::string list = FRNN_CUDA_ARCHS;
  for (size_t start = 0; start < list.size();) {
    const size_t end = std::min(list.find(';', start), list.size());
    if (end > start) archs.push_back(list.substr(start, end - start));
    start = end + 1;
  }
#endif
  return archs;
}

py::list cuda_devices() {
  py::list devices;
#ifdef FRNN_WITH_CUDA
  const int count = frnn::cuda_device_count();
  for (int index = 0; index < count; ++index) {
    frnn::CudaDevice device;
    if (const char* error = frnn::cuda_device(index, &device))
      throw std::runtime_error("GPU " + std::to_string(index) + ": " + error);
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = std::to_string(device.major) + "." + std::to_string(device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["shared_memory_per_block"] = device.shared_memory_per_block;
    entry["l2_bytes"] = device.l2_bytes;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
#endif
  return devices;
}

template <class Row, size_t n>
const Row& by_name(const Row (&table)[n], const std::string& name, const char* what) {
  std::string known;
  for (const Row& row : table) {
    if (name == row.name) return row;
    known += std::string(known.empty() ? "" : ", ") + row.name;
  }
  throw py::value_error(std::string("unknown ") + what + " '" + name + "': expected " + known);
}

py::dict cpu_plan(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                  int64_t directions, int threads, bool training, const std::string& dtype) {
  const frnn::CellKind kind = by_name(frnn::kCellNames, cell, "cell").kind;
  if (T < 1 || B < 1 || I < 1 || H < 1 || P < 0 || threads < 1 || directions < 1 || directions > 2)
    throw py::value_error("cpu_plan: expected positive sizes and threads, and 1 or 2 directions");
  by_name(frnn::kCudaDtypeNames, dtype, "dtype");
  frnn::Shape shape{};
  shape.T = T, shape.B = B, shape.I = I, shape.H = H, shape.P = P, shape.D = directions, shape.N = T * B;
  const frnn::InstructionSet& set = frnn::instruction_set();
  const bool narrow = dtype == "bf16" && set.bfloat16, wide = dtype == "fp64";
  const auto pays = [&](const auto* kernels) { return kernels && kernels->pays(kind, shape); };
  // `training` asks for the backward scan.
  const bool pairs = narrow && (!training || pays(set.bfloat16_backward));
  const auto problem = pairs  ? set.bfloat16->problem
                       : wide ? set.kernels->problem_double
                              : set.kernels->problem_float;
  const bool splits = dtype != "bf16" && !wide && (training ? pays(set.split_backward) : pays(set.split));
  const frnn::CpuProblem p = pairs && training    ? set.bfloat16_backward->problem(kind, shape, threads)
                             : splits && training ? set.split_backward->problem(kind, shape, threads)
                             : splits             ? set.split->problem(kind, shape, threads)
                                                  : problem(kind, shape, threads, training);
  const frnn::CpuPlan plan = frnn::plan_cpu(p);
  py::dict result;
  result["strategy"] = plan.direct ? "direct" : "packed";
  result["input"] = "multiplied in blocks of rows, ahead of their steps";
  result["isa"] = set.name;
  result["products"] = pairs                                ? "of bfloat16, summed in float32"
                       : narrow                             ? "of float32 in the scan, of bfloat16 around it"
                       : wide                               ? "of float64"
                       : splits                             ? "of float32, as sums of bfloat16"
                       : dtype == "bf16" || dtype == "fp16" ? "of float32: operands are widened"
                                                            : "of float32";
  result["vector"] = set.kernels->vector_bytes / (wide ? 8 : 4);
  result["threads"] = plan.threads();
  result["direction_groups"] = plan.direction_groups;
  result["unit_groups"] = plan.unit_groups;
  result["row_groups"] = plan.row_groups;
  result["units_per_panel"] = p.units_per_panel;
  result["tile_rows"] = p.tile_rows;
  result["why"] = plan.why;
  return result;
}

// "sm_90", "sm_90a", "90" or "9.0" as a number.
int arch_number(const std::string& text) {
  std::string digits;
  for (const char c : text)
    if (c >= '0' && c <= '9') digits += c;
  if (digits.size() < 2 || digits.size() > 3 || std::stoi(digits) < 75)
    throw py::value_error("unknown architecture '" + text +
                          "': expected something like sm_90, and not below sm_75");
  return std::stoi(digits);
}

// A GPU of that architecture; without one, the first GPU of this machine, or else an H200.
frnn::CudaGpu gpu_to_plan_for(const std::string& arch) {
  if (!arch.empty()) return frnn::typical_gpu(arch_number(arch));
#ifdef FRNN_WITH_CUDA
  frnn::CudaDevice device;
  if (frnn::cuda_device_count() > 0 && !frnn::cuda_device(0, &device)) return frnn::gpu_of(device);
#endif
  return frnn::typical_gpu(90);
}

std::string number(int64_t value, const char* unit) {
  return std::to_string(value) + " " + unit + (value == 1 ? "" : "s");
}

std::string tile_text(const frnn::CudaProblem& p, const frnn::Tile& tile) {
  return number(frnn::tile_replicas(tile, p.B) * p.D, "replica") + " of " +
         number(frnn::tile_blocks(tile, p.H), "block") + ", each with " +
         number(frnn::tile_units(tile.k_groups), "unit") + " of " + number(int64_t{8} * tile.columns, "row") +
         ", sums in " + number(tile.k_groups, "part");
}

// Adds the plan of one pass, `prefix` before each of its names.
void describe(py::dict& result, const std::string& prefix, const frnn::CudaProblem& p) {
  const frnn::CudaPlan plan = frnn::plan_cuda(p);
  const auto put = [&](const char* name, auto value) { result[py::str(prefix + name)] = value; };
  put("strategy", frnn::strategy_name(plan.strategy));
  const bool forward = p.pass == frnn::Pass::forward;
  if (forward)
    put("input", plan.fuse_input ? "multiplied in the step's kernel"
                                 : "one product over " + number(plan.chunk_steps, "step"));
  if (frnn::is_persistent(plan.strategy)) {
    put("launches", forward ? (p.T + plan.chunk_steps - 1) / plan.chunk_steps : 1);
    put("tile", tile_text(p, plan.tile));
    put("shared_bytes",
        frnn::tile_shared_bytes(p.pass, frnn::gates_of(p), frnn::bytes_of(p.dtype), plan.tile, p.H));
  } else {
    put("launches_per_step", plan.strategy == frnn::Strategy::step_fused ? 1 : 2);
  }
  put("modelled_step_ns", std::llround(plan.cost.step));
  put("modelled_total_ns", std::llround(plan.cost.total(p.T)));
  std::string why = plan.why;
  if (plan.obstacle) why += std::string("; not persistent: ") + plan.obstacle;
  put("floor_step_ns", std::llround(frnn::floor_of_step(p)));
  put("why", why);
}

py::dict cuda_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B, int64_t I,
                   int64_t H, int64_t P, int64_t directions, bool training, const std::string& arch,
                   bool packed, int multiprocessors) {
  const frnn::CellKind kind = by_name(frnn::kCellNames, cell, "cell").kind;
  if (T < 1 || B < 1 || I < 1 || H < 1 || P < 0 || directions < 1 || directions > 2 || multiprocessors < 0)
    throw py::value_error("plan: expected positive sizes, and 1 or 2 directions");
  frnn::CudaGpu gpu = gpu_to_plan_for(arch);
  if (multiprocessors > 0) gpu.multiprocessors = multiprocessors;
  frnn::CudaProblem p{kind,
                      by_name(frnn::kCudaDtypeNames, dtype, "dtype").dtype,
                      frnn::Pass::forward,
                      training,
                      packed,
                      T,
                      B,
                      I,
                      H,
                      P,
                      directions,
                      gpu};
  py::dict result;
  result["arch"] =
      "sm_" + std::to_string(gpu.arch) + " with " + number(gpu.multiprocessors, "multiprocessor");
  result["pass"] = training ? "forward, saving for the backward pass" : "forward";
  describe(result, "", p);
  if (training) {
    p.pass = frnn::Pass::backward;
    describe(result, "backward_", p);
  }
  return result;
}

void force_plan(const std::optional<std::string>& name) {
  frnn::force_strategy(name ? &by_name(frnn::kStrategyNames, *name, "strategy").strategy : nullptr);
}

std::optional<std::string> forced_plan() {
  const frnn::Strategy* forced = frnn::forced_strategy();
  return forced ? std::optional<std::string>(frnn::strategy_name(*forced)) : std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build information and kernel plans; the tensor operators are registered with torch by this library.";
  m.def("version", [] { return FRNN_VERSION; }, "Version of fused_rnn that this extension was built from.");
  m.def("torch_version", [] { return FRNN_TORCH_VERSION; }, "Version of torch that it was built against.");
  m.def("isa", [] { return frnn::instruction_set().name; }, "CPU instruction set in use.");
  m.def("isas", &supported_sets, "Instruction sets that this machine can run, best first.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use another instruction set, for the whole process. For tests and benchmarks.");
  if (PyModule_AddFunctions(m.ptr(), frnn::kTensorFunctions) != 0) throw py::error_already_set();
  m.def("cuda_archs", &cuda_archs, "Architectures that csrc/cuda was compiled for; empty without nvcc.");
  m.def("cuda_devices", &cuda_devices,
        "GPUs that this process can use, with what a kernel's plan depends on.");
  m.def("cpu_plan", &cpu_plan, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P") = 0, py::arg("directions") = 1, py::arg("threads") = 1, py::arg("training") = false,
        py::arg("dtype") = "fp32",
        "How a layer would be spread over the CPU. `training` asks for the backward scan's plan.");
  m.def("plan", &cuda_plan, py::kw_only(), py::arg("cell"), py::arg("dtype"), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("P") = 0, py::arg("directions") = 1, py::arg("training") = false,
        py::arg("arch") = "", py::arg("packed") = false, py::arg("multiprocessors") = 0,
        "Which CUDA kernels would run a layer. Needs no GPU. `training` adds the backward pass's.");
  m.def("force_plan", &force_plan, py::arg("strategy"), "See fused_rnn.force_plan.");
  m.def("forced_plan", &forced_plan, "The strategy that force_plan asked for, or None.");
}
