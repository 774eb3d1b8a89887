// The team on OpenMP: torch's own runtime (the same soname), so that no second pool of threads competes with it.
#include "team.h"

#include <limits.h>
#include <omp.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

namespace frnn {

int available_threads(int wanted) {
  if (omp_in_parallel()) return 1;
  const int most = omp_get_max_threads();
  return wanted < most ? wanted : most;
}

bool run_team(int threads, void (*worker)(void* context, int rank), void* context) {
  if (threads <= 1) {
    worker(context, 0);
    return true;
  }
  bool granted = true;
  // No num_threads clause: libgomp rebuilds its pool whenever that number changes between regions. Members beyond
  // `threads` have nothing to do.
#pragma omp parallel
  {
    if (omp_get_num_threads() < threads) {
      if (omp_get_thread_num() == 0) granted = false;
    } else if (omp_get_thread_num() < threads) {
      worker(context, omp_get_thread_num());
    }
  }
  return granted;
}

#if defined(__linux__)
void sleep_while(const std::atomic<int>& word, int value) {
  static_assert(sizeof word == sizeof(int), "the kernel compares the word as an int");
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_sleepers(const std::atomic<int>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void sleep_while(const std::atomic<int>&, int) { sched_yield(); }
void wake_sleepers(const std::atomic<int>&) {}
#endif

}  // namespace frnn
