// Fibers: a thread of a kernel runs until it waits, or gives way; the next is drawn at random from those that may run.
#undef _FORTIFY_SOURCE  // its longjmp refuses to leave a stack for another
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "exported.h"
#include "state.h"

// Constants to the kernels, see device.h.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace frnn_emulation {
namespace {

uint64_t random_state = 1;
double yield_probability = 0.02;
uint32_t turns_in_vain = 1000, longest_wait = 0;  // of clock_high()
// Of seeing the same again; seeing something new counts as 1, for a thread may look at much before it goes on.
constexpr uint64_t kPollWeight = 16;
// Not a power of two, or all stacks would lie in the same few sets of the cache.
constexpr size_t kStackStride = kStackBytes + 69 * 64;
constexpr char kStackMark = 0x5a;

// Fibers and blocks are kept for the launches to come.
std::vector<Fiber*> fibers;
std::vector<Block*> blocks;

void run_threads() {
  for (;;) {
    launch_state.arguments.call(launch_state.arguments.data);
    Fiber* fiber = launch_state.current;
    if (fiber->stack[0] != kStackMark)
      fail(cudaErrorLaunchFailure, name(*fiber) + ": more local memory than a stack holds");
    fiber->finished = true;
    progress();
    thread_finished(fiber);
    switch_away();
  }
}

[[noreturn]] void resume(Fiber* fiber) {
  launch_state.current = fiber;
  threadIdx = fiber->index;
  blockIdx = fiber->block->index;
  schedule_hash = (schedule_hash ^ fiber->id) * 0x9e3779b97f4a7c15u + 1;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  setcontext(&fiber->entry);
  abort();
}

Fiber* new_fiber() {
  constexpr size_t kAtOnce = 64;
  char* stacks = static_cast<char*>(mmap(nullptr, kAtOnce * kStackStride, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) abort();
  for (size_t i = 0; i < kAtOnce; ++i) {
    fibers.push_back(new Fiber);
    fibers.back()->stack = stacks + i * kStackStride;
    fibers.back()->stack[0] = kStackMark;
  }
  return fibers[fibers.size() - kAtOnce];
}

void prepare(Fiber& fiber, Block& block, uint32_t thread) {
  if (!fiber.started) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_threads, 0);
  }
  const dim3& size = launch_state.block;
  fiber.block = &block;
  fiber.warp = &block.warps[thread / kLanes];
  fiber.id = block.number * kThreadsOfBlock + thread;
  fiber.thread = thread;
  fiber.lane = thread % kLanes;
  fiber.index = uint3{thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
  fiber.finished = false;
  fiber.waits_for = nullptr;
  fiber.polls = fiber.cluster_arrived = false;
  fiber.last_seen = 0;
  fiber.known = fiber.fenced = Knowledge();
  for (Knowledge& clock : fiber.seen) clock = Knowledge();
  fiber.time = static_cast<uint32_t>(launch_state.batch_base - launch_state.base);
  publish(&fiber);
}

void prepare(Block& block, uint32_t number, uint32_t slot) {
  const dim3 &grid = launch_state.grid, &cluster = launch_state.cluster;
  block.number = number;
  block.index = uint3{number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.slot = slot;
  block.shared = slot_base(slot);
  block.live = launch_state.threads;
  const uint3 in{block.index.x % cluster.x, block.index.y % cluster.y, block.index.z % cluster.z};
  const uint3 of{block.index.x / cluster.x, block.index.y / cluster.y, block.index.z / cluster.z};
  block.rank = (in.z * cluster.y + in.y) * cluster.x + in.x;
  block.cluster = (of.z * (grid.y / cluster.y) + of.y) * (grid.x / cluster.x) + of.x;
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  block.warps.resize((launch_state.threads + kLanes - 1) / kLanes);
  for (uint32_t warp = 0; warp < block.warps.size(); ++warp) {
    const uint32_t lanes = launch_state.threads - warp * kLanes;
    block.warps[warp].block = &block;
    block.warps[warp].first = warp * kLanes;
    block.warps[warp].live = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    block.warps[warp].meetings.clear();
  }
  memset(block.shared, 0xff, launch_state.shared_bytes);
}

// Removes one at random, and puts the last in its place.
Fiber* draw(std::vector<Fiber*>& from) {
  const uint64_t i = random_below(from.size());
  Fiber* fiber = from[i];
  from[i] = from.back();
  from.pop_back();
  return fiber;
}

int64_t draw_accesses_to_yield() {
  if (yield_probability <= 0) return INT64_MAX;
  return 1 + static_cast<int64_t>(random_below(static_cast<uint64_t>(2 / yield_probability)));
}

[[noreturn]] void deadlock() { fail(cudaErrorLaunchTimeout, "deadlock:" + describe_waiting()); }

// Nobody can go on. Where time passes, much of it has by now, and those who look at the clock give up.
void wait_in_vain() {
  constexpr uint32_t kMost = 100'000;
  if (!messages_are_lost || launch_state.clock >= kMost) deadlock();
  launch_state.clock += turns_in_vain;
  longest_wait = std::max(longest_wait, launch_state.clock);
  launch_state.polls_in_vain = launch_state.yields_in_vain = 0;
  time_passes_at_mbarriers();
}

// Null when all have finished.
Fiber* next() {
  Launch& launch = launch_state;
  for (;;) {
    const bool quiet = launch.ready.empty();
    if (store_in_flight() && random_below(quiet ? 2 : 4) == 0) {
      deliver_one();
      continue;
    }
    if (!quiet && (launch.polling.empty() || random_below(8) != 0)) return draw(launch.ready);
    if (!launch.polling.empty()) {
      if (!quiet || launch.polls_in_vain < (messages_are_lost ? kPollWeight : 100 * kPollWeight) *
                                               (100 + launch.threads * launch.blocks.size())) {
        return draw(launch.polling);
      }
      store_in_flight() ? deliver_one() : wait_in_vain();
      continue;
    }
    if (store_in_flight()) {
      deliver_one();
      continue;
    }
    if (std::none_of(launch.blocks.begin(), launch.blocks.end(), [](const Block* b) { return b->live > 0; }))
      return nullptr;
    wait_in_vain();
  }
}

}  // namespace

Launch launch_state;
bool messages_are_lost = false, products_are_wrong = false;
thread_local bool in_kernel = false;
uint64_t schedule_hash = 0;

uint64_t random_below(uint64_t limit) {
  random_state += 0x9e3779b97f4a7c15u;
  uint64_t x = random_state;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * limit >> 64);
}

