// fused_rnn._C: what is not a tensor operator. Versions, instruction sets, and the plan of a call for inspection.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cells/cells.h"
#include "cpu/kernels.h"
#include "cuda/device.h"

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

py::dict cpu_plan(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                  int64_t directions, int threads, bool training, int itemsize) {
  if (T < 1 || B < 1 || I < 1 || H < 1 || P < 0 || threads < 1 || directions < 1 || directions > 2)
    throw py::value_error("cpu_plan: expected positive sizes and threads, and 1 or 2 directions");
  if (itemsize != 4 && itemsize != 8)
    throw py::value_error("cpu_plan: itemsize must be 4 or 8 (16-bit types are computed in float)");
  for (const frnn::CellName& known : frnn::kCellNames) {
    if (cell != known.name) continue;
    frnn::Shape shape{};
    shape.T = T, shape.B = B, shape.I = I, shape.H = H, shape.P = P, shape.D = directions;
    const frnn::InstructionSet& set = frnn::instruction_set();
    const auto problem = itemsize == 4 ? set.kernels->problem_float : set.kernels->problem_double;
    const frnn::CpuProblem p = problem(known.kind, shape, threads, training);
    const frnn::CpuPlan plan = frnn::plan_cpu(p);
    py::dict result;
    result["strategy"] = plan.direct ? "direct" : "packed";
    result["input"] = plan.fuse_input ? "multiplied in the scan" : "one product before the scan";
    result["isa"] = set.name;
    result["vector"] = set.kernels->vector_bytes / itemsize;
    result["threads"] = plan.threads();
    result["direction_groups"] = plan.direction_groups;
    result["unit_groups"] = plan.unit_groups;
    result["row_groups"] = plan.row_groups;
    result["units_per_panel"] = p.units_per_panel;
    result["tile_rows"] = p.tile_rows;
    result["why"] = plan.why;
    return result;
  }
  throw py::value_error("unknown cell '" + cell + "': expected rnn_tanh, rnn_relu, gru or lstm");
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
  m.def("cuda_archs", &cuda_archs, "Architectures that csrc/cuda was compiled for; empty without nvcc.");
  m.def("cuda_devices", &cuda_devices,
        "GPUs that this process can use, with what a kernel's plan depends on.");
  m.def("cpu_plan", &cpu_plan, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P") = 0, py::arg("directions") = 1, py::arg("threads") = 1, py::arg("training") = false,
        py::arg("itemsize") = 4,
        "How a layer would be spread over the CPU. `training` asks for the backward scan's plan.");
}
