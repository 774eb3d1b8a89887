// A thread of a kernel that runs for seconds and neither looks at memory nor meets another will do so for ever: its loop
// waits for something that the compiler read once, before it. A timer finds that, and ends the launch.
#undef _FORTIFY_SOURCE
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

#include "state.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace frnn_emulation {
namespace {

constexpr time_t kSeconds = 1;  // of the thread's own time

// Changes with each access and each switch.
struct Activity {
  int64_t accesses_to_yield;
  uint64_t schedule;
  bool operator==(const Activity& other) const {
    return accesses_to_yield == other.accesses_to_yield && schedule == other.schedule;
  }
};
Activity last_seen;

void look() {
  if (!in_kernel) return;
  const Activity now{launch_state.accesses_to_yield, schedule_hash};
  if (now == last_seen) {
    fail(cudaErrorLaunchTimeout, "deadlock: " + name(*launch_state.current) +
                                     " is in a loop that touches no memory and meets no other thread");
  }
  last_seen = now;
}

// Several libraries of kernels may be loaded, each with a runtime of its own; the signal's one handler serves all.
void dispatch(int, siginfo_t* info, void*) { reinterpret_cast<void (*)()>(info->si_value.sival_ptr)(); }

// Of the thread of the host that launches; timers count that thread's time.
struct Timer {
  timer_t id;
  bool made = false;
  Timer() {
    struct sigaction action = {};
    action.sa_sigaction = dispatch;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;  // it may be left by a jump
    sigaction(SIGRTMIN + 7, &action, nullptr);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGRTMIN + 7;
    event.sigev_value.sival_ptr = reinterpret_cast<void*>(&look);
    event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
    made = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &id) == 0;
  }
  ~Timer() {
    if (made) timer_delete(id);
  }
  void set(time_t seconds) {
    itimerspec when = {};
    when.it_value.tv_sec = when.it_interval.tv_sec = seconds;
    if (made) timer_settime(id, 0, &when, nullptr);
  }
};
thread_local Timer timer;

}  // namespace

void start_watchdog() {
  last_seen = {};
  timer.set(kSeconds);
}
void stop_watchdog() { timer.set(0); }

}  // namespace frnn_emulation
