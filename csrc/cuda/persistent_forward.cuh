// The forward pass of a layer in one launch; see persistent.h for what it computes and how it is cut.
#pragma once

#include "persistent.cuh"

namespace frnn {

// The pairs of units that a thread finishes: what it keeps of them from step to step, and their memory.
template <class Cell, class T, int kGroups>
class ForwardPairs : public SeatPairs<kGroups> {
  using Base = SeatPairs<kGroups>;
  using Base::takes_part, Base::state_at, Base::tile_at, Base::pair_at, Base::replica_, Base::seat_;

 public:
  using Base::exists;
  static constexpr int G = Cell::kGates;
  static constexpr int kAhead = steps_ahead(kGroups);
  using Inputs = Ahead<float, G, kAhead>;  // gates_x
  using Number = CellNumber<T>;

  // What a step leaves for the backward pass.
  struct Saved {
    StoredPair<T> of[Cell::kSaved + 1];  // an array cannot be empty
  };

  // biases: [G + 1][units of the block] of shared memory, to be read after a barrier.
  __device__ __forceinline__ ForwardPairs(const PersistentForward<T>& args, const Replica& replica,
                                          const Seat<kGroups>& seat, const Inputs& inputs, float* biases,
                                          bool whole)
      : Base(replica, seat), args_(args), p_(args.direction[replica.direction]), inputs_(inputs),
        whole_(whole), biases_(biases + seat.unit - replica.rank * kTileUnits<kGroups>) {
    if (seat.k_group == 0 && seat.lane % 4 == 0) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const float2 input = numbers_or_zero(p_.b_ih, g * replica.H + seat.unit);
        const float2 hidden = numbers_or_zero(p_.b_hh, g * replica.H + seat.unit);
        *bias(g) = g == kSplitGate ? input : float2{input.x + hidden.x, input.y + hidden.y};
        if (g == kSplitGate) *bias(G) = hidden;
      }
    }
    const Place before = args.first > 0 ? place(args, replica.direction, args.first - 1) : Place{0, 0};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      h_[i] = StoredPair<T>(0, 0);
      c_[i][0] = c_[i][1] = 0;
      if (!exists(i)) continue;
      const int row = replica.first_row + seat.row(i);
      const float2 h = row < before.rows
                           ? numbers_or_zero(p_.output, (before.first + row) * p_.output_stride + seat.unit)
                           : numbers_or_zero(p_.h0, state_at(i));
      h_[i] = StoredPair<T>(h.x, h.y);
      if constexpr (Cell::kHasCellState) {
        const float2 c =
            args.first > 0 ? numbers_or_zero(p_.c, state_at(i)) : numbers_or_zero(p_.c0, state_at(i));
        c_[i][0] = c.x, c_[i][1] = c.y;
      }
    }
  }

  // Asks for what the step at `place` reads.
  __device__ __forceinline__ void ask(unsigned round, const Place& place, bool (&reset)[kPairs]) const {
    whole_ ? ask<true>(round, place) : ask<false>(round, place);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) reset[i] = false;
    if (!p_.reset) return;
    const bool* first = p_.reset + place.first + replica_.first_row;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (takes_part(i, place)) reset[i] = first[seat_.row(i)];
  }

  // Makes the state before the step zero, where that is asked for: the sums over it as well.
  __device__ __forceinline__ void reset(int i, bool reset, float (&sums)[G][2]) {
    if (!reset) return;
#pragma unroll
    for (int g = 0; g < G; ++g) sums[g][0] = sums[g][1] = 0;
    h_[i] = StoredPair<T>(0, 0);
    if constexpr (Cell::kHasCellState) c_[i][0] = c_[i][1] = 0;
  }

  // Pair i in one step, from its sums over h_{t-1}. All compute, so that nothing keeps the pairs apart; a row that takes
  // no part keeps its state.
  __device__ __forceinline__ void step(int i, unsigned round, const Place& now, const float (&sums)[G][2],
                                       Saved& saved) {
    float2 x[G], biases[G + 1];
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] = inputs_.get(round, g, i);
#pragma unroll
    for (int g = 0; g < G + (kSplitGate >= 0); ++g) biases[g] = *bias(g);
    const float2 h_before = h_[i].numbers();
    float h_new[2], c_new[2], saved_new[Cell::kSaved + 1][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Number unit_x[G], unit_h[G], unit_saved[Cell::kSaved + 1];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float of_h = sums[g][k];
        if (g == kSplitGate) of_h += k == 0 ? biases[G].x : biases[G].y;
        unit_x[g] = Number(k == 0 ? x[g].x + biases[g].x : x[g].y + biases[g].y);
        unit_h[g] = Number(of_h);
      }
      Number c(Cell::kHasCellState ? c_[i][k] : 0.0f);
      const Number h(k == 0 ? h_before.x : h_before.y);
      h_new[k] = Cell::step(unit_x, unit_h, h, c, unit_saved).value;
      c_new[k] = c.value;
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s) saved_new[s][k] = unit_saved[s].value;
    }
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) saved.of[s] = StoredPair<T>(saved_new[s][0], saved_new[s][1]);
    if (!takes_part(i, now)) return;
    h_[i] = StoredPair<T>(h_new[0], h_new[1]);
    if constexpr (Cell::kHasCellState) c_[i][0] = c_new[0], c_[i][1] = c_new[1];
  }

  __device__ __forceinline__ void store(const Place& now, const Saved (&saved)[kPairs]) const {
    whole_ ? store<true>(now, saved) : store<false>(now, saved);
  }

  // After the last step of the launch.
  __device__ __forceinline__ void store_state() const { whole_ ? store_state<true>() : store_state<false>(); }

  __device__ __forceinline__ const StoredPair<T>& h(int i) const { return h_[i]; }

 private:
  // The gate whose two sides are not simply added (csrc/cells/gru.h), so that its biases are not either.
  static constexpr int kSplitGate = Cell::kGateGrads > G ? G - 1 : -1;

  __device__ __forceinline__ float2* bias(int g) const {
    return reinterpret_cast<float2*>(biases_ + g * kTileUnits<kGroups>);
  }
  template <class S>
  __device__ __forceinline__ float2 numbers_or_zero(const S* from, int64_t offset) const {
    if (!from || seat_.unit >= replica_.H) return {0, 0};
    return (whole_ ? load_pair<true>(from + offset, true) : load_pair<false>(from + offset, seat_.both))
        .numbers();
  }

  template <bool kWhole>
  __device__ __forceinline__ void ask(unsigned round, const Place& place) const {
    const int H = replica_.H;
    const float* first = p_.gates_x + tile_at(place, G * H) - p_.gates_x_first * (G * H);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!takes_part(i, place)) continue;
