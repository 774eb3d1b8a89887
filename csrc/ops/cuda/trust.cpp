// The check of a persistent kernel on its first use, and what is remembered of it.
#include "trust.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <tuple>
#include <type_traits>
#include <typeindex>

#include "../../cuda/stream.h"

namespace frnn {
namespace {

// ---- What is remembered ----------------------------------------------------------------------------------------------

// Device, cell, stored numbers, pass, k_groups, columns, exchange, H: what the code of a kernel and its waits depend on.
using Key = std::tuple<int, CellKind, std::type_index, Pass, int, int, Exchange, int64_t>;
struct Record {
  int64_t residents;            // replicas that run at once; 0: the kernel cannot run here
  std::optional<bool> trusted;  // not known before the check
};
// Never held across a launch or an allocation: two threads that ask at once both check, and find the same.
std::mutex mutex;
std::map<Key, Record> records;

std::optional<Record> recorded(const Key& key) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = records.find(key);
  return found == records.end() ? std::nullopt : std::optional<Record>(found->second);
}

// ---- The problem of a check ------------------------------------------------------------------------------------------

// Forward in two launches, the first long enough for every mbarrier to be used in both of its phases.
constexpr int64_t kSteps = 8, kStepsOfLaunch = 5, kInputs = 8;

// The largest difference that passes, as a part of the largest number or of 1: four roundings of a stored 16-bit number, or
// eight of a factor in TF32, which is rounded where float32 is not, or 256 of a float32 number, whose sums over H alone
// may differ by tens. Both sides round at every step, over eight steps, in
// another order of sums; emulated, they differ by an eighth of this in 16 bits and a fifth in TF32. A word that is lost,
// stale or in the wrong place shows: a unit of every gate depends on it with a weight near 1.
template <class T>
constexpr double kTolerance = std::is_same_v<T, BFloat16> ? 0x1p-5
                              : std::is_same_v<T, Half>   ? 0x1p-8
                              : std::is_same_v<T, Exact>  ? 0x1p-15
                                                          : 0x1p-7;

// Numbers between -scale and scale that are the same every time and in no pattern, without torch's generators.
Tensor noise(at::IntArrayRef sizes, double scale, int64_t seed, at::TensorOptions options) {
  const int64_t count = c10::multiply_integers(sizes);
  const Tensor numbers = at::arange(seed, seed + count, options.dtype(at::kFloat));
  return numbers.mul_(12.9898).sin_().mul_(43758.5453).frac_().mul_(scale).to(options.dtype()).view(sizes);
}

// Every unit of h weighs much in one unit of each gate, and a little in all.
Tensor recurrent_weight(int64_t gates, int64_t H, int64_t seed, at::TensorOptions options) {
  Tensor weight = noise({gates, H, H}, 0.25 / std::sqrt(static_cast<double>(H)), seed, options);
  const Tensor unit = at::eye(H, options);
  for (int64_t g = 0; g < gates; ++g) weight[g].add_(unit.roll((7 * g + seed) % H, 1));
  return weight.view({gates * H, H});
}

std::vector<DirectionWeights> weights_of(const CellTraits& cell, int64_t H, int64_t D,
                                         at::TensorOptions options) {
  const int64_t rows = cell.gates * H;
  std::vector<DirectionWeights> weights;
  for (int64_t d = 0; d < D; ++d)
    weights.push_back({noise({rows, kInputs}, 0.5, 11 + d, options),
                       recurrent_weight(cell.gates, H, 1 + d, options),
                       noise({rows}, 0.2, 13 + d, options),
                       noise({rows}, 0.2, 17 + d, options),
                       {}});
  return weights;
}

ForwardTensors forward_tensors(const Problem& p, const Tensor& input) {
  const Shape& s = p.shape;
  ForwardTensors t;
  t.x = input.view({s.N, s.I});
  t.h0 = noise({s.D, s.B, s.H}, 0.5, 19, input.options());
  if (p.cell.cell_state) t.c0 = noise({s.D, s.B, s.H}, 0.5, 23, input.options());
  t.output = p.allocate({s.N, s.D * s.H}), t.hn = p.allocate_state(s.H);
  t.cn = p.cell.cell_state ? p.allocate_state(s.H) : p.allocate({0});
  t.saved = p.allocate({s.D, s.N, p.cell.saved * s.H});
  return t;
}

BackwardTensors backward_tensors(const Problem& p, const ForwardTensors& f) {
  const Shape& s = p.shape;
  BackwardTensors t{};
  t.x = f.x, t.h0 = f.h0, t.c0 = f.c0, t.output = f.output, t.saved = f.saved;
  t.grad_output = noise(f.output.sizes(), 0.5, 29, f.x.options());
  t.grad_hn = noise(f.hn.sizes(), 0.5, 31, f.x.options());
  t.wants_dh0 = t.wants_previous = true;
  t.dgates = p.allocate({s.D, s.N, p.cell.gate_grads * s.H}).unbind(0);
  if (p.cell.carry)
    t.carry = noise(f.hn.sizes(), p.cell.cell_state ? 0.5 : 0, 37, f.x.options().dtype(p.accumulate));
  return t;
}

struct Pair {
  const char* name;
  Tensor found, expected;
};

// What each tensor is off by, and whether a wait was given up, with one look at the device. Empty: all is well.
std::string difference(const std::vector<Pair>& pairs, const Tensor& gave_up, double tolerance,
                       void* stream) {
  std::vector<const char*> names;
  std::vector<Tensor> errors{gave_up.to(at::kFloat)};
  for (const Pair& pair : pairs) {
    if (!pair.found.defined() || pair.found.numel() == 0) continue;
    const Tensor expected = pair.expected.to(at::kFloat);
    names.push_back(pair.name);
    // A NaN stays one through both maxima.
    errors.push_back(
        pair.found.to(at::kFloat).sub(expected).abs_().max().div_(expected.abs().max().clamp_min(1)));
  }
  std::vector<float> worst(errors.size());
  const Tensor all = at::stack(errors);
  if (const char* error = fetch(worst.data(), all.const_data_ptr(), worst.size() * sizeof(float), stream))
    return error;
  if (worst[0] != 0) return "a block waited in vain for another";
  std::ostringstream text;
  for (size_t k = 0; k < names.size(); ++k)
    if (!(worst[k + 1] <= tolerance))
      text << (text.tellp() > 0 ? ", " : "") << names[k] << " by " << worst[k + 1];
  return text.tellp() > 0 ? "differs in " + text.str() + ", as a part of the largest number" : "";
}

// Empty, or what is wrong. Fewer rows, or one direction, where more would not fit at once.
template <class T>
std::string check(const Problem& of, Pass pass, const CudaPlan& plan, int64_t residents) {
  const Tile& tile = plan.tile;
  const bool all_at_once = tile.exchange == Exchange::grid;
  const int64_t D = all_at_once && residents < 2 ? 1 : 2;
  const int64_t B = 8 * tile.columns + (all_at_once && residents < 2 * D ? 0 : 1), H = of.shape.H;
  const auto options = at::dtype(of.compute).device(of.device);
  const Tensor input = noise({kSteps, B, kInputs}, 1, 41, options);
  const Problem p(of.cell, steps_of(input, {}), weights_of(of.cell, H, D, options), input, false,
                  pass == Pass::forward ? Stage::forward : Stage::backward);
  CudaPlan steps{}, persistent = plan;
  steps.strategy = Strategy::step;
  steps.chunk_steps = kSteps;
  persistent.chunk_steps = kStepsOfLaunch;
  void* stream = current_stream(p.device);
  const Tensor gave_up = at::zeros({}, options.dtype(at::kInt));

  ForwardTensors expected = forward_tensors(p, input);
  step_forward_scan<Stored<T>>(p, steps, true, expected, stream);
  if (pass == Pass::forward) {
    ForwardTensors found = forward_tensors(p, input);
    persistent_forward_scan<T>(p, persistent, true, found, stream, gave_up);
    return difference({{"output", found.output, expected.output},
                       {"h_n", found.hn, expected.hn},
                       {"c_n", found.cn, expected.cn},
                       {"what is saved for the backward pass", found.saved, expected.saved}},
                      gave_up, kTolerance<T>, stream);
  }
  BackwardTensors right = backward_tensors(p, expected), found = backward_tensors(p, expected);
  step_backward_scan<Stored<T>>(p, right, stream);
  persistent_backward_scan<T>(p, persistent, found, stream, gave_up);
  return difference({{"the gradients of the gates", at::stack(found.dgates), at::stack(right.dgates)},
                     {"h_{t-1}", at::stack(found.previous), at::stack(right.previous)},
                     {"the gradient of h_0", found.dh0, right.dh0},
                     {"the gradient of c_0", found.carry, right.carry}},
                    gave_up, kTolerance<T>, stream);
}

std::string name_of(const Problem& p, Pass pass, const CudaPlan& plan) {
  std::ostringstream text;
  for (const CellName& known : kCellNames)
    if (known.kind == p.cell.kind) text << known.name;
  text << (pass == Pass::forward ? " forward" : " backward") << " by strategy "
       << strategy_name(plan.strategy) << " (" << p.compute << ", H " << p.shape.H << ", sums in "
       << plan.tile.k_groups << " parts, " << 8 * plan.tile.columns << " rows a block)";
  return text.str();
}

}  // namespace

