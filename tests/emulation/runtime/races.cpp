// See races.h. Neighbouring cells are mostly in the same state, so an access is checked once for each run of equal cells.
#include "races.h"

#include <algorithm>
#include <deque>

#include "state.h"

namespace frnn_emulation {
namespace {

constexpr Epoch kLaneBits = Epoch{kLanes - 1} << kThreadShift;

// Lanes of one warp that read in the same way at the same time of theirs.
struct Readers {
  Epoch epoch;  // of lane 0
  uint32_t lanes, pc;
};

// Who has read since the last write, where that is more than one thread and none knows of the others. A cell holds the
// number of its set, with the number of the launch: an older one is empty. Cells share a set until they differ.
struct ReaderSet {
  uint32_t cells = 0;
  std::vector<Readers> readers;
};
std::deque<ReaderSet> sets;
std::vector<uint32_t> free_sets;
uint32_t sets_used = 0;

constexpr unsigned kLaunchShift = 36;
Epoch set_word(uint32_t index) {
  return static_cast<Epoch>(launch_state.number) << kLaunchShift | static_cast<Epoch>(index) << kThreadShift |
         kIsSet;
}
bool is_current_set(Epoch word) {
  return (word & kIsSet) && word >> kLaunchShift == set_word(0) >> kLaunchShift;
}
uint32_t set_index(Epoch word) { return static_cast<uint32_t>(word >> kThreadShift); }

uint32_t new_set() {
  if (!free_sets.empty()) {
    const uint32_t index = free_sets.back();
    free_sets.pop_back();
    return index;
  }
  if (sets_used == sets.size()) sets.emplace_back();
  return sets_used++;
}

void leave_set(Epoch word, uint32_t cells) {
  if (!is_current_set(word)) return;
  ReaderSet& set = sets[set_index(word)];
  set.cells -= cells;
  if (set.cells == 0) free_sets.push_back(set_index(word));
}

Readers as_readers(Epoch epoch, uint32_t pc) {
  return {epoch & ~kLaneBits, 1u << (epoch_thread(epoch) % kLanes), pc};
}

// The lanes that the actor does not know to be past their access; if it writes, past their reading.
uint32_t unordered(const Readers& before, const Actor& actor, bool write) {
  const uint64_t time = epoch_time(before.epoch);
  if (time <= actor.base) return 0;
  const uint32_t thread = epoch_thread(before.epoch);
  uint32_t lanes = before.lanes;
  if (actor.self / kLanes == thread / kLanes) lanes &= ~(1u << actor.self % kLanes);
  if (lanes == 0) return 0;
  const auto since = static_cast<uint32_t>(time - launch_state.base);
  return write ? actor.known->behind_reads(thread, lanes, since) : actor.known->behind(thread, lanes, since);
}

bool ordered(Epoch before, const Actor& actor) {
  const uint64_t time = epoch_time(before);
  if (time <= actor.base) return true;
  const uint32_t thread = epoch_thread(before);
  return thread == actor.self || actor.known->knows(thread, static_cast<uint32_t>(time - launch_state.base));
}

// Whether two accesses conflict unless something orders them.
bool meets(Epoch before, Epoch now) { return (before & now & kBytes) && !(before & now & kStrong); }

// Whether whatever conflicts with the access `before` conflicts with `now`, if `now` comes later.
bool covers(Epoch now, Epoch before) {
  return !(before & kBytes & ~now) && (before & kStrong || !(now & kStrong));
}

std::string place(const Cell* cell) {
  const uint64_t offset = static_cast<uint64_t>(cell - arena.cells) * kCellBytes;
  if (offset < kGlobalBytes) return "global memory, " + describe_global(arena.base + offset);
  const uint64_t in_slot = (offset - kGlobalBytes) % kSlotBytes - kSlotStart;
  const auto slot = static_cast<uint32_t>((offset - kGlobalBytes) / kSlotBytes);
  std::string text = "byte " + std::to_string(in_slot) + " of the shared memory";
  if (slot < launch_state.blocks.size()) {
    text += " of block " + std::to_string(launch_state.blocks[slot]->number);
  }
  return text;
}

[[noreturn]] void race(const Cell* cell, Epoch before, uint32_t before_pc, const char* verb_before, Epoch now,
                       const char* verb_now, const Actor& actor) {
  launch_state.failure.places = {{verb_now, actor.pc}, {verb_before, long_pc(before_pc)}};
  const auto how = [](Epoch epoch) { return epoch & kStrong ? " (volatile, relaxed or atomic)" : ""; };
  fail(cudaErrorLaunchFailure, "data race: " + name(epoch_thread(now)) + " " + verb_now + how(now) +
                                   " what " + name(epoch_thread(before)) + " " + verb_before + how(before) +
                                   ", and nothing orders the two: " + place(cell));
}

// A run of cells that were all written and read alike, and of which the access takes the same bytes.
struct Run {
  Cell *first, *end;
  uint32_t cells() const { return static_cast<uint32_t>(end - first); }
};

// Who knows that another has read what an asynchronous store brought knows that it has arrived.
bool has_arrived(Epoch before, const Actor& actor) {
  if (epoch_thread(before) < kMostBlocks * kThreadsOfBlock) return false;
  return unordered(as_readers(before, 0), actor, true) == 0;
}

void check_write(const Run& run, Epoch now, const Actor& actor) {
  const Cell cell = *run.first;
  if (cell.write == now) return;  // a conflicting read since would have been noticed then
  if (meets(cell.write, now) && !ordered(cell.write, actor) && !has_arrived(cell.write, actor)) {
    race(run.first, cell.write, cell.write_pc, "wrote", now, "writes", actor);
  }
  bool all_ordered = true;
  const auto look = [&](const Readers& before) {
    const uint32_t lanes = unordered(before, actor, true);
    if (lanes == 0) return;
    all_ordered = false;
    if (!meets(before.epoch, now)) return;
    const auto lane = static_cast<Epoch>(__builtin_ctz(lanes));
    race(run.first, before.epoch | lane << kThreadShift, before.pc, "read", now, "writes", actor);
  };
  if (is_current_set(cell.read)) {
    for (const Readers& readers : sets[set_index(cell.read)].readers) look(readers);
  } else if (!(cell.read & kIsSet)) {
    look(as_readers(cell.read, cell.read_pc));
  }
  // Whoever is ordered after this write is ordered after those reads.
  const bool forget = all_ordered && !(now & kStrong) && (now & kBytes) == kBytes;
  if (forget) leave_set(cell.read, run.cells());
  for (Cell* c = run.first; c < run.end; ++c) {
    if (forget) c->read = 0;
    c->write = now;
    c->write_pc = short_pc(actor.pc);
  }
}

void set_read(const Run& run, Epoch word, uint32_t pc) {
  for (Cell* cell = run.first; cell < run.end; ++cell) {
    cell->read = word;
    cell->read_pc = pc;
  }
}

// Adds a reader to the set of the run's cells.
void join_set(const Run& run, const Readers& now, const Actor& actor) {
  const Epoch word = run.first->read;
  uint32_t index = set_index(word);
  static size_t hint = 0;  // neighbouring sets have the same warps in the same places
  std::vector<Readers>* readers = &sets[index].readers;
  size_t found = hint < readers->size() && (*readers)[hint].epoch == now.epoch ? hint : 0;
  while (found < readers->size() && (*readers)[found].epoch != now.epoch) ++found;
  const bool is_new = found == readers->size();
  if (!is_new && (*readers)[found].lanes & now.lanes) {
    hint = found;
    return;
  }
  if (sets[index].cells != run.cells()) {
    index = new_set();
    readers = &sets[index].readers;
    *readers = sets[set_index(word)].readers;
    sets[index].cells = run.cells();
    leave_set(word, run.cells());
    set_read(run, set_word(index), now.pc);
  }
  if (!is_new) {
    (*readers)[found].lanes |= now.lanes;
    hint = found;
    return;
  }
  const auto is_covered = [&](const Readers& before) {
    return covers(now.epoch, before.epoch) && unordered(before, actor, false) == 0;
  };
  readers->erase(std::remove_if(readers->begin(), readers->end(), is_covered), readers->end());
  hint = readers->size();
  readers->push_back(now);
}

void check_read(const Run& run, Epoch now, const Actor& actor) {
  const Cell cell = *run.first;
  if (cell.read == now) return;
  if (meets(cell.write, now) && !ordered(cell.write, actor)) {
    race(run.first, cell.write, cell.write_pc, "wrote", now, "reads", actor);
  }
  if (actor.shared_memory && epoch_time(cell.write) <= actor.base) {
    launch_state.failure.places = {{"reads", actor.pc}};
    fail(cudaErrorLaunchFailure, "uninitialised: " + name(epoch_thread(now)) +
                                     " reads what no thread has written: " + place(run.first));
  }
  const uint32_t pc = short_pc(actor.pc);
  if (now & kStrong) {
    // Of those who poll the last is enough: whoever writes plainly what they poll conflicts with their next look too.
    const bool others_are_plain =
        is_current_set(cell.read) || !(covers(now, cell.read) || ordered(cell.read, actor));
    if (!others_are_plain) set_read(run, now, pc);
    return;
  }
  if (is_current_set(cell.read)) {
    join_set(run, as_readers(now, pc), actor);
  } else if ((cell.read & kIsSet) || (covers(now, cell.read) && ordered(cell.read, actor))) {
    set_read(run, now, pc);
  } else {
    const uint32_t index = new_set();
    sets[index].cells = run.cells();
    sets[index].readers.assign({as_readers(cell.read, cell.read_pc)});
    set_read(run, set_word(index), pc);
    join_set(run, as_readers(now, pc), actor);
  }
}

}  // namespace

void forget_readers() {
  sets_used = 0;
  free_sets.clear();
}

void check_cells(uint64_t offset, uint64_t bytes, bool write, const Actor& actor) {
  Cell* const first = arena.cells + offset / kCellBytes;
  Cell* const last = arena.cells + (offset + bytes - 1) / kCellBytes;
  const auto epoch_at = [&](const Cell* cell) {
    Epoch now = actor.epoch | kBytes;
    if (cell == first && offset % kCellBytes) now &= ~Epoch{1};
    if (cell == last && (offset + bytes) % kCellBytes) now &= ~Epoch{2};
    return now;
  };
  for (Run run{first, first}; run.first <= last; run.first = run.end) {
    const Epoch now = epoch_at(run.first);
    run.end = run.first + 1;
    while (run.end <= last && run.end->write == run.first->write && run.end->read == run.first->read &&
           epoch_at(run.end) == now) {
      ++run.end;
    }
    if (write) {
      check_write(run, now, actor);
    } else {
      check_read(run, now, actor);
    }
  }
}

}  // namespace frnn_emulation