void switch_away() {
  Fiber* self = launch_state.current;
  Fiber* following = next();
  if (following == self) return;  // threadIdx and blockIdx are its own still
  if (_setjmp(self->context) != 0) return;
  if (!following) _longjmp(launch_state.scheduler, 1);
  resume(following);
}

void yield() {
  Fiber* self = launch_state.current;
  launch_state.ready.push_back(self);
  // Nothing of note may happen for long in a long sum; for ever, only in a loop without end.
  if (++launch_state.yields_in_vain > (messages_are_lost ? 10'000 : 20'000'000)) wait_in_vain();
  switch_away();
}

void poll() {
  Fiber* self = launch_state.current;
  if (self->polls) {
    launch_state.polling.push_back(self);
    switch_away();
  } else {
    yield_sometimes();
  }
}

void yield_sometimes() {
  if (--launch_state.accesses_to_yield > 0) return;
  launch_state.accesses_to_yield = draw_accesses_to_yield();
  yield();
}

void saw(const void* where, uint64_t what) {
  Fiber* self = launch_state.current;
  const uint64_t seen = (reinterpret_cast<uint64_t>(where) ^ what * 0x9e3779b97f4a7c15u) + 1;
  self->polls = seen == self->last_seen;
  self->last_seen = seen;
  launch_state.polls_in_vain += self->polls ? kPollWeight : 1;
}

void pause() {
  poll();
  saw(nullptr, 0);
}

unsigned clock_high() { return launch_state.clock; }

unsigned thread_lane() { return launch_state.current->lane; }
unsigned char* dynamic_shared_memory() {
  return reinterpret_cast<unsigned char*>(launch_state.current->block->shared);
}

void wake(Fiber* fiber) {
  fiber->waits_for = nullptr;
  launch_state.ready.push_back(fiber);
}

void progress() {
  launch_state.polls_in_vain = launch_state.yields_in_vain = 0;
  launch_state.current->polls = false;
}

void run_batch(const std::vector<uint32_t>& numbers) {
  Launch& launch = launch_state;
  blockDim = launch.block;
  gridDim = launch.grid;
  launch.batch_base = launch.base + launch.last_time;
  launch.blocks.clear();
  launch.ready.clear();
  launch.polling.clear();
  launch.polls_in_vain = launch.yields_in_vain = launch.clock = 0;
  forget_async();
  forget_cluster_barriers();
  size_t used = 0;
  for (uint32_t slot = 0; slot < numbers.size(); ++slot) {
    if (slot == blocks.size()) blocks.push_back(new Block);
    Block& block = *blocks[slot];
    prepare(block, numbers[slot], slot);
    block.fibers.clear();
    for (uint32_t thread = 0; thread < launch.threads; ++thread, ++used) {
      if (used == fibers.size()) new_fiber();
      prepare(*fibers[used], block, thread);
      block.fibers.push_back(fibers[used]);
      launch.ready.push_back(fibers[used]);
    }
    launch.blocks.push_back(&block);
  }
  launch.accesses_to_yield = draw_accesses_to_yield();
  if (_setjmp(launch.scheduler) == 0) {
    in_kernel = true;
    resume(next());
  }
  in_kernel = false;
  if (launch_state.failure.error != cudaSuccess) {
    for (Fiber* fiber : fibers) {
      fiber->started = false;  // it stands somewhere in the kernel, for ever
      fiber->stack[0] = kStackMark;
    }
  }
}

}  // namespace frnn_emulation

using namespace frnn_emulation;

EXPORTED void frnn_emulation_set_seed(uint64_t seed) {
  random_state = seed * 0x2545f4914f6cdd1du + 1;
  schedule_hash = 0;
  last_error.clear();
  last_error_code = cudaSuccess;
}
EXPORTED void frnn_emulation_set_yield_probability(double probability) { yield_probability = probability; }
EXPORTED uint64_t frnn_emulation_schedule() { return schedule_hash; }
EXPORTED void frnn_emulation_set_turns_in_vain(uint32_t turns) { turns_in_vain = turns; }
EXPORTED uint32_t frnn_emulation_longest_wait() { return std::exchange(longest_wait, 0); }
EXPORTED void frnn_emulation_break(bool messages, bool products) {
  messages_are_lost = messages;
  products_are_wrong = products;
}
