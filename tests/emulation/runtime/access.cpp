// What the compiler calls before each access to memory (-fsanitize=thread), and for each pointer that is not aligned as
// its type is (-fsanitize=alignment). Nothing of a sanitizer's own runtime is linked: in a kernel, these functions
// check the address, check for races, and let other threads overtake; outside they do nothing.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "races.h"
#include "state.h"

namespace frnn_emulation {
namespace {

#define CALLER __builtin_return_address(0)

// The shared object that this is part of: kernels may read its tables.
struct Image {
  const char *first = nullptr, *end = nullptr;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
  Image image{reinterpret_cast<const char*>(~uintptr_t{0}), nullptr};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const char* start = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    if (start < image.first) image.first = start;
    if (start + info->dlpi_phdr[i].p_memsz > image.end) image.end = start + info->dlpi_phdr[i].p_memsz;
  }
  const char* here = reinterpret_cast<const char*>(&find_image);
  if (here < image.first || here >= image.end) return 0;
  *static_cast<Image*>(data) = image;
  return 1;
}

const Image image = [] {
  Image found;
  dl_iterate_phdr(find_image, &found);
  return found;
}();

bool inside(const void* address, uint64_t bytes, const void* first, uint64_t room) {
  const auto offset =
      static_cast<uint64_t>(static_cast<const char*>(address) - static_cast<const char*>(first));
  return offset < room && bytes <= room - offset;
}

[[noreturn]] void bad_address(const void* address, uint64_t bytes, bool write, const void* pc,
                              const char* what, const std::string& where) {
  char text[120];
  snprintf(text, sizeof text, "%s: %s %llu bytes at %p", what, write ? "writes" : "reads",
           (unsigned long long)bytes, address);
  fail(cudaErrorIllegalAddress, std::string(text) + ": " + where, pc);
}

[[noreturn]] void bad_shared(const void* address, uint64_t bytes, bool write, const void* pc) {
  const uint64_t offset = arena_offset(address) - kGlobalBytes;
  const uint64_t slot = offset / kSlotBytes;
  const auto in_slot = static_cast<int64_t>(offset % kSlotBytes) - static_cast<int64_t>(kSlotStart);
  const Fiber& fiber = *launch_state.current;
  std::string whose = "its own block's";
  if (slot != fiber.block->slot) {
    whose = "a block's that does not run";
    if (slot < launch_state.blocks.size()) {
      const Block& other = *launch_state.blocks[slot];
      whose = other.cluster != fiber.block->cluster ? "another cluster's"
              : other.live == 0                     ? "an exited block's"
                                                    : "another block's";
    }
  }
  bad_address(address, bytes, write, pc, "out of bounds",
              "byte " + std::to_string(in_slot) + " of " + whose + " shared memory, which has " +
                  std::to_string(launch_state.shared_bytes) + " bytes");
}

bool may_access_shared(uint64_t offset, uint64_t bytes) {
  const uint64_t slot = (offset - kGlobalBytes) / kSlotBytes;
  const uint64_t in_slot = (offset - kGlobalBytes) % kSlotBytes - kSlotStart;
  if (in_slot >= launch_state.shared_bytes || bytes > launch_state.shared_bytes - in_slot) return false;
  const Block& own = *launch_state.current->block;
  if (slot == own.slot) return true;
  if (slot >= launch_state.blocks.size()) return false;
  const Block& other = *launch_state.blocks[slot];
  return other.cluster == own.cluster && other.live > 0;
}

constexpr uint64_t kNoCells = ~uint64_t{0};

// The address's offset in the arena; kNoCells where all is well and there is nothing to keep. bytes <= 16.
inline uint64_t place(const void* address, uint64_t bytes, bool write, const void* pc) {
  if (inside(address, bytes, launch_state.current->stack, kStackBytes)) return kNoCells;
  const uint64_t offset = arena_offset(address);
  if (offset < kGlobalBytes) {
    if (global_is_valid(offset, bytes)) return offset;
    bad_address(address, bytes, write, pc, "out of bounds", describe_global(address));
  }
  if (offset < kArenaBytes) {
    if (may_access_shared(offset, bytes)) return offset;
    bad_shared(address, bytes, write, pc);
  }
  if (!write && (inside(address, bytes, launch_state.arguments.data, launch_state.arguments.bytes) ||
                 inside(address, bytes, image.first, static_cast<uint64_t>(image.end - image.first)))) {
    return kNoCells;
  }
  bad_address(address, bytes, write, pc, "not device memory",
              "neither global memory, nor shared, nor the thread's own");
}

inline void access(const void* address, uint64_t bytes, bool write, bool strong, const void* pc) {
  const uint64_t offset = place(address, bytes, write, pc);
  if (offset == kNoCells) return;
  const bool shared = offset >= kGlobalBytes;
  const Fiber* fiber = launch_state.current;
  check_cells(offset, bytes, write,
              Actor{fiber->epoch | (strong ? kStrong : 0), fiber->id, &fiber->known,
                    shared ? launch_state.batch_base : launch_state.base, shared, pc});
}

inline void seen_by_compiler(const void* address, uint64_t bytes, bool write, bool strong, const void* pc) {
  if (!in_kernel) return;
  if (inside(address, bytes, launch_state.current->stack, kStackBytes)) return;
  const bool polls = strong && !write;
  polls ? poll() : yield_sometimes();
  if (write) progress();
  for (uint64_t done = 0; done < bytes; done += 16) {
    access(static_cast<const char*>(address) + done, std::min<uint64_t>(bytes - done, 16), write, strong, pc);
  }
  if (polls) {
    uint64_t bits = 0;
    memcpy(&bits, address, std::min<uint64_t>(bytes, 8));
    saw(address, bits);
  }
}

}  // namespace

