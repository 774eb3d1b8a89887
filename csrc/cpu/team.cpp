// The team on OpenMP: torch's own runtime (the same soname), so that no second pool of threads competes with it.
#include "team.h"

#include <omp.h>
#include <sched.h>

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

void yield_thread() { sched_yield(); }

}  // namespace frnn