#pragma unroll
      for (int g = 0; g < G; ++g)
        copy_pair<kWhole>(inputs_.at(round, g, i), first + pair_at(i, G * H) + g * H, seat_.both);
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void store(const Place& now, const Saved (&saved)[kPairs]) const {
    const int H = replica_.H, stride = static_cast<int>(p_.output_stride);
    T* first_output = p_.output + tile_at(now, stride);
    T* first_saved = p_.saved + tile_at(now, Cell::kSaved * H);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!takes_part(i, now)) continue;
      store_pair<kWhole>(first_output + pair_at(i, stride), h_[i], seat_.both);
      if (!p_.saved) continue;
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s)
        store_pair<kWhole>(first_saved + pair_at(i, Cell::kSaved * H) + s * H, saved[i].of[s], seat_.both);
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void store_state() const {
    const Place first = place(args_, replica_.direction, args_.first);
    const Place last = place(args_, replica_.direction, args_.last - 1);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!exists(i)) continue;
      if (p_.hn && (takes_part(i, first) || takes_part(i, last)))
        store_pair<kWhole>(p_.hn + state_at(i), h_[i], seat_.both);
      if constexpr (Cell::kHasCellState) {
        if (args_.last < args_.steps)
          store_pair<kWhole>(p_.c + state_at(i), StoredPair<float>(c_[i][0], c_[i][1]), seat_.both);
        else if (p_.cn)
          store_pair<kWhole>(p_.cn + state_at(i), StoredPair<T>(c_[i][0], c_[i][1]), seat_.both);
      }
    }
  }

  const PersistentForward<T>& args_;
  const PersistentForwardDirection<T>& p_;
  const Inputs& inputs_;
  bool whole_;  // pairs are read and written in one access
  float*
      biases_;  // of the pair: a gate's two added up; of kSplitGate that of the input, and as gate G the other
  StoredPair<T> h_[kPairs];
  float c_[kPairs][2];  // of cells that have one
};

