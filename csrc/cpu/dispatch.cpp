// Which instruction set this machine has, and which one is in use.
#include <atomic>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(__x86_64__) && defined(__linux__)
namespace amx {
extern const Bfloat16Kernels kKernels;
bool tiles_multiply();
}  // namespace amx
namespace amx_float {
extern const SplitKernels kKernels;
}
namespace amx_backward {
extern const SplitBackwardKernels kKernels;
}
namespace amx_backward_bf16 {
extern const Bfloat16BackwardKernels kKernels;
}
namespace amx_matrix {
extern const MatrixKernels kKernels;
}
#endif

namespace {
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(__x86_64__) && defined(__linux__)
// The compilers' own test for AMX came later than their code for it. Tiles are for those processes alone that have
// asked: the system must save them when it switches threads.
bool may_use_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!(d & kBf16) || !(d & kTile)) return false;
  constexpr unsigned kOsSaves = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSaves)) return false;
  unsigned saved, upper;
  asm("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  constexpr unsigned kConfiguration = 1u << 17, kData = 1u << 18;
  if (!(saved & kConfiguration) || !(saved & kData)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
}  // namespace

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__) && defined(__linux__)
    {"amx", &avx512::kKernels, &amx::kKernels, &amx_float::kKernels, &amx_backward::kKernels,
     &amx_backward_bf16::kKernels, &amx_matrix::kKernels,
     [] {
       static const bool usable = has_avx512_bf16() && may_use_amx() && amx::tiles_multiply();
       return usable;
     }},
#endif
#if defined(__x86_64__)
    {"avx512_bf16", &avx512::kKernels, &avx512_bf16::kKernels, nullptr, nullptr, nullptr, nullptr,
     &has_avx512_bf16},
    {"avx512", &avx512::kKernels, nullptr, nullptr, nullptr, nullptr, nullptr, &has_avx512},
    {"avx2", &avx2::kKernels, nullptr, nullptr, nullptr, nullptr, nullptr,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &portable::kKernels, nullptr, nullptr, nullptr, nullptr, nullptr, [] { return true; }},
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
