// A launch while it runs: its threads (fibers), warps, blocks and clusters, and who of them may go on.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../include/emulation/hooks.h"
#include "../include/emulation/host.h"
#include "clock.h"
#include "memory.h"

namespace frnn_emulation {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kNamedBarriers = 16;
constexpr uint32_t kMostBlocks = 60000;  // numbers above are for what is not a thread: asynchronous stores
constexpr uint32_t kNoThread = ~0u;

struct Block;
struct Warp;

// A thread. Its fiber outlives it and runs others later.
struct Fiber {
  jmp_buf context;
  bool started = false;
  char* stack = nullptr;

  Block* block;
  Warp* warp;
  uint32_t id;  // as in Clock
  uint32_t thread, lane;
  uint3 index;
  bool finished;
  const char* waits_for;  // null: it may run; else a format that says what with the detail
  uint64_t waits_detail;
  bool polls;  // saw the same again when it last looked at what others write

  uint32_t time;  // its own part of its clock: the rest is in known
  Knowledge known;
  Epoch epoch;          // of a plain access that it makes now
  Knowledge fenced;     // what it knew at its last fence: a relaxed store publishes this
  Scope fenced_scope;   // how far
  Knowledge seen[3];    // what relaxed loads saw published from how far: the next fence takes it in
  uint64_t given, got;  // in a meeting of the warp
  uint32_t source;
  uint64_t last_seen;  // of its last poll, as a hash
  bool cluster_arrived;
  uint32_t cluster_phase;  // in which it arrived

  ucontext_t entry;
};

// Lanes of a warp on their way to the same operation.
struct Meeting {
  WarpOperation operation;
  uint32_t mask, arrived;
};

struct Warp {
  Block* block;
  uint32_t first;  // its first thread in the block
  uint32_t live;   // a bit for each lane that has not finished
  std::vector<Meeting> meetings;
};

struct Barrier {
  std::vector<Fiber*> waiting;
  uint32_t arrived = 0;  // with those that do not wait
  uint32_t count = 0;    // as the first to come said
  uint32_t predicates = 0;
  Knowledge clock, last_joined;
};

struct Block {
  uint32_t number;  // in the grid
  uint3 index;
  uint32_t slot;
  char* shared;
  uint32_t live;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  uint32_t rank;     // in its cluster
  uint32_t cluster;  // number of it in the grid
};

struct Failure {
  cudaError_t error = cudaSuccess;
  std::string text;
  std::vector<std::pair<const char*, const void*>> places;  // "written", program counter
};

struct Launch {
  const void* kernel;
  Arguments arguments;
  dim3 grid, block, cluster;
  uint32_t threads;  // a block
  uint64_t shared_bytes;
  bool cooperative;
  uint32_t number;  // counts the launches, for sets of readers

  std::vector<Block*> blocks;  // that run now
  std::vector<Fiber*> ready, polling;
  // Since anything happened that a thread could wait for.
  uint64_t polls_in_vain, yields_in_vain;
  uint32_t clock;       // see clock_high()
  uint64_t base;        // accesses before this time were made before the launch
  uint64_t batch_base;  // ... before the blocks that run now
  uint32_t last_time;   // the largest in any clock, counted from base
  Fiber* current;
  int64_t accesses_to_yield;
  jmp_buf scheduler;
  Failure failure;
};

// There is at most one launch at a time. Not thread-local, because a fiber may outlive the thread that first ran it.
extern Launch launch_state;
// Whether this thread of the host runs a kernel just now: what the instrumentation asks first. initial-exec: one
// instruction, not a call.
extern thread_local bool in_kernel __attribute__((tls_model("initial-exec")));

// scheduler.cpp
uint64_t random_below(uint64_t limit);
void yield();            // the current thread may be overtaken here
void yield_sometimes();  // at random
void poll();             // the same, of one that waits for others in a loop
void switch_away();      // to another, for whoever has said when it may go on
void wake(Fiber* fiber);
void saw(const void* where, uint64_t what);  // after poll(): what it found
void progress();                             // something happened that another may be polling for
void run_batch(const std::vector<uint32_t>& blocks);

extern uint64_t schedule_hash;

// What a test has broken: asynchronous stores, and strong stores of 8 bytes, never arrive, and waits then take time; matrix
// instructions give wrong results.
extern bool messages_are_lost, products_are_wrong;

// watchdog.cpp
void start_watchdog();
void stop_watchdog();

// report.cpp
[[noreturn]] void fail(cudaError_t error, std::string text, const void* pc = nullptr);
std::string name(const Fiber& fiber);  // "block (1,0,0) thread (3,0,0)"
std::string name(uint32_t thread_id);
std::string render(const Failure& failure);
std::string describe_waiting();
extern std::string last_error;
extern cudaError_t last_error_code;

// async.cpp
bool store_in_flight();
void deliver_one();
void time_passes_at_mbarriers();  // who waits there looks again
void forget_async();

// cluster.cpp
void cluster_thread_finished(const Block& block);
void forget_cluster_barriers();

// matrix.cpp: what a full warp does together, given its 32 lanes
void multiply(Fiber* const* lanes);
void distribute_matrices(Fiber* const* lanes);

// sync.cpp
void thread_finished(Fiber* fiber);

// order.cpp: strong accesses, and what they make known
void publish(Fiber* fiber);               // its time goes on, after what it did became known to others
Knowledge knowledge(const Fiber* fiber);  // with what it did itself
void forget_publications();

// access.cpp
// An access by the runtime on behalf of the current thread: the address is checked as any other, but the thread does
// not give way.
void check_access(const void* address, uint64_t bytes, bool write, bool strong, const void* pc);
void check_bounds(const void* address, uint64_t bytes, bool write, const void* pc);

}  // namespace frnn_emulation
