// Threads of one kernel call: a team that runs side by side, the barrier its members meet at, and the state of the
// floating-point unit inside it.
#pragma once

#include <atomic>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace frnn {

// How many threads a call may use now: 1 inside another parallel region, where a nested team would get no threads.
int available_threads(int wanted);

// Runs worker(context, rank) for rank 0..threads-1, all at the same time, and returns when all are done. Returns
// false, having run nothing, if the OpenMP runtime grants fewer threads; workers that meet at a barrier must never
// be run one after another.
bool run_team(int threads, void (*worker)(void* context, int rank), void* context);

// Sleeps until `word` no longer holds `value`, or for no reason at all; wakes those who sleep on `word`.
void sleep_while(const std::atomic<int>& word, int value);
void wake_sleepers(const std::atomic<int>& word);

// A spin barrier: an OpenMP barrier costs several times a step of a small layer. Who has spun in vain goes to sleep,
// for on a busy machine the thread it waits for may itself be waiting for a core, and this gives it one.
class alignas(64) Barrier {
 public:
  void wait(int members) {
    if (members <= 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1);
      // Both sides are sequentially consistent: either this load sees the sleeper or the sleeper sees the new phase.
      if (sleepers_.load() > 0) wake_sleepers(phase_);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
#if defined(__SSE__)
        _mm_pause();
#endif
        continue;
      }
      sleepers_.fetch_add(1);
      while (phase_.load() == phase) sleep_while(phase_, phase);
      sleepers_.fetch_sub(1);
    }
  }

 private:
  static constexpr int kSpins = 1024;  // some 20 us: longer than any wait for a thread that is running
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
  std::atomic<int> sleepers_{0};
};

// Denormal numbers cost a hundred cycles each and appear in any decaying state: flush them to zero while a kernel
// runs on this thread, then give the caller its own setting back.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace frnn
