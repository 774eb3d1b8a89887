// A weight matrix as the products of one scan see it: in panels of units, packed or as it lies.
#pragma once

#include "panels.h"

namespace frnn {
inline namespace FRNN_ISA {

// Memory of one call, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : block_(count > 0 ? take_scratch(static_cast<size_t>(count) * sizeof(T)) : ScratchBlock{nullptr, 0}) {}
  ~Buffer() {
    if (block_.data) keep_scratch(block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  ScratchBlock block_;
};

// `again`: whether the same weights are likely to come in another call.
FRNN_HD Packing packing_of(const CpuPlan& plan, bool again) {
  return plan.direct ? Packing::none : again && kDigestPays ? Packing::kept : Packing::once;
}

// Of the numbers that a panel is packed from: of each gate those of `count` units from `first` on.
template <int kGates, class T>
uint64_t digest_of_units(const T* weights, int64_t units, int64_t K, int64_t first, int64_t count) {
  Digest digest;
  const int64_t bytes = smallest(count, units - first) * K * static_cast<int64_t>(sizeof(T));
  for (int g = 0; g < kGates; ++g) digest.add(weights + (g * units + first) * K, bytes);
  return digest.value();
}

// [kGates * units, K], multiplied by rows of length K: a value for each gate of each unit. Torch's weight_hh.
template <class T, int kGates, int kVectors>
class GateWeights {
 public:
  static constexpr int kUnits = kVectors * Vec<Accumulate<T>>::kSize;  // of a panel
  static constexpr int kLanes = kGates * kVectors;

  GateWeights(const T* weights, int64_t units, int64_t K, Packing packing)
      : weights_(weights), units_(units), K_(K), direct_(packing == Packing::none),
        panels_({weights, &kLayout, units, K, 1}, direct_ || !weights ? 0 : panels(), panel_size(),
                packing == Packing::kept) {}

  int64_t panels() const { return divide_up(units_, kUnits); }
  void pack(int64_t panel) const {
    if (direct_) return;
    panels_.renew(
        panel, [&] { return digest_of_units<kGates>(weights_, units_, K_, panel * kUnits, kUnits); },
        [&](T* to) {
          pack_rows<kGates, kVectors>(weights_, units_, K_, panel * kUnits, to);
          return true;
        });
  }
  // acc[row][gate][unit of the panel]; `add`: to what is there. pause(): called up to pauses() times on the way.
  template <class Pause = NoPause>
  void multiply(const T* const* a, int rows, int64_t panel, Accumulate<T>* acc, bool add = false,
                Pause&& pause = NoPause()) const {
    if (direct_)
      for (int r = 0; r < rows; r += kMaxTileRows)  // with tiles of AMX there are more
        direct_product<T, kGates, kVectors>(a + r, rows - r < kMaxTileRows ? rows - r : kMaxTileRows, K_,
                                            weights_, units_, panel * kUnits, acc + r * kGates * kUnits, add);
    else
      PackedProduct<T>::template multiply<kLanes>(a, rows, K_, panels_.at(panel), kUnits * kGates * kDepth<T>,
                                                  acc, add, pause);
  }
  int64_t pauses() const { return PackedProduct<T>::pauses(kLanes, K_); }

 private:
  int64_t panel_size() const { return divide_up(K_, kPanelDepth<T>) * kPanelDepth<T> * kUnits * kGates; }
  static constexpr char kLayout = 0;  // its address

  const T* weights_;
  int64_t units_, K_;
  bool direct_;
  Panels<T> panels_;
};

// How a scan multiplies rows by GateWeights. An operand is what a product takes of a tile's rows; this way it is the rows
// as they lie. amx_split.h has another.
template <class S>
struct PlainProducts {
  using Session = typename PackedProduct<S>::Session;
  template <int kGates, int kVectors>
  using Weights = GateWeights<S, kGates, kVectors>;
  using Operand = const S* const*;
  using Part = S;  // of the memory that an operand needs
  static constexpr bool kPauses = PackedProduct<S>::kPauses;

  static constexpr int tile_rows(int lanes) { return PackedProduct<S>::tile_rows(lanes); }
  template <int kGates, int kVectors>
  static Weights<kGates, kVectors> weights(const S* weights, int64_t units, int64_t K, Packing packing) {
    return {weights, units, K, packing};
  }
  static int64_t operand_size(int64_t /*K*/) { return 0; }
  static Operand operand(Part*, const S* const* rows, int /*count*/, int64_t /*K*/) { return rows; }
};

// [K, units], multiplied by rows of length K: the same matrices in the backward pass, which needs them transposed.
// Here the units of a panel are neighbours in memory already, so `direct` only copies the last, incomplete panel.
template <class T, int kVectors>
class ColumnWeights {
 public:
  static constexpr int kUnits = kVectors * Vec<T>::kSize;

  ColumnWeights(const T* weights, int64_t K, int64_t units, bool direct)
      : weights_(weights), K_(K), units_(units), direct_(direct),
        panels_(weights ? (direct ? 1 : panels()) * kUnits * K : 0) {}

  int64_t panels() const { return divide_up(units_, kUnits); }
  void pack(int64_t panel) const {
    if (!in_place(panel)) pack_columns<kVectors>(weights_, units_, units_, K_, panel * kUnits, packed(panel));
  }
  // acc[row][unit of the panel]
  void multiply(const T* const* a, int rows, int64_t panel, T* acc) const {
    multiply(a, rows, 0, K_, panel, acc);
  }
  // The part of the sums from k0 on, of K products: added to acc unless k0 is 0. a: the rows from there on.
  void multiply(const T* const* a, int rows, int64_t k0, int64_t K, int64_t panel, T* acc) const {
    const bool here = in_place(panel);
    const int64_t stride = here ? units_ : kUnits;
    const T* from = here ? weights_ + panel * kUnits : packed(panel);
    packed_product<T, kVectors>(a, rows, K, from + k0 * stride, stride, acc, k0 > 0);
  }

 private:
  bool in_place(int64_t panel) const { return direct_ && (panel + 1) * kUnits <= units_; }
  T* packed(int64_t panel) const { return panels_.get() + (direct_ ? 0 : panel * kUnits * K_); }

  const T* weights_;
  int64_t K_, units_;
  bool direct_;
  Buffer<T> panels_;
};

// Packs a member's panels. Members of other row groups use the same panels, so they share the work and then wait.
template <class Weights>
FRNN_HD void pack_share(const Weights& weights, Range panels, const Member& member, const CpuPlan& plan) {
  for (int64_t p = panels.first + member.row_group; p < panels.last; p += plan.row_groups) weights.pack(p);
}

// The panels of step s, in alternating order: what was used last is still in the cache when the next step begins.
template <class F>
FRNN_HD void each_panel(Range panels, int64_t s, F&& f) {
  for (int64_t i = panels.first; i < panels.last; ++i) f(s % 2 ? panels.first + panels.last - 1 - i : i);
}

}  // namespace FRNN_ISA
}  // namespace frnn
