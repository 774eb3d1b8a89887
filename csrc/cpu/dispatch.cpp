// Which instruction set this machine has, and which one is in use.
#include <atomic>

#include "kernels.h"

namespace frnn {

namespace portable {
extern const CpuKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}
namespace avx512_bf16 {
extern const Bfloat16Kernels kKernels;
}
#endif

namespace {
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif
}  // namespace

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &avx512::kKernels, &avx512_bf16::kKernels,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {"avx512", &avx512::kKernels, nullptr, &has_avx512},
    {"avx2", &avx2::kKernels, nullptr,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &portable::kKernels, nullptr, [] { return true; }},
};
const int kInstructionSetCount = sizeof kInstructionSets / sizeof kInstructionSets[0];

namespace {
const InstructionSet* best() {
  const InstructionSet* set = kInstructionSets;
  while (!set->supported()) ++set;
  return set;
}
std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}
}  // namespace

const InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }
void use_instruction_set(const InstructionSet& set) { current().store(&set, std::memory_order_relaxed); }

}  // namespace frnn
