// mbarriers, and what arrives later: st.async, which counts its bytes at one, and cp.async, for which a thread waits.
#include <algorithm>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "../include/emulation/ptx_hooks.h"
#include "races.h"
#include "state.h"

namespace frnn_emulation {
namespace {

struct Mbarrier {
  Block* block;
  uint32_t agent;  // stands in clocks and cells for the asynchronous stores that count at it
  uint32_t agent_time;
  uint32_t expected, pending;
  int64_t bytes;
  uint32_t phase = 0;
  // What the arrivals of this phase make known, from the mbarrier's block and from others; what all completed phases did.
  // Apart from both, the asynchronous stores.
  Knowledge near, far, near_done, far_done, stores_done;
  std::vector<Fiber*> waiting;
};
std::unordered_map<const void*, Mbarrier> mbarriers;

struct Store {
  char* target;
  unsigned bytes;
  char value[16];
  Mbarrier* mbarrier;
  Knowledge known;  // to the thread that issued it, then
  uint32_t thread;
  const void* pc;
};
std::vector<Store> in_flight;

struct Copy {
  void* shared;
  const void* global;
  unsigned bytes;
  const void* pc;
  uint32_t time;  // of the thread's copies
};
// Of a thread: the copies under way by group, the last of which is open.
struct Copies {
  uint32_t agent, time;
  std::deque<std::vector<Copy>> groups{1};
};
std::unordered_map<const Fiber*, Copies> copies;

// The next number that is no thread's.
uint32_t agents = 0;
uint32_t new_agent() { return kMostBlocks * kThreadsOfBlock + agents++; }

Epoch agent_epoch(uint32_t agent, uint32_t time) {
  launch_state.last_time = std::max(launch_state.last_time, time);
  return (launch_state.base + time) << kTimeShift | static_cast<Epoch>(agent) << kThreadShift;
}

// Times of what is not a thread start where those of this batch's threads do.
uint32_t first_time() { return static_cast<uint32_t>(launch_state.batch_base - launch_state.base); }

Mbarrier& find(const void* address, const void* pc) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) {
    fail(cudaErrorLaunchFailure, "there is no mbarrier at this address: none was initialised yet", pc);
  }
  // A read, as to races: its initialisation must be known, and no plain store may hit it.
  check_access(address, 8, false, true, pc);
  uint64_t content;
  memcpy(&content, address, 8);
  if (content != reinterpret_cast<uint64_t>(address)) {
    fail(cudaErrorLaunchFailure, "an mbarrier was overwritten", pc);
  }
  return found->second;
}

void complete_if_over(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.expected;
  mbarrier.near_done.join(mbarrier.near);
  mbarrier.far_done.join(mbarrier.far);
  mbarrier.near = mbarrier.far = Knowledge();
  mbarrier.stores_done.set(mbarrier.agent, mbarrier.agent_time);
  for (Fiber* fiber : mbarrier.waiting) wake(fiber);
  mbarrier.waiting.clear();
}

void arrive(Mbarrier& mbarrier, Publish what, unsigned expect_bytes, const void* pc) {
  Fiber* fiber = launch_state.current;
  if (mbarrier.pending == 0) {
    fail(cudaErrorLaunchFailure, "more arrivals at an mbarrier than its phase expects", pc);
  }
  if (fiber->block == mbarrier.block) {
    mbarrier.near.join(knowledge(fiber));
  } else if (what == Publish::all) {
    mbarrier.far.join(knowledge(fiber));
  } else {
    mbarrier.far.join_reads(knowledge(fiber));
  }
  publish(fiber);
  mbarrier.bytes += expect_bytes;
  --mbarrier.pending;
  progress();
  complete_if_over(mbarrier);
}

bool is_over(const Mbarrier& mbarrier, unsigned parity) { return (mbarrier.phase & 1) != (parity & 1); }

void take_in(const Mbarrier& mbarrier, Wait reach) {
  Fiber* fiber = launch_state.current;
  fiber->known.join(mbarrier.near_done);
  if (reach != Wait::block) fiber->known.join(mbarrier.stores_done);
  if (reach == Wait::cluster) {
    fiber->known.join(mbarrier.far_done);
  } else {
    fiber->known.join_reads(mbarrier.far_done);  // that it has happened needs no memory order
  }
}

Mbarrier& find_own(const void* address, const void* pc) {
  Mbarrier& mbarrier = find(address, pc);
  if (mbarrier.block != launch_state.current->block) {
    fail(cudaErrorLaunchFailure, "waits at an mbarrier of another block", pc);
  }
  return mbarrier;
}

Copies& copies_of(const Fiber* fiber) {
  const auto [found, made] = copies.try_emplace(fiber);
  if (made) {
    found->second.agent = new_agent();
    found->second.time = first_time();
  }
  return found->second;
}

}  // namespace

void forget_async() {
  mbarriers.clear();
  in_flight.clear();
  copies.clear();
  agents = 0;
}

void mbarrier_init(uint64_t* address, unsigned arrivals) {
  const void* pc = __builtin_return_address(0);
  yield();
  check_access(address, 8, true, false, pc);
  if (arrivals == 0 || arrivals >= 1u << 20) trap("an mbarrier expects 1 to 2^20 - 1 arrivals");
  if (shared_address(address) / kSlotBytes != launch_state.current->block->slot)
    trap("an mbarrier of another block");
  if (mbarriers.count(address)) trap("an mbarrier is initialised a second time");
  Mbarrier& mbarrier = mbarriers[address];
  mbarrier.block = launch_state.current->block;
  mbarrier.agent = new_agent();
  mbarrier.agent_time = first_time();
  mbarrier.expected = mbarrier.pending = arrivals;
  mbarrier.bytes = 0;
  const auto content = reinterpret_cast<uint64_t>(address);
  memcpy(address, &content, 8);
  progress();
}

