// Two accesses to the same bytes, one of them a write, must be ordered by what the threads know of each other: the check
// of one access against what the cells remember. FastTrack's scheme: a cell keeps its last write, and the reads since.
#pragma once

#include "memory.h"
#include "state.h"

namespace frnn_emulation {

// Who accesses: a thread, or an asynchronous copy on behalf of one.
struct Actor {
  Epoch epoch;    // without bytes
  uint32_t self;  // what this thread did before is ordered; no thread: an asynchronous copy
  const Knowledge* known;
  uint64_t base;  // what happened until this time is ordered
  bool shared_memory;
  const void* pc;
};

void check_cells(uint64_t offset, uint64_t bytes, bool write, const Actor& actor);
void forget_readers();

// Program counters as cells keep them.
uint32_t short_pc(const void* pc);
const void* long_pc(uint32_t pc);

}  // namespace frnn_emulation
