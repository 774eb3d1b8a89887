// How a thread waits for another block: it looks again and again, but not for ever.
#pragma once

#include "ptx_exchange.cuh"

namespace frnn {

// A wait is given up after so many turns of the upper half of the multiprocessor's clock, of 2^32 cycles each: between 8
// and 11 seconds at 2 GHz. A block that runs answers within microseconds. A clock, not a count of looks: how long a look at
// an mbarrier takes is the hardware's affair.
constexpr unsigned kPatience = 5;
// But some blocks of a grid may at first wait for another stream's kernel to leave their multiprocessors, and that may
// itself wait for another machine: one of NCCL's does, for minutes if need be, while the backward pass goes on beside it.
// About 18 minutes, for the first message of a launch; not in a check, which the host waits for and steps can replace.
constexpr unsigned kPatienceAtFirst = 512;

// What giving up means is up to `gave_up`. Null: the kernel traps, an error at the next synchronisation in place of a hung
// GPU or of wrong numbers. Otherwise (a check: csrc/ops/cuda/trust.h) it becomes 1, here and for all other blocks of the
// launch, which find it there and wait no more: the kernel ends, with whatever numbers it had.
__device__ __forceinline__ bool is_given_up(const unsigned* gave_up) {
  return gave_up && load_relaxed(gave_up) != 0;
}
// To be asked after each look in vain, of a wait that began when clock_high() was `start`.
__device__ __forceinline__ bool gives_up(unsigned start, unsigned* gave_up, bool first = false) {
  if (clock_high() - start < (first && !gave_up ? kPatienceAtFirst : kPatience)) return is_given_up(gave_up);
  if (!gave_up) __trap();
  store_relaxed(gave_up, 1u);
  return true;
}

template <Reach kReach>
__device__ __forceinline__ void mbarrier_wait(uint64_t* mbarrier, unsigned parity,
                                              unsigned* gave_up = nullptr) {
#ifdef FRNN_EMULATION
  const auto is_over = [&] {
    return frnn_emulation::mbarrier_wait(mbarrier, parity, static_cast<frnn_emulation::Wait>(kReach));
  };
#else
  const auto is_over = [&] { return mbarrier_try_wait<kReach>(mbarrier, parity); };
#endif
  if (is_over()) return;
  const unsigned start = clock_high();
  while (!is_over() && !gives_up(start, gave_up)) {
  }
}

}  // namespace frnn
