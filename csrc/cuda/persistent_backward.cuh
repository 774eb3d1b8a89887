// The backward pass of a layer in one launch: from the gradients of its outputs to those of its gates and of its first
// state. The gradients of weights and input are matrix products over all steps, made afterwards; see persistent.h.
#pragma once

#include "persistent.cuh"

namespace frnn {

// The pairs of units that a thread finishes: what it keeps of them from step to step, and their memory.
template <class Cell, class T, int kGroups>
class BackwardPairs : public SeatPairs<kGroups> {
  using Base = SeatPairs<kGroups>;
  using Base::takes_part, Base::state_at, Base::tile_at, Base::pair_at, Base::replica_, Base::seat_;

 public:
  using Base::exists;
  static constexpr int G = Cell::kGates;
  static constexpr int kAhead = steps_ahead(kGroups);
  // Where the inputs of a step lie.
  static constexpr int kOutput = Cell::kSaved, kCell = kOutput + Cell::kGradReadsOutput,
                       kHidden = kCell + Cell::kHasCellState, kGrad = kHidden + 1, kValues = kGrad + 1;
  static_assert(kValues == inputs_of_pair(Pass::backward, G), "tile_shared_bytes counts them");
  using Inputs = Ahead<T, kValues, kAhead>;
  using Number = CellNumber<T>;

  // What a step leaves for the gradients of the weights.
  struct Results {
    StoredPair<T> dgates[Cell::kGateGrads], h_before;
  };

  __device__ __forceinline__ BackwardPairs(const PersistentBackward<T>& args, const Replica& replica,
                                           const Seat<kGroups>& seat, const Inputs& inputs, bool whole)
      : Base(replica, seat), p_(args.direction[replica.direction]), inputs_(inputs), whole_(whole) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      dh_[i] = numbers_or_zero(i, p_.dh);
      if constexpr (Cell::kHasCarry) carry_[i] = numbers_or_zero(i, p_.carry);
    }
  }

  // Asks for what the step at `place` reads; `before`: the step before it in order.
  __device__ __forceinline__ void ask(unsigned round, const Place& place, const Place& before,
                                      bool (&reset)[kPairs]) const {
    whole_ ? ask<true>(round, place, before) : ask<false>(round, place, before);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) reset[i] = false;
    if (!p_.reset) return;
    const bool* first = p_.reset + place.first + replica_.first_row;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (takes_part(i, place)) reset[i] = first[seat_.row(i)];
  }

  // Pair i in one step. All compute, so that nothing keeps the pairs apart; a row that takes no part has gradients of zero.
  __device__ __forceinline__ void step(int i, unsigned round, const Place& now, bool reset,
                                       Results& results) {
    float2 saved[Cell::kSaved + 1], output{}, c{}, carry{};  // an array cannot be empty
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) saved[s] = inputs_.get(round, s, i);
    if constexpr (Cell::kGradReadsOutput) output = inputs_.get(round, kOutput, i);
    if constexpr (Cell::kHasCellState) c = inputs_.get(round, kCell, i);
    if constexpr (Cell::kHasCarry) carry = carry_[i];
    float2 h = inputs_.get(round, kHidden, i);
    const float2 grad = inputs_.get(round, kGrad, i);
    if (reset) c = h = float2{0, 0};
    float dgates[Cell::kGateGrads][2], carry_new[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const auto unit = [k](float2 of) { return Number(k == 0 ? of.x : of.y); };
      Number unit_saved[Cell::kSaved + 1], unit_grads[Cell::kGateGrads], unit_carry = unit(carry);
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s) unit_saved[s] = unit(saved[s]);
      Cell::step_grad(unit_saved, unit(output), unit(h), unit(c), unit(dh_[i]) + unit(grad), unit_carry,
                      unit_grads);
      carry_new[k] = reset ? 0.0f : unit_carry.value;
#pragma unroll
      for (int g = 0; g < Cell::kGateGrads; ++g) dgates[g][k] = unit_grads[g].value;
    }
    const bool part = takes_part(i, now);
