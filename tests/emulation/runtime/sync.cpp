// Where threads meet: the barriers of a block, and the collective operations of a warp. What CUDA says of them holds:
// barriers and __syncwarp order memory, shuffles and votes do not.
#include "state.h"

namespace frnn_emulation {
namespace {

void arrive(Barrier& barrier, const Fiber& fiber) {
  // Most threads know the very same: the clock that they share is joined once.
  if (!barrier.last_joined.same(fiber.known)) {
    barrier.clock.join(fiber.known);
    barrier.last_joined = fiber.known;
  }
  ++barrier.arrived;
  progress();
}

void complete_if_full(Block& block, Barrier& barrier) {
  const uint32_t wanted = barrier.count ? barrier.count : block.live;
  if (barrier.arrived == 0 || barrier.arrived < wanted) return;
  for (const Fiber* fiber : barrier.waiting) barrier.clock.set(fiber->id, fiber->time);
  for (Fiber* fiber : barrier.waiting) {
    fiber->known = barrier.clock;
    fiber->got = barrier.predicates;
    publish(fiber);
    wake(fiber);
  }
  barrier.waiting.clear();
  barrier.clock = barrier.last_joined = Knowledge();
  barrier.arrived = barrier.count = barrier.predicates = 0;
  progress();
}

Barrier& barrier_of(Fiber& fiber, unsigned id, unsigned count) {
  Block& block = *fiber.block;
  if (id >= kNamedBarriers) trap("a block has 16 barriers, 0 to 15");
  if (count % kLanes || count > (launch_state.threads + kLanes - 1) / kLanes * kLanes) {
    trap("a barrier's count of threads must be a multiple of 32, and not more than the block has");
  }
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) barrier.count = count;
  if (barrier.count != count) trap("threads come to the same barrier with different counts");
  return barrier;
}

Knowledge meeting_clock(const Warp& warp, uint32_t mask) {
  Knowledge clock;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) clock.join(warp.block->fibers[warp.first + lane]->known);
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Fiber* fiber = mask >> lane & 1 ? warp.block->fibers[warp.first + lane] : nullptr;
    if (fiber) clock.set(fiber->id, fiber->time);
  }
  return clock;
}

void hold(const Warp& warp, const Meeting& meeting) {
  const auto fiber_of = [&](uint32_t lane) { return warp.block->fibers[warp.first + lane]; };
  Knowledge clock;
  if (meeting.operation == WarpOperation::synchronize) clock = meeting_clock(warp, meeting.arrived);
  if (meeting.operation == WarpOperation::multiply || meeting.operation == WarpOperation::load_matrices) {
    if (meeting.arrived != ~0u) trap("a matrix instruction needs all 32 lanes of the warp");
    Fiber* const* lanes = warp.block->fibers.data() + warp.first;
    meeting.operation == WarpOperation::multiply ? multiply(lanes) : distribute_matrices(lanes);
  }
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (meeting.arrived >> lane & 1 && fiber_of(lane)->given) votes |= 1u << lane;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (!(meeting.arrived >> lane & 1)) continue;
    Fiber* fiber = fiber_of(lane);
    switch (meeting.operation) {
      case WarpOperation::synchronize:
        fiber->known = clock;
        publish(fiber);
        break;
      case WarpOperation::vote:
        fiber->got = votes;
        break;
      case WarpOperation::shuffle:
        if (fiber->source >= kLanes || !(meeting.arrived >> fiber->source & 1)) {
          fail(cudaErrorLaunchFailure, name(*fiber) + " reads lane " + std::to_string(fiber->source) +
                                           " in a shuffle, and that lane does not take part");
        }
        fiber->got = fiber_of(fiber->source)->given;
        break;
      case WarpOperation::multiply:
      case WarpOperation::load_matrices:
        break;
    }
    wake(fiber);
  }
  progress();
}

// The last lane that is still missing may have come, or finished.
void hold_if_full(Warp& warp) {
  for (size_t i = 0; i < warp.meetings.size();) {
    const Meeting meeting = warp.meetings[i];
    if (meeting.arrived != (meeting.mask & warp.live)) {
      ++i;
      continue;
    }
    warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(i));
    hold(warp, meeting);
  }
}

const char* kMeetingNames[] = {"__syncwarp with mask %llx", "a shuffle with mask %llx",
                               "a vote with mask %llx", "mma with mask %llx", "ldmatrix with mask %llx"};

}  // namespace

unsigned block_barrier(unsigned id, unsigned count, bool predicate) {
  yield();
  Fiber* fiber = launch_state.current;
  Barrier& barrier = barrier_of(*fiber, id, count);
  arrive(barrier, *fiber);
  barrier.predicates += predicate;
  barrier.waiting.push_back(fiber);
  fiber->waits_for = "barrier %llu";
  fiber->waits_detail = id;
  complete_if_full(*fiber->block, barrier);
  switch_away();
  return static_cast<unsigned>(fiber->got);
}

void block_barrier_arrive(unsigned id, unsigned count) {
  yield();
  Fiber* fiber = launch_state.current;
  if (count == 0) trap("bar.arrive needs a count of threads");
  Barrier& barrier = barrier_of(*fiber, id, count);
  arrive(barrier, *fiber);
  barrier.clock.set(fiber->id, fiber->time);
  publish(fiber);
  complete_if_full(*fiber->block, barrier);
}

uint64_t warp_meet(WarpOperation operation, unsigned mask, uint64_t value, unsigned source) {
  yield();
  Fiber* fiber = launch_state.current;
  Warp& warp = *fiber->warp;
  if (!(mask >> fiber->lane & 1))
    trap("a lane takes part in an operation of the warp whose mask leaves it out");
  fiber->given = value;
  fiber->source = source;
  fiber->waits_for = kMeetingNames[static_cast<int>(operation)];
  fiber->waits_detail = mask;
  progress();
  bool joined = false;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.operation == operation && meeting.mask == mask) {
      meeting.arrived |= 1u << fiber->lane;
      joined = true;
      break;
    }
  }
  if (!joined) warp.meetings.push_back({operation, mask, 1u << fiber->lane});
  hold_if_full(warp);
  switch_away();
  return fiber->got;
}

void thread_finished(Fiber* fiber) {
  Block& block = *fiber->block;
  --block.live;
  fiber->warp->live &= ~(1u << fiber->lane);
  cluster_thread_finished(block);
  if (block.live == 0) return;
  for (Barrier& barrier : block.barriers) complete_if_full(block, barrier);
  hold_if_full(*fiber->warp);
}

}  // namespace frnn_emulation
