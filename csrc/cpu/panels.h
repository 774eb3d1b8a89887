// The panels that a weight matrix is packed in: memory of one call, or kept for the next with a digest of each panel.
#pragma once

#include "kept_panels.h"
#include "schedule.h"

namespace frnn {
inline namespace FRNN_ISA {

// What becomes of packed weights: not packed at all but read as they lie, packed for this call, packed to be kept.
enum class Packing { none, once, kept };

// Without AVX2 a multiplication of integers takes so many instructions that packing costs no more than a digest.
constexpr bool kDigestPays = FRNN_VECTOR_BYTES > 16;

// Of numbers in memory, in lanes of 32 bits, which take a word each in turn as xxHash32's do (Collet, "xxHash fast digest
// algorithm"). A single changed word always shows. Of other changes one in 2^32 does not if one lane has them all, and
// hardly any if several lanes have.
class Digest {
 public:
  Digest() {
    for (int i = 0; i < kStates; ++i)
      for (int lane = 0; lane < kLanes; ++lane) state_[i][lane] = (i * kLanes + lane + 1) * kMultiply;
  }

  void add(const void* from, int64_t bytes) {
    const char* p = static_cast<const char*>(from);
    Words state[kStates];
    memcpy(state, state_, sizeof state);
    for (; bytes >= kBlock; bytes -= kBlock, p += kBlock)
#pragma GCC unroll 8
      for (int i = 0; i < kStates; ++i) mix(state[i], words(p + i * kVector, kVector));
    for (int i = 0; bytes > 0; ++i, bytes -= kVector, p += kVector)
      mix(state[i], words(p, bytes < kVector ? bytes : kVector));
    memcpy(state_, state, sizeof state);
  }

  uint64_t value() const {
    Words state[kStates];
    memcpy(state, state_, sizeof state);
    for (int half = kStates / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) mix(state[i], state[i + half]);
    uint64_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      all = (all ^ state[0][lane]) * 0x9e3779b97f4a7c15;  // 2^64 divided by the golden ratio
      all ^= all >> 29;
    }
    return all;
  }

 private:
  typedef uint32_t Words __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  static constexpr int kStates = 8;  // side by side: two multiplications have up to 20 cycles of latency
  static constexpr int kVector = FRNN_VECTOR_BYTES, kBlock = kStates * kVector, kLanes = kVector / 4;
  static constexpr uint32_t kMultiply = 2654435761, kMultiplyWord = 2246822519;  // xxHash32's primes

  static FRNN_HD Words words(const char* p, int64_t bytes) {
    Words w{};
    if (bytes == kVector)
      memcpy(&w, p, kVector);
    else
      memcpy(&w, p, static_cast<size_t>(bytes));
    return w;
  }
  // The rotation brings the bits down that a multiplication would move out.
  static FRNN_HD void mix(Words& state, const Words& word) {
    state += word * kMultiplyWord;
    state = (state << 13 | state >> 19) * kMultiply;
  }

  Words state_[kStates];
};

template <class T>
class Panels {
 public:
  // None without `count`.
  Panels(const PanelsKey& key, int64_t count, int64_t size, bool kept)
      : key_(key), records_(divide_up(count * static_cast<int64_t>(sizeof(Record)), 64) * 64), size_(size),
        kept_(kept) {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(records_ + count * size * static_cast<int64_t>(sizeof(T)));
    const PanelsBlock block = kept ? take_panels(key_, bytes) : PanelsBlock{take_scratch(bytes), false};
    memory_ = block.memory;
    if (!block.known) memset(memory_.data, 0, records_);
  }
  ~Panels() {
    if (!memory_.data) return;
    kept_ ? keep_panels(key_, memory_) : keep_scratch(memory_);
  }
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;

  T* at(int64_t panel) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.data) + records_) + panel * size_;
  }
  // What pack() returned.
  bool note(int64_t panel) const { return record(panel).note; }

  // bool pack(T*) packs this panel from what digest() is of, unless it holds just that.
  template <class GetDigest, class Pack>
  void renew(int64_t panel, GetDigest&& digest, Pack&& pack) const {
    Record& was = record(panel);
    if (!kept_) {
      was.note = pack(at(panel));
      return;
    }
    const uint64_t now = digest();
    if (was.packed && was.digest == now) return;
    was = {now, true, pack(at(panel))};
  }

 private:
  struct Record {
    uint64_t digest;
    bool packed, note;
  };
  Record& record(int64_t panel) const { return static_cast<Record*>(memory_.data)[panel]; }

  const PanelsKey key_;
  const int64_t records_;  // bytes
  const int64_t size_;     // numbers of a panel
  const bool kept_;
  ScratchBlock memory_{nullptr, 0};
};

}  // namespace FRNN_ISA
}  // namespace frnn