template <class T>
bool may_run(const Problem& p, Pass pass, const CudaPlan& plan, bool asked_for) {
  const Tile& tile = plan.tile;
  const Key key{p.device.index(), p.cell.kind,  typeid(T),     pass,
                tile.k_groups,    tile.columns, tile.exchange, p.shape.H};
  std::optional<Record> record = recorded(key);
  if (!record) {
    record = Record{residents<T>(p, pass, plan), {}};
    const std::lock_guard<std::mutex> lock(mutex);
    records.emplace(key, *record);
  }
  // What is planned for a GPU of this size may still not fit it. Replicas that do not wait for each other can take turns.
  const int64_t at_once = tile.exchange == Exchange::grid ? tile_replicas(tile, p.shape.B) * p.shape.D : 1;
  if (record->residents < at_once) return false;
  if (asked_for) return true;
  if (record->trusted) return *record->trusted;
  if (is_capturing(current_stream(p.device))) return false;

  std::string wrong;
  try {
    wrong = check<T>(p, pass, plan, record->residents);
  } catch (const c10::OutOfMemoryError&) {
    return false;  // which says nothing of the kernel
  } catch (const c10::Error& error) {
    wrong = error.what_without_backtrace();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    std::optional<bool>& trusted = records[key].trusted;
    if (trusted) return *trusted;  // by a thread that was faster, and that has told
    trusted = wrong.empty();
  }
  if (!wrong.empty())
    TORCH_WARN(
        "fused_rnn: on its first use the persistent kernel of ", name_of(p, pass, plan),
        " did not pass its check on ", p.device, " (", gpu_name(p.device), "): ", wrong,
        ". Step kernels take its place in this process; results are right, but slower. Please report this.");
  return wrong.empty();
}

void forget_checks() {
  const std::lock_guard<std::mutex> lock(mutex);
  records.clear();
}

template bool may_run<float>(const Problem&, Pass, const CudaPlan&, bool);
template bool may_run<Exact>(const Problem&, Pass, const CudaPlan&, bool);
template bool may_run<Half>(const Problem&, Pass, const CudaPlan&, bool);
template bool may_run<BFloat16>(const Problem&, Pass, const CudaPlan&, bool);

}  // namespace frnn