void mbarrier_arrive(uint64_t* address, unsigned expect_bytes) {
  const void* pc = __builtin_return_address(0);
  yield();
  arrive(find_own(address, pc), Publish::all, expect_bytes, pc);
}

void mbarrier_arrive_cluster(uint32_t address, Publish what) {
  const void* pc = __builtin_return_address(0);
  yield();
  arrive(find(shared_pointer(address), pc), what, 0, pc);
}

bool mbarrier_try_wait(uint64_t* address, unsigned parity, Wait reach) {
  const void* pc = __builtin_return_address(0);
  poll();
  const Mbarrier& mbarrier = find_own(address, pc);
  saw(address, mbarrier.phase);
  if (!is_over(mbarrier, parity)) return false;
  take_in(mbarrier, reach);
  return true;
}

bool mbarrier_wait(uint64_t* address, unsigned parity, Wait reach) {
  const void* pc = __builtin_return_address(0);
  yield();
  Fiber* fiber = launch_state.current;
  for (const uint32_t start = launch_state.clock;;) {
    Mbarrier& mbarrier = find_own(address, pc);
    if (is_over(mbarrier, parity)) {
      take_in(mbarrier, reach);
      return true;
    }
    if (launch_state.clock != start) return false;
    mbarrier.waiting.push_back(fiber);
    fiber->waits_for = parity & 1 ? "the end of a phase of parity 1 of the mbarrier at shared byte %llu"
                                  : "the end of a phase of parity 0 of the mbarrier at shared byte %llu";
    fiber->waits_detail = shared_address(address) % kSlotBytes - kSlotStart;
    switch_away();
  }
}

void store_async(uint32_t address, const void* value, unsigned bytes, uint32_t mbarrier_address) {
  const void* pc = __builtin_return_address(0);
  yield();
  Fiber* fiber = launch_state.current;
  if (cluster_size() < 2) trap("st.async in a cluster of one block");
  if (address / kSlotBytes != mbarrier_address / kSlotBytes)
    trap("st.async to another block than its mbarrier's");
  if (address % bytes)
    fail(cudaErrorMisalignedAddress, "misaligned: st.async of " + std::to_string(bytes), pc);
  Mbarrier& mbarrier = find(shared_pointer(mbarrier_address), pc);
  Store store{
      static_cast<char*>(shared_pointer(address)), bytes, {}, &mbarrier, knowledge(fiber), fiber->id, pc};
  check_bounds(store.target, bytes, true, pc);
  memcpy(store.value, value, bytes);
  publish(fiber);
  if (!messages_are_lost) in_flight.push_back(std::move(store));
  progress();
}

void time_passes_at_mbarriers() {
  for (auto& [address, mbarrier] : mbarriers) {
    for (Fiber* fiber : mbarrier.waiting) wake(fiber);
    mbarrier.waiting.clear();
  }
}

bool store_in_flight() { return !in_flight.empty(); }

void deliver_one() {
  std::swap(in_flight[random_below(in_flight.size())], in_flight.back());
  const Store store = std::move(in_flight.back());
  in_flight.pop_back();
  Mbarrier& mbarrier = *store.mbarrier;
  if (mbarrier.block->live == 0) {
    launch_state.failure.places = {{"issued", store.pc}};
    fail(cudaErrorIllegalAddress,
         "st.async of " + name(store.thread) + " arrives at a block that has exited");
  }
  const Epoch epoch = agent_epoch(mbarrier.agent, ++mbarrier.agent_time);
  check_cells(arena_offset(store.target), store.bytes, true,
              Actor{epoch, kNoThread, &store.known, launch_state.batch_base, true, store.pc});
  memcpy(store.target, store.value, store.bytes);
  mbarrier.bytes -= store.bytes;
  launch_state.polls_in_vain = launch_state.yields_in_vain = 0;
  complete_if_over(mbarrier);
}

void copy_async(void* shared, const void* global, unsigned bytes) {
  const void* pc = __builtin_return_address(0);
  yield();
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail(cudaErrorMisalignedAddress, "misaligned: cp.async of " + std::to_string(bytes), pc);
  Fiber* fiber = launch_state.current;
  shared_address(shared);
  check_access(global, bytes, false, false, pc);
  check_access(shared, bytes, true, false, pc);
  // Made when it is waited for. Until then the target belongs to the copy, of which nobody knows how far it is.
  Copies& own = copies_of(fiber);
  own.groups.back().push_back({shared, global, bytes, pc, ++own.time});
  const Epoch epoch = agent_epoch(own.agent, own.time);
  check_cells(arena_offset(shared), bytes, true,
              Actor{epoch, fiber->id, &fiber->known, launch_state.batch_base, true, pc});
}

void copy_commit() { copies_of(launch_state.current).groups.emplace_back(); }

void copy_wait(unsigned groups_left) {
  yield();
  Fiber* fiber = launch_state.current;
  Copies& own = copies_of(fiber);
  for (; own.groups.size() > groups_left + 1; own.groups.pop_front()) {
    for (const Copy& copy : own.groups.front()) {
      fiber->known.set(own.agent, copy.time);
      check_access(copy.global, copy.bytes, false, false, copy.pc);
      check_access(copy.shared, copy.bytes, true, false, copy.pc);
      memcpy(copy.shared, copy.global, copy.bytes);
    }
  }
  progress();
}

}  // namespace frnn_emulation
