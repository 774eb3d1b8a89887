// The memory of the emulated device: one reservation of address space, so that what is known of an address is found by
// arithmetic. Its first part holds allocations of global memory with guard zones between them, its second the shared
// memory of the blocks that run. Two bytes of it have a cell: who wrote them last, and who has read them since.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace frnn_emulation {

constexpr uint64_t kGlobalBytes = uint64_t{4} << 30;
constexpr uint64_t kSlotBytes = 256 << 10;  // a block's shared memory lies in a slot
constexpr uint64_t kSlots = 2048;
constexpr uint64_t kSlotStart = 4096;  // offset of the first byte in its slot: what is before is guard
constexpr uint64_t kArenaBytes = kGlobalBytes + kSlots * kSlotBytes;
constexpr uint64_t kCellBytes = 2;

// Who made an access, and when, in one word: time : 34 | thread : 26 | is_set : 1 | strong : 1 | bytes of the cell : 2.
// Times grow from launch to launch, so that an old cell need not be cleared.
using Epoch = uint64_t;
constexpr unsigned kTimeShift = 30, kThreadShift = 4;
constexpr Epoch kIsSet = 8, kStrong = 4, kBytes = 3;
constexpr uint64_t epoch_time(Epoch epoch) { return epoch >> kTimeShift; }
constexpr uint32_t epoch_thread(Epoch epoch) { return (epoch >> kThreadShift) & ((1u << 26) - 1); }

struct Cell {
  Epoch write;
  Epoch read;  // with kIsSet: the number of a set of readers, see shadow.cpp
  uint32_t write_pc, read_pc;
};

struct Arena {
  char* base;
  Cell* cells;
  uint8_t* valid;  // for 8 bytes of global memory: how many of them, from the first, may be accessed
};
extern Arena arena;

inline uint64_t arena_offset(const void* address) {
  return static_cast<uint64_t>(static_cast<const char*>(address) - arena.base);
}
inline char* slot_base(uint32_t slot) { return arena.base + kGlobalBytes + slot * kSlotBytes + kSlotStart; }

// bytes <= 16.
inline bool global_is_valid(uint64_t offset, uint64_t bytes) {
  const uint64_t last = offset + bytes - 1;
  return arena.valid[offset / 8] > (offset & 7) && arena.valid[last / 8] > (last & 7) &&
         (offset / 8 == last / 8 || arena.valid[offset / 8] == 8);
}
bool global_range_is_valid(const void* address, uint64_t bytes);

// "24 bytes after an allocation of 400 bytes", for messages.
std::string describe_global(const void* address);

}  // namespace frnn_emulation