// The state of all rows of the replica before the first step of the launch.
template <class T>
__device__ __forceinline__ void load_initial(T* to, const Replica& replica,
                                             const PersistentForward<T>& args) {
  const PersistentForwardDirection<T>& p = args.direction[replica.direction];
  const Place before = args.first > 0 ? place(args, replica.direction, args.first - 1) : Place{0, 0};
  for (int b = 0; b < replica.rows; ++b) {
    const int row = replica.first_row + b;
    const T* from = row < before.rows ? p.output + (before.first + row) * p.output_stride
                    : p.h0            ? p.h0 + int64_t{row} * replica.H
                                      : nullptr;
    for (int k = threadIdx.x; k < replica.H && from; k += kTileThreads)
      to[b * replica.row + k] = as_multiplied(from[k]);
  }
}

template <class Cell, class T, int kGroups, Exchange kExchange>
__global__ void __launch_bounds__(kBlockThreads<T, kGroups, kExchange>, 1)
    persistent_forward_kernel(const PersistentForward<T> args, const int columns, const int row,
                              const bool whole) {
  if constexpr (!kHasKernel<T, kGroups, kExchange>) {
    __trap();
  } else {
    constexpr int G = Cell::kGates;
    using Weights = WeightFragments<T, G, false>;
    using Pairs = ForwardPairs<Cell, T, kGroups>;
    const Replica replica = replica_of_block<kGroups, kExchange>(args, columns, row);
    const Seat<kGroups> seat(replica, Weights::kPiece);
    // First: on their way they need room, in registers and in shared memory.
    Weights weights;
    weights.load(args.direction[replica.direction].w_hh, replica.H, seat.first_unit, seat.first_k,
                 seat.pieces, whole, shared_memory<unsigned char>());
    __syncthreads();

    SharedRoom room;
    StateExchange<kExchange, T, 1, kGroups> exchange(
        replica, take_exchange<T, 1, kGroups, kExchange>(room, replica, args.exchange, args.gave_up, args.B));
    load_initial(exchange.initial(), replica, args);
    const Reduction<kGroups, G> reduction(room.take<float2>(Reduction<kGroups, G>::size(columns)),
                                          seat.unit_group, seat.k_group);
    const typename Pairs::Inputs inputs(room.take<float>(Pairs::Inputs::kNumbers));
    Pairs pairs(args, replica, seat, inputs, room.take<float>((G + 1) * kTileUnits<kGroups>), whole);

    // Of this step, [0], and those whose inputs are under way.
    Place places[Pairs::kAhead + 1];
    bool reset[Pairs::kAhead][kPairs];
    const unsigned first = static_cast<unsigned>(args.first), last = static_cast<unsigned>(args.last);
#pragma unroll
    for (int i = 0; i < Pairs::kAhead; ++i) {
      if (first + i < last) {
        places[i] = place(args, replica.direction, first + i);
        pairs.ask((first + i) % Pairs::kAhead, places[i], reset[i]);
      }
      Pairs::Inputs::end_round();
    }
    for (unsigned order = first; order < last; ++order) {
      if (order + Pairs::kAhead < last)
        places[Pairs::kAhead] = place(args, replica.direction, order + Pairs::kAhead);
      const T* state = order == first ? exchange.start() : exchange.receive();
      state = Weights::first(state + seat.first_k, row);
      float sums[G][4];
      for (int column = 0; column < columns; ++column) {
#pragma unroll
        for (int g = 0; g < G; ++g) sums[g][0] = sums[g][1] = sums[g][2] = sums[g][3] = 0;
        if (seat.first_unit < replica.H)
          weights.multiply_by(sums, state + column * 8 * row, row, 0, seat.pieces, replica.rows - column * 8);
        if constexpr (kGroups == 1) break;  // most_columns
        reduction.put(column, sums);
      }
      if constexpr (kGroups > 1) __syncthreads();

      Pairs::Inputs::wait();
      typename Pairs::Saved saved[kPairs];
      // Around both pairs: with a test for each the compiler has them wait for every exponential before the next.
      if (seat.first_unit < replica.H) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (!pairs.any(i)) continue;
          float whole_sums[G][2];
          if constexpr (kGroups == 1) {
#pragma unroll
            for (int g = 0; g < G; ++g) whole_sums[g][0] = sums[g][i], whole_sums[g][1] = sums[g][i + 2];
          } else {
            reduction.take(seat.pair(i), whole_sums);
          }
          pairs.reset(i, reset[0][i], whole_sums);
          pairs.step(i, order % Pairs::kAhead, places[0], whole_sums, saved[i]);
        }
      }
      if (order + 1 < last) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          if (pairs.exists(i)) exchange.put(0, seat.row(i), seat.unit, pairs.h(i));
        exchange.send(order + 2 < last);
      }
      // The others wait for what was sent. The rest has time until they have answered.
      pairs.store(places[0], saved);
