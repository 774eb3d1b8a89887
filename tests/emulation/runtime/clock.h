// Vector clocks: what a thread knows of the others. Thread a has seen everything that thread b did up to b's time t
// when a's clock says t, or later, at b. Most threads of a launch know nearly the same, so a clock is a tree (blocks,
// warps, lanes) whose parts are shared until they change.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace frnn_emulation {

// Threads are numbered block * 1024 + thread of the block.
constexpr uint32_t kThreadsOfBlock = 1024;
constexpr uint32_t kLanes = 32;

// A counted pointer to something that is copied before it is changed while others hold it.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(const Shared& other) : value_(other.value_) {
    if (value_) ++value_->references;
  }
  Shared(Shared&& other) noexcept : value_(std::exchange(other.value_, nullptr)) {}
  Shared& operator=(Shared other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Shared() {
    if (value_ && --value_->references == 0) delete value_;
  }
  const T* get() const { return value_; }
  const T* operator->() const { return value_; }
  T& change() {
    if (!value_) {
      value_ = new T;
    } else if (value_->references > 1) {
      --value_->references;
      T* copy = new T(*value_);
      copy->references = 1;
      value_ = copy;
    }
    return *value_;
  }

 private:
  T* value_ = nullptr;
};

class Clock {
 public:
  // 0: nothing is known of the thread.
  uint32_t at(uint32_t thread) const {
    const WarpClock* warp = warp_of(thread);
    return warp ? warp->lanes[thread % kLanes] : 0;
  }
  // Of the lanes of a warp (the thread's) those of which less is known than their time `time`.
  uint32_t behind(uint32_t thread, uint32_t lanes, uint32_t time) const;
  void set(uint32_t thread, uint32_t time);
  void join(const Clock& other);
  bool same(const Clock& other) const { return known_.get() == other.known_.get(); }
  bool empty() const { return !known_.get(); }

 private:
  struct WarpClock {
    unsigned references = 1;
    std::array<uint32_t, kLanes> lanes{};
  };
  struct BlockClock {
    unsigned references = 1;
    std::array<Shared<WarpClock>, kThreadsOfBlock / kLanes> warps;
  };
  struct Known {
    unsigned references = 1;
    std::vector<std::pair<uint32_t, Shared<BlockClock>>> blocks;  // by block
  };
  const WarpClock* warp_of(uint32_t thread) const {
    if (!known_.get()) return nullptr;
    for (const auto& [block, clock] : known_->blocks) {
      if (block == thread / kThreadsOfBlock) return clock->warps[thread / kLanes % kLanes].get();
    }
    return nullptr;
  }
  static void join(Shared<WarpClock>& into, const Shared<WarpClock>& other);
  static void join(Shared<BlockClock>& into, const Shared<BlockClock>& other);

  Shared<Known> known_;
};

// What a thread knows of the others' accesses; of some, only of their reads, which is enough to overwrite what they read.
class Knowledge {
 public:
  bool knows(uint32_t thread, uint32_t time) const { return all_.at(thread) >= time; }
  // Of the lanes of a warp those whose accesses, or reads, until `time` are not known.
  uint32_t behind(uint32_t thread, uint32_t lanes, uint32_t time) const {
    return all_.behind(thread, lanes, time);
  }
  uint32_t behind_reads(uint32_t thread, uint32_t lanes, uint32_t time) const {
    lanes = all_.behind(thread, lanes, time);
    return lanes ? reads_.behind(thread, lanes, time) : 0;
  }
  void set(uint32_t thread, uint32_t time) { all_.set(thread, time); }
  void join(const Knowledge& other) {
    all_.join(other.all_);
    reads_.join(other.reads_);
  }
  void join_reads(const Knowledge& other) {
    reads_.join(other.all_);
    reads_.join(other.reads_);
  }
  bool same(const Knowledge& other) const { return all_.same(other.all_) && reads_.same(other.reads_); }
  bool empty() const { return all_.empty() && reads_.empty(); }

 private:
  Clock all_, reads_;
};

}  // namespace frnn_emulation
