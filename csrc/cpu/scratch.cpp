// See scratch.h.
#include "scratch.h"

#include <algorithm>
#include <new>

#include "../huge_pages.h"

// Under AddressSanitizer nothing may touch a kept block, nor of one in use more than was asked for.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) static_cast<void>(0)
#endif

namespace frnn {
namespace {

constexpr std::align_val_t kLine{64};

// The blocks that a thread keeps, the last one that it was given first.
class Kept {
 public:
  ~Kept() {
    while (count_ > 0) drop_last();
  }

  // The smallest that is large enough, or none.
  ScratchBlock take(size_t bytes) noexcept {
    int best = -1;
    for (int i = 0; i < count_; ++i)
      if (blocks_[i].bytes >= bytes && (best < 0 || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    if (best < 0) return {nullptr, 0};
    const ScratchBlock found = blocks_[best];
    std::copy(blocks_ + best + 1, blocks_ + count_, blocks_ + best);
    --count_;
    bytes_ -= found.bytes;
    ASAN_UNPOISON_MEMORY_REGION(found.data, bytes);
    return found;
  }

  void keep(ScratchBlock block) noexcept {
    if (block.bytes > kKeptScratch) return ::operator delete(block.data, kLine);
    if (count_ == kMost) drop_last();
    ASAN_POISON_MEMORY_REGION(block.data, block.bytes);
    std::copy_backward(blocks_, blocks_ + count_, blocks_ + count_ + 1);
    blocks_[0] = block;
    ++count_;
    bytes_ += block.bytes;
    while (bytes_ > kKeptScratch) drop_last();
  }

 private:
  // A scan has up to seven: weights and states of two directions, and the blocks of a sum over rows.
  static constexpr int kMost = 8;

  void drop_last() noexcept {
    const ScratchBlock last = blocks_[--count_];
    bytes_ -= last.bytes;
    ASAN_UNPOISON_MEMORY_REGION(last.data, last.bytes);
    ::operator delete(last.data, kLine);
  }

  ScratchBlock blocks_[kMost];
  int count_ = 0;
  size_t bytes_ = 0;
};

thread_local Kept kept;

}  // namespace

ScratchBlock take_scratch(size_t bytes) {
  const ScratchBlock found = kept.take(bytes);
  if (found.data) return found;
  const ScratchBlock made{::operator new(bytes, kLine), bytes};
  ask_for_huge_pages(made.data, bytes);
  return made;
}

void keep_scratch(ScratchBlock block) noexcept { kept.keep(block); }

}  // namespace frnn