#pragma unroll
    for (int g = 0; g < Cell::kGateGrads; ++g)
      results.dgates[g] = StoredPair<T>(part ? dgates[g][0] : 0.0f, part ? dgates[g][1] : 0.0f);
    results.h_before = StoredPair<T>(h.x, h.y);
    if constexpr (Cell::kHasCarry)
      if (part) carry_[i] = float2{carry_new[0], carry_new[1]};
  }

  __device__ __forceinline__ void store(const Place& now, const Results (&results)[kPairs]) const {
    whole_ ? store<true>(now, results) : store<false>(now, results);
  }

  // What reached h_{t-1} through the product. A row that took no part keeps what it had, and nothing passes a reset.
  __device__ __forceinline__ void receive(int i, const Place& now, bool reset, const float (&sums)[2]) {
    if (takes_part(i, now)) dh_[i] = reset ? float2{0, 0} : float2{sums[0], sums[1]};
  }

  // After the last step.
  __device__ __forceinline__ void store_state(bool dh) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!exists(i)) continue;
      if (dh) store_number(p_.dh + state_at(i), dh_[i]);
      if constexpr (Cell::kHasCarry) store_number(p_.carry + state_at(i), carry_[i]);
    }
  }

 private:
  __device__ __forceinline__ float2 numbers_or_zero(int i, const float* from) const {
    if (!exists(i)) return {0, 0};
    from += state_at(i);
    return (whole_ ? load_pair<true>(from, true) : load_pair<false>(from, seat_.both)).numbers();
  }
  __device__ __forceinline__ void store_number(float* to, float2 numbers) const {
    const StoredPair<float> pair(numbers.x, numbers.y);
    whole_ ? store_pair<true>(to, pair, true) : store_pair<false>(to, pair, seat_.both);
  }

  template <bool kWhole>
  __device__ __forceinline__ void ask(unsigned round, const Place& place, const Place& before) const {
    const int H = replica_.H, row = Cell::kSaved * H;
    const int output_stride = static_cast<int>(p_.output_stride),
              grad_stride = static_cast<int>(p_.grad_output_stride);
    const T* saved = p_.saved + tile_at(place, row);
    const T* output = p_.output + tile_at(place, output_stride);
    const T* output_before = p_.output + tile_at(before, output_stride);
    const T* grad = p_.grad_output + tile_at(place, grad_stride);
    const bool wants_hidden = Cell::kReadsPreviousHidden || p_.previous;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!takes_part(i, place)) continue;
      const auto copy = [&](int value, const T* from) {
        copy_pair<kWhole>(inputs_.at(round, value, i), from, seat_.both);
      };
      const auto copy_or_zero = [&](int value, const T* initial) {
        if (initial)
          copy(value, initial + state_at(i));
        else
          store_pair<true>(inputs_.at(round, value, i), StoredPair<T>(0, 0), true);
      };
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s) copy(s, saved + pair_at(i, row) + s * H);
      if constexpr (Cell::kGradReadsOutput) copy(kOutput, output + pair_at(i, output_stride));
      if (takes_part(i, before)) {
        if constexpr (Cell::kHasCellState)
          copy(kCell, p_.saved + tile_at(before, row) + pair_at(i, row) + Cell::kSavedCell * H);
        if (wants_hidden) copy(kHidden, output_before + pair_at(i, output_stride));
      } else {
        if constexpr (Cell::kHasCellState) copy_or_zero(kCell, p_.c0);
        if (wants_hidden) copy_or_zero(kHidden, p_.h0);
      }
      if (p_.grad_output) copy(kGrad, grad + pair_at(i, grad_stride));
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void store(const Place& now, const Results (&results)[kPairs]) const {
    const int H = replica_.H, row = Cell::kGateGrads * H;
    T* dgates = p_.dgates + tile_at(now, row);
    T* previous = p_.previous + tile_at(now, H);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!takes_part(i, now)) continue;
#pragma unroll
      for (int g = 0; g < Cell::kGateGrads; ++g)
        store_pair<kWhole>(dgates + pair_at(i, row) + g * H, results[i].dgates[g], seat_.both);
      if (p_.previous) store_pair<kWhole>(previous + pair_at(i, H), results[i].h_before, seat_.both);
    }
  }

  const PersistentBackwardDirection<T>& p_;
  const Inputs& inputs_;
  bool whole_;         // pairs are read and written in one access
  float2 dh_[kPairs];  // the gradient that reached h_t through the step after it
  float2 carry_[Cell::kHasCarry ? kPairs : 1];
};

