// Clusters: the addresses of each other's shared memory, and the barrier of all their threads.
#include <map>

#include "../include/emulation/ptx_hooks.h"
#include "state.h"

namespace frnn_emulation {
namespace {

// Of each cluster that runs, by its number.
struct ClusterBarrier {
  uint32_t phase = 0, arrived = 0;
  Knowledge clock, last_clock;
  std::vector<Fiber*> waiting;
};
std::map<uint32_t, ClusterBarrier> barriers;

uint32_t live_threads(uint32_t cluster) {
  uint32_t live = 0;
  for (const Block* block : launch_state.blocks) live += block->cluster == cluster ? block->live : 0;
  return live;
}

void complete_if_full(uint32_t cluster) {
  ClusterBarrier& barrier = barriers[cluster];
  if (barrier.arrived == 0 || barrier.arrived < live_threads(cluster)) return;
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.last_clock = std::exchange(barrier.clock, Knowledge());
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
  progress();
}

}  // namespace

void forget_cluster_barriers() { barriers.clear(); }
void cluster_thread_finished(const Block& block) { complete_if_full(block.cluster); }

// Not 0 for any byte of shared memory, so that a null pointer stays recognisable.
uint32_t shared_address(const void* pointer) {
  const uint64_t offset = arena_offset(pointer) - kGlobalBytes;
  if (offset >= kArenaBytes - kGlobalBytes) trap("the shared address is asked of a pointer to other memory");
  return static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address) { return arena.base + kGlobalBytes + address; }

uint32_t address_at_rank(uint32_t address, unsigned rank) {
  const Block& own = *launch_state.current->block;
  for (const Block* block : launch_state.blocks) {
    if (block->cluster == own.cluster && block->rank == rank) {
      return static_cast<uint32_t>(block->slot * kSlotBytes + address % kSlotBytes);
    }
  }
  trap("there is no block of this rank in the cluster");
}

unsigned cluster_rank() { return launch_state.current->block->rank; }
unsigned cluster_size() {
  const dim3& cluster = launch_state.cluster;
  return cluster.x * cluster.y * cluster.z;
}

void cluster_arrive() {
  yield();
  Fiber* fiber = launch_state.current;
  if (fiber->cluster_arrived) trap("a thread arrives at the cluster's barrier again without having waited");
  ClusterBarrier& barrier = barriers[fiber->block->cluster];
  barrier.clock.join(fiber->known);
  barrier.clock.set(fiber->id, fiber->time);
  publish(fiber);
  fiber->cluster_arrived = true;
  fiber->cluster_phase = barrier.phase;
  ++barrier.arrived;
  progress();
  complete_if_full(fiber->block->cluster);
}

void cluster_wait() {
  yield();
  Fiber* fiber = launch_state.current;
  if (!fiber->cluster_arrived) trap("a thread waits at the cluster's barrier without having arrived");
  ClusterBarrier& barrier = barriers[fiber->block->cluster];
  if (barrier.phase == fiber->cluster_phase) {
    barrier.waiting.push_back(fiber);
    fiber->waits_for = "the cluster's barrier, phase %llu";
    fiber->waits_detail = barrier.phase;
    switch_away();
  }
  fiber->known.join(barrier.last_clock);
  fiber->cluster_arrived = false;
}

}  // namespace frnn_emulation
