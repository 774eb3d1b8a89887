// mbarriers, and what arrives later: st.async, which counts its bytes at one, and cp.async, for which a thread waits.
#include <algorithm>
#include <cstring>
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
  Clock near, far, near_done, far_done;
  std::vector<Fiber*> waiting;
};
std::unordered_map<const void*, Mbarrier> mbarriers;

struct Store {
  char* target;
  unsigned bytes;
  char value[16];
  Mbarrier* mbarrier;
  Clock known;  // to the thread that issued it, then
  uint32_t thread;
  const void* pc;
};
std::vector<Store> in_flight;

struct Copy {
  void* shared;
  const void* global;
  const void* pc;
};

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
  mbarrier.near = mbarrier.far = Clock();
  if (mbarrier.agent_time) mbarrier.far_done.set(mbarrier.agent, mbarrier.agent_time);
  for (Fiber* fiber : mbarrier.waiting) wake(fiber);
  mbarrier.waiting.clear();
}

void arrive(Mbarrier& mbarrier, bool cluster, unsigned expect_bytes, const void* pc) {
  Fiber* fiber = launch_state.current;
  if (mbarrier.pending == 0) {
    fail(cudaErrorLaunchFailure, "more arrivals at an mbarrier than its phase expects", pc);
  }
  if (fiber->block == mbarrier.block) {
    mbarrier.near.join(knowledge(fiber));
  } else if (cluster) {
    mbarrier.far.join(knowledge(fiber));
  }
  publish(fiber);
  mbarrier.bytes += expect_bytes;
  --mbarrier.pending;
  progress();
  complete_if_over(mbarrier);
}

bool is_over(const Mbarrier& mbarrier, unsigned parity) { return (mbarrier.phase & 1) != (parity & 1); }

void take_in(const Mbarrier& mbarrier, bool cluster) {
  Fiber* fiber = launch_state.current;
  fiber->known.join(mbarrier.near_done);
  if (cluster) fiber->known.join(mbarrier.far_done);
}

Mbarrier& find_own(const void* address, const void* pc) {
  Mbarrier& mbarrier = find(address, pc);
  if (mbarrier.block != launch_state.current->block) {
    fail(cudaErrorLaunchFailure, "waits at an mbarrier of another block", pc);
  }
  return mbarrier;
}

void perform(const Copy& copy) {
  check_access(copy.global, 16, false, false, copy.pc);
  check_access(copy.shared, 16, true, false, copy.pc);
  memcpy(copy.shared, copy.global, 16);
}

std::unordered_map<Fiber*, std::vector<std::vector<Copy>>> copies;  // of a thread, by group; the last is open

}  // namespace

void forget_async() {
  mbarriers.clear();
  in_flight.clear();
  copies.clear();
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
  mbarrier.agent = kMostBlocks * kThreadsOfBlock + static_cast<uint32_t>(mbarriers.size());
  mbarrier.agent_time = 0;
  mbarrier.expected = mbarrier.pending = arrivals;
  mbarrier.bytes = 0;
  const auto content = reinterpret_cast<uint64_t>(address);
  memcpy(address, &content, 8);
  progress();
}

void mbarrier_arrive(uint64_t* address, unsigned expect_bytes) {
  const void* pc = __builtin_return_address(0);
  yield();
  arrive(find_own(address, pc), false, expect_bytes, pc);
}

void mbarrier_arrive_cluster(uint32_t address) {
  const void* pc = __builtin_return_address(0);
  yield();
  arrive(find(shared_pointer(address), pc), true, 0, pc);
}

bool mbarrier_try_wait(uint64_t* address, unsigned parity, bool cluster) {
  const void* pc = __builtin_return_address(0);
  poll();
  const Mbarrier& mbarrier = find_own(address, pc);
  if (!is_over(mbarrier, parity)) return false;
  take_in(mbarrier, cluster);
  return true;
}

void mbarrier_wait(uint64_t* address, unsigned parity, bool cluster) {
  const void* pc = __builtin_return_address(0);
  yield();
  Fiber* fiber = launch_state.current;
  for (;;) {
    Mbarrier& mbarrier = find_own(address, pc);
    if (is_over(mbarrier, parity)) {
      take_in(mbarrier, cluster);
      return;
    }
    mbarrier.waiting.push_back(fiber);
    fiber->waits_for = parity & 1 ? "the end of a phase of parity 1 of the mbarrier at shared byte"
                                  : "the end of a phase of parity 0 of the mbarrier at shared byte";
    fiber->waits_detail = shared_address(address) % kSlotBytes - kSlotStart;
    switch_away();
  }
}

void store_async(uint32_t address, const void* value, unsigned bytes, uint32_t mbarrier_address) {
  const void* pc = __builtin_return_address(0);
  yield();
  Fiber* fiber = launch_state.current;
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
  in_flight.push_back(std::move(store));
  progress();
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
  const uint32_t start = static_cast<uint32_t>(launch_state.batch_base - launch_state.base);
  mbarrier.agent_time = std::max(mbarrier.agent_time, start) + 1;
  launch_state.last_time = std::max(launch_state.last_time, mbarrier.agent_time);
  const Epoch epoch = (launch_state.base + mbarrier.agent_time) << kTimeShift |
                      static_cast<Epoch>(mbarrier.agent) << kThreadShift;
  check_cells(arena_offset(store.target), store.bytes, true,
              Actor{epoch, kNoThread, &store.known, launch_state.batch_base, true, store.pc});
  memcpy(store.target, store.value, store.bytes);
  mbarrier.bytes -= store.bytes;
  launch_state.polls_in_vain = 0;
  complete_if_over(mbarrier);
}

void copy_async_16(void* shared, const void* global) {
  const void* pc = __builtin_return_address(0);
  yield();
  // Checked now and when it is waited for, made then: in between the target belongs to the copy.
  const Copy copy{shared, global, pc};
  shared_address(shared);
  check_access(global, 16, false, false, pc);
  check_access(shared, 16, true, false, pc);
  auto& groups = copies[launch_state.current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

void copy_commit() {
  auto& groups = copies[launch_state.current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void copy_wait(unsigned groups_left) {
  yield();
  auto& groups = copies[launch_state.current];
  while (groups.size() > groups_left + 1) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
  progress();
}

}  // namespace frnn_emulation