template <class Cell, class T, int kGroups, Exchange kExchange>
__global__ void __launch_bounds__(kBlockThreads<T, kGroups, kExchange>, 1)
    persistent_backward_kernel(const PersistentBackward<T> args, const int columns, const int row,
                               const bool whole) {
  if constexpr (!kHasKernel<T, kGroups, kExchange>) {
    __trap();
  } else {
    constexpr int G = Cell::kGates;
    using Weights = WeightFragments<T, G, true>;
    using Pairs = BackwardPairs<Cell, T, kGroups>;
    constexpr int kAhead = Pairs::kAhead;
    const Replica replica = replica_of_block<kGroups, kExchange>(args, columns, row);
    const Seat<kGroups> seat(replica, Weights::kPiece);
    // First: on their way they need room, in registers and in shared memory.
    Weights weights;
    weights.load(args.direction[replica.direction].w_hh, replica.H, seat.first_unit, seat.first_k,
                 seat.pieces, whole, shared_memory<unsigned char>());
    __syncthreads();

    SharedRoom room;
    StateExchange<kExchange, T, G, kGroups> exchange(
        replica, take_exchange<T, G, kGroups, kExchange>(room, replica, args.exchange, args.gave_up, args.B));
    const Reduction<kGroups, 1> reduction(room.take<float2>(Reduction<kGroups, 1>::size(columns)),
                                          seat.unit_group, seat.k_group);
    const typename Pairs::Inputs inputs(room.take<T>(Pairs::Inputs::kNumbers));
    Pairs pairs(args, replica, seat, inputs, whole);
    exchange.start();

    // Of this step, [0], those whose inputs are under way, and the one before them.
    Place places[kAhead + 2];
    bool reset[kAhead][kPairs];
    const int steps = static_cast<int>(args.steps);
    const auto place_or_none = [&](int order) {
      return order >= 0 ? place(args, replica.direction, order) : Place{0, 0};
    };
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) places[i] = place_or_none(steps - 1 - i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      pairs.ask((steps - 1 - i) & (kAhead - 1), places[i], places[i + 1], reset[i]);
      Pairs::Inputs::end_round();
    }
    for (int order = steps - 1; order >= 0; --order) {
      places[kAhead + 1] = place_or_none(order - kAhead - 1);
      const bool multiplies = order > 0 || args.wants_dh0;
      Pairs::Inputs::wait();
      typename Pairs::Results results[kPairs];
      if (seat.first_unit < replica.H) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          if (pairs.any(i)) pairs.step(i, order & (kAhead - 1), places[0], reset[0][i], results[i]);
      }
      if (multiplies) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (!pairs.exists(i)) continue;
#pragma unroll
          for (int g = 0; g < G; ++g) exchange.put(g, seat.row(i), seat.unit, results[i].dgates[g]);
        }
        exchange.send(order > 1 || (order == 1 && args.wants_dh0));
      }
      // The others wait for what was sent. The rest has time until they have answered.
      pairs.store(places[0], results);
      if (!multiplies) break;
      const bool reset_now[kPairs] = {reset[0][0], reset[0][1]};
      const Place now = places[0];
#pragma unroll
      for (int i = 0; i <= kAhead; ++i) places[i] = places[i + 1];
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) reset[i][j] = reset[i + 1][j];
      pairs.ask(order & (kAhead - 1), places[kAhead - 1], places[kAhead], reset[kAhead - 1]);
      Pairs::Inputs::end_round();

      const T* state = exchange.receive();
      state = Weights::first(state + seat.first_k, row);
      float sum[1][4];
      for (int column = 0; column < columns; ++column) {
        sum[0][0] = sum[0][1] = sum[0][2] = sum[0][3] = 0;
        if (seat.first_unit < replica.H)
          weights.multiply_by(sum, state + column * 8 * row, row, exchange.vector(), seat.pieces,
                              replica.rows - column * 8);
        if constexpr (kGroups == 1) break;  // most_columns
        reduction.put(column, sum);
      }
      if constexpr (kGroups > 1) __syncthreads();
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (kGroups > 1 && !pairs.any(i)) continue;  // in one block nothing is read for it
        float whole_sum[1][2];
        if constexpr (kGroups == 1)
          whole_sum[0][0] = sum[0][i], whole_sum[0][1] = sum[0][i + 2];
        else
          reduction.take(seat.pair(i), whole_sum);
        pairs.receive(i, now, reset_now[i], whole_sum[0]);
      }
    }
    pairs.store_state(args.wants_dh0);
    exchange.finish();
  }
}

// ---- Host ------------------------------------------------------------------------------------------------------------

template <class T>
bool in_pairs(const PersistentBackward<T>& args) {
  bool all = args.H % 2 == 0;
  for (const PersistentBackwardDirection<T>& p : args.direction)
    all = all && aligned<2>(p.w_hh) && aligned<2>(p.saved) && aligned<2>(p.output, p.output_stride) &&
          aligned<2>(p.h0) && aligned<2>(p.c0) && aligned<2>(p.grad_output, p.grad_output_stride) &&
          aligned<2>(p.dh) && aligned<2>(p.carry) && aligned<2>(p.dgates) && aligned<2>(p.previous);
  return all;
}

template <class T>
const char* persistent_backward(CellKind kind, const Tile& tile, const PersistentBackward<T>& args,
                                void* stream) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return with_tile<T>(tile, [&](auto k_groups, auto exchange) {
      return launch_persistent(&persistent_backward_kernel<Cell, T, k_groups, exchange>, Pass::backward,
                               Cell::kGates, sizeof(T), tile, args, in_pairs(args), stream);
    });
  });
}

template <class T>
const char* persistent_backward_residents(CellKind kind, const Tile& tile, int64_t H, int64_t* replicas) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return with_tile<T>(tile, [&](auto k_groups, auto exchange) {
      return residents(&persistent_backward_kernel<Cell, T, k_groups, exchange>, tile,
                       shape_of(Pass::backward, Cell::kGates, sizeof(T), tile, 1, H, 1), replicas);
    });
  });
}

}  // namespace frnn

// Everything that a .cu file of this pass holds.
#define FRNN_INSTANTIATE_PERSISTENT_BACKWARD(T)                                                          \
  template const char* frnn::persistent_backward<T>(CellKind, const Tile&, const PersistentBackward<T>&, \
                                                    void*);                                              \
  template const char* frnn::persistent_backward_residents<T>(CellKind, const Tile&, int64_t, int64_t*);
