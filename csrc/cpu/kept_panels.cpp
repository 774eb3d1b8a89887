// See kept_panels.h.
#include "kept_panels.h"

#include <mutex>

namespace frnn {
namespace {

bool same(const PanelsKey& a, const PanelsKey& b) {
  return a.weights == b.weights && a.layout == b.layout && a.units == b.units && a.K == b.K &&
         a.parts == b.parts;
}

class Store {
 public:
  // None if there is none, or if another thread is at it: a call is not to wait, and after a fork nobody would come.
  ScratchBlock take(const PanelsKey& key) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return {nullptr, 0};
    ++takes_;
    for (int i = 0; i < count_; ++i)
      if (same(entries_[i].key, key)) return remove(i);
    return {nullptr, 0};
  }

  // drop(block) gets what there is no place for: this block, or those that made room for it.
  template <class Drop>
  void keep(const PanelsKey& key, ScratchBlock memory, Drop&& drop) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || memory.bytes > kKeptPanels) return drop(memory);
    for (int i = 0; i < count_; ++i)
      if (same(entries_[i].key, key)) return drop(memory);
    while (count_ == kMost || bytes_ + memory.bytes > kKeptPanels) {
      // The oldest makes room only if it is out of use. Otherwise layers that come in turn, larger together than the
      // bound, would each drive out the next one.
      int oldest = 0;
      for (int i = 1; i < count_; ++i)
        if (entries_[i].kept_at < entries_[oldest].kept_at) oldest = i;
      if (takes_ - entries_[oldest].kept_at < kPatience) return drop(memory);
      drop(remove(oldest));
    }
    entries_[count_++] = {key, memory, takes_};
    bytes_ += memory.bytes;
  }

 private:
  static constexpr int kMost = 128;
  static constexpr uint64_t kPatience = 4 * kMost;  // takes of any block

  struct Entry {
    PanelsKey key;
    ScratchBlock memory;
    uint64_t kept_at;
  };

  ScratchBlock remove(int i) noexcept {
    const ScratchBlock memory = entries_[i].memory;
    bytes_ -= memory.bytes;
    entries_[i] = entries_[--count_];
    return memory;
  }

  std::mutex mutex_;
  Entry entries_[kMost];
  int count_ = 0;
  size_t bytes_ = 0;
  uint64_t takes_ = 0;
};

// Never destroyed: threads may still run while a process ends.
Store& store() {
  static Store* const store = new Store;
  return *store;
}

}  // namespace

PanelsBlock take_panels(const PanelsKey& key, size_t bytes) {
  const ScratchBlock found = store().take(key);
  if (found.data) return {found, true};
  return {take_scratch(bytes), false};
}

void keep_panels(const PanelsKey& key, ScratchBlock memory) noexcept {
  store().keep(key, memory, [](ScratchBlock block) { keep_scratch(block); });
}

}  // namespace frnn
