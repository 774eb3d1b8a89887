// See memory.h. The allocator: blocks of rounded size with guard zones, freed ones rest before they are used again.
#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "exported.h"

namespace frnn_emulation {
namespace {

constexpr uint64_t kGuard = 256, kAlign = 64;
constexpr uint64_t kRestingBytes = uint64_t{64} << 20;

struct Allocation {
  uint64_t bytes;
  uint64_t room;  // what it takes of the arena, guard zones included
  bool live;
};

struct Allocator {
  std::mutex mutex;
  std::map<uint64_t, Allocation> allocations;                  // by offset of the first byte
  std::unordered_map<uint64_t, std::vector<uint64_t>> unused;  // by room
  std::deque<uint64_t> resting;
  uint64_t resting_bytes = 0;
  uint64_t end = kAlign;
};

Allocator& allocator() {
  static Allocator* made = new Allocator;  // outlives every static object that may free memory
  return *made;
}

void* reserve(uint64_t bytes) {
  void* place =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) {
    perror("emulation: cannot reserve address space");
    abort();
  }
  madvise(place, bytes, MADV_DONTDUMP);
  return place;
}

Arena make_arena() {
  Arena made;
  made.base = static_cast<char*>(reserve(kArenaBytes));
  made.cells = static_cast<Cell*>(reserve(kArenaBytes / kCellBytes * sizeof(Cell)));
  made.valid = static_cast<uint8_t*>(reserve(kGlobalBytes / 8));
  return made;
}

// Rounded up to an eighth of its power of two, so that a freed piece fits what is asked for next.
uint64_t round_room(uint64_t bytes) {
  uint64_t step = kAlign;
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void set_valid(uint64_t offset, uint64_t bytes, bool valid) {
  memset(arena.valid + offset / 8, valid ? 8 : 0, (bytes + 7) / 8);
  if (valid && bytes % 8) arena.valid[(offset + bytes) / 8] = static_cast<uint8_t>(bytes % 8);
}

}  // namespace

Arena arena = make_arena();

bool global_range_is_valid(const void* address, uint64_t bytes) {
  const uint64_t offset = arena_offset(address);
  if (offset >= kGlobalBytes || bytes > kGlobalBytes - offset) return false;
  for (uint64_t done = 0; done < bytes; done += 8) {
    if (!global_is_valid(offset + done, bytes - done < 8 ? bytes - done : 8)) return false;
  }
  return true;
}

std::string describe_global(const void* address) {
  Allocator& all = allocator();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const uint64_t offset = arena_offset(address);
  auto after = all.allocations.upper_bound(offset);
  std::string text;
  char line[160];
  if (after != all.allocations.begin()) {
    const auto& [start, before] = *std::prev(after);
    const char* freed = before.live ? "" : " that was freed";
    if (offset < start + before.bytes) {
      snprintf(line, sizeof line, "at byte %llu of an allocation of %llu bytes%s",
               (unsigned long long)(offset - start), (unsigned long long)before.bytes, freed);
      return line;
    }
    snprintf(line, sizeof line, "%llu bytes after the end of an allocation of %llu bytes%s",
             (unsigned long long)(offset - start - before.bytes), (unsigned long long)before.bytes, freed);
    text = line;
  }
  if (after != all.allocations.end()) {
    snprintf(line, sizeof line, "%s%llu bytes before the start of an allocation of %llu bytes%s",
             text.empty() ? "" : ", ", (unsigned long long)(after->first - offset),
             (unsigned long long)after->second.bytes, after->second.live ? "" : " that was freed");
    text += line;
  }
  return text.empty() ? "no memory was ever allocated" : text;
}

}  // namespace frnn_emulation

using namespace frnn_emulation;

EXPORTED void* frnn_emulation_malloc(size_t bytes) {
  Allocator& all = allocator();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const uint64_t room = round_room(bytes + kGuard);
  std::vector<uint64_t>& unused = all.unused[room];
  uint64_t offset;
  if (!unused.empty()) {
    offset = unused.back();
    unused.pop_back();
  } else {
    if (room + kGuard > kGlobalBytes - all.end) return nullptr;
    offset = all.end + kGuard - kAlign;  // the guard before is the one after of the neighbour
    offset = (offset + kAlign - 1) / kAlign * kAlign;
    all.end = offset + room;
  }
  all.allocations[offset] = Allocation{bytes, room, true};
  set_valid(offset, bytes, true);
  memset(arena.base + offset, 0xff, bytes);  // NaN in every type of number: nobody may count on zeros
  return arena.base + offset;
}

EXPORTED void frnn_emulation_free(void* address) {
  if (!address) return;
  Allocator& all = allocator();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.allocations.find(arena_offset(address));
  if (found == all.allocations.end() || !found->second.live) {
    fprintf(stderr, "emulation: %p is freed, but is not allocated\n", address);
    abort();
  }
  Allocation& allocation = found->second;
  allocation.live = false;
  set_valid(found->first, allocation.bytes, false);
  all.resting.push_back(found->first);
  all.resting_bytes += allocation.room;
  while (all.resting_bytes > kRestingBytes) {
    const auto rested = all.allocations.find(all.resting.front());
    all.resting.pop_front();
    all.resting_bytes -= rested->second.room;
    all.unused[rested->second.room].push_back(rested->first);
    all.allocations.erase(rested);
  }
}