#pragma unroll
      for (int i = 0; i < Pairs::kAhead; ++i) places[i] = places[i + 1];
#pragma unroll
      for (int i = 0; i + 1 < Pairs::kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) reset[i][j] = reset[i + 1][j];
      if (order + Pairs::kAhead < last)
        pairs.ask(order % Pairs::kAhead, places[Pairs::kAhead - 1], reset[Pairs::kAhead - 1]);
      Pairs::Inputs::end_round();
    }
    pairs.store_state();
    exchange.finish();
  }
}

// ---- Host ------------------------------------------------------------------------------------------------------------

template <class T>
bool in_pairs(const PersistentForward<T>& args) {
  bool all = args.H % 2 == 0;
  for (const PersistentForwardDirection<T>& p : args.direction)
    all = all && aligned<2>(p.gates_x) && aligned<2>(p.w_hh) && aligned<2>(p.b_ih) && aligned<2>(p.b_hh) &&
          aligned<2>(p.h0) && aligned<2>(p.c0) && aligned<2>(p.hn) && aligned<2>(p.cn) && aligned<2>(p.c) &&
          aligned<2>(p.output, p.output_stride) && aligned<2>(p.saved);
  return all;
}

template <class T>
const char* persistent_forward(CellKind kind, const Tile& tile, const PersistentForward<T>& args,
                               void* stream) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return with_tile<T>(tile, [&](auto k_groups, auto exchange) {
      return launch_persistent(&persistent_forward_kernel<Cell, T, k_groups, exchange>, Pass::forward,
                               Cell::kGates, sizeof(T), tile, args, in_pairs(args), stream);
    });
  });
}

template <class T>
const char* persistent_forward_residents(CellKind kind, const Tile& tile, int64_t H, int64_t* replicas) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return with_tile<T>(tile, [&](auto k_groups, auto exchange) {
      return residents(&persistent_forward_kernel<Cell, T, k_groups, exchange>, tile,
                       shape_of(Pass::forward, Cell::kGates, sizeof(T), tile, 1, H, 1), replicas);
    });
  });
}

}  // namespace frnn

// Everything that a .cu file of this pass holds.
#define FRNN_INSTANTIATE_PERSISTENT_FORWARD(T)                                                         \
  template const char* frnn::persistent_forward<T>(CellKind, const Tile&, const PersistentForward<T>&, \
                                                   void*);                                             \
  template const char* frnn::persistent_forward_residents<T>(CellKind, const Tile&, int64_t, int64_t*);