uint32_t short_pc(const void* pc) {
  return static_cast<uint32_t>(static_cast<const char*>(pc) - image.first);
}
const void* long_pc(uint32_t pc) { return image.first + pc; }

void check_bounds(const void* address, uint64_t bytes, bool write, const void* pc) {
  place(address, bytes, write, pc);
}

void check_access(const void* address, uint64_t bytes, bool write, bool strong, const void* pc) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    char text[120];
    snprintf(text, sizeof text, "misaligned: %s %llu bytes at %p", write ? "writes" : "reads",
             (unsigned long long)bytes, address);
    fail(cudaErrorMisalignedAddress, text, pc);
  }
  access(address, bytes, write, strong, pc);
}

}  // namespace frnn_emulation

using frnn_emulation::in_kernel;
using frnn_emulation::seen_by_compiler;

#define CALLBACK extern "C" __attribute__((visibility("hidden")))
#define ACCESS(bytes)                                                                                     \
  CALLBACK void __tsan_read##bytes(void* p) { seen_by_compiler(p, bytes, false, false, CALLER); }         \
  CALLBACK void __tsan_write##bytes(void* p) { seen_by_compiler(p, bytes, true, false, CALLER); }         \
  CALLBACK void __tsan_volatile_read##bytes(void* p) { seen_by_compiler(p, bytes, false, true, CALLER); } \
  CALLBACK void __tsan_volatile_write##bytes(void* p) { seen_by_compiler(p, bytes, true, true, CALLER); }
#define UNALIGNED(bytes)                                                                                    \
  CALLBACK void __tsan_unaligned_read##bytes(void* p) { seen_by_compiler(p, bytes, false, false, CALLER); } \
  CALLBACK void __tsan_unaligned_write##bytes(void* p) { seen_by_compiler(p, bytes, true, false, CALLER); } \
  CALLBACK void __tsan_unaligned_volatile_read##bytes(void* p) {                                            \
    seen_by_compiler(p, bytes, false, true, CALLER);                                                        \
  }                                                                                                         \
  CALLBACK void __tsan_unaligned_volatile_write##bytes(void* p) {                                           \
    seen_by_compiler(p, bytes, true, true, CALLER);                                                         \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)

CALLBACK void __tsan_read_range(void* p, size_t bytes) { seen_by_compiler(p, bytes, false, false, CALLER); }
CALLBACK void __tsan_write_range(void* p, size_t bytes) { seen_by_compiler(p, bytes, true, false, CALLER); }
CALLBACK void __tsan_vptr_read(void**) {}
CALLBACK void __tsan_vptr_update(void**, void*) {}
CALLBACK void __tsan_func_entry(void*) {}
CALLBACK void __tsan_func_exit() {}
CALLBACK void __tsan_init() {}

// Host code only: the guard of a static variable, a mutex. Kernels have CUDA's atomics, and those of ptx.cuh.
#define ATOMIC(bits, T)                                                                                    \
  static void refuse##bits() {                                                                             \
    if (in_kernel) frnn_emulation::trap("a C++ atomic: use atomicAdd and such, or ptx.cuh");               \
  }                                                                                                        \
  CALLBACK T __tsan_atomic##bits##_load(const volatile T* p, int) {                                        \
    refuse##bits();                                                                                        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                        \
  CALLBACK void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                                     \
    refuse##bits();                                                                                        \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                        \
  CALLBACK T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                     \
    refuse##bits();                                                                                        \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                        \
  CALLBACK T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                    \
    refuse##bits();                                                                                        \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  CALLBACK T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                    \
    refuse##bits();                                                                                        \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  CALLBACK bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) { \
    refuse##bits();                                                                                        \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                        \
  CALLBACK bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {   \
    refuse##bits();                                                                                        \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

// As gcc and clang lay it out for -fsanitize=alignment.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
CALLBACK void __ubsan_handle_type_mismatch_v1(TypeMismatch* what, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << what->log_alignment;
  if (!in_kernel || address % alignment == 0) return;
  char text[160];
  snprintf(text, sizeof text, "misaligned: an access that must be at a multiple of %llu bytes, at %p",
           (unsigned long long)alignment, reinterpret_cast<void*>(address));
  frnn_emulation::fail(cudaErrorMisalignedAddress, text, CALLER);
}
CALLBACK void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* what, uintptr_t address) {
  __ubsan_handle_type_mismatch_v1(what, address);
}
