// What a warp of a persistent kernel multiplies: its part of the recurrent weights, kept in registers, by the state of
// eight batch rows at a time; and the sums of k_groups warps over the same units.
//
// The rows of a product are units, its columns batch rows. With g = lane / 4 and t = lane % 4, row g of the tensor core's
// 16 x 8 result is unit 2g and row g + 8 is unit 2g + 1, so that a lane holds pairs of neighbouring units. Its columns 2t
// and 2t + 1 are batch rows t and t + 4: pair 0 and pair 1. All gates of a pair lie in the same lane.
#pragma once

#include <type_traits>

#include "exact.cuh"
#include "numbers.cuh"
#include "persistent.h"
#include "ptx.cuh"

namespace frnn {

template <int kGroups>
constexpr int kTileUnits = tile_units(kGroups);

// Stored numbers in 32 bits, as products read them.
template <class T>
constexpr int kInWord = 4 / sizeof(T);

// Two numbers as they are stored, side by side.
template <class T>
struct StoredPair {
  uint32_t word[2 / kInWord<T>];
  StoredPair() = default;
  __device__ __forceinline__ StoredPair(float first, float second) { set(T{}, first, second); }
  __device__ __forceinline__ float2 numbers() const { return get(T{}); }
  // As a product sees them.
  __device__ __forceinline__ StoredPair multiplied() const {
    StoredPair pair = *this;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int w = 0; w < 2; ++w) pair.word[w] = to_tf32(__uint_as_float(word[w]));
    }
    return pair;
  }

 private:
  __device__ __forceinline__ void set(BFloat16, float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    memcpy(word, &both, sizeof both);
  }
  __device__ __forceinline__ void set(Half, float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    memcpy(word, &both, sizeof both);
  }
  __device__ __forceinline__ void set(float, float first, float second) {
    word[0] = __float_as_uint(first);
    word[1] = __float_as_uint(second);
  }
  __device__ __forceinline__ void set(Exact, float first, float second) { set(float{}, first, second); }
  __device__ __forceinline__ float2 get(BFloat16) const {
    return {__uint_as_float(word[0] << 16), __uint_as_float(word[0] & 0xffff0000u)};
  }
  __device__ __forceinline__ float2 get(Half) const {
    __half2 both;
    memcpy(&both, word, sizeof both);
    return __half22float2(both);
  }
  __device__ __forceinline__ float2 get(float) const {
    return {__uint_as_float(word[0]), __uint_as_float(word[1])};
  }
  __device__ __forceinline__ float2 get(Exact) const { return get(float{}); }
};

// The number that a product sees in place of a stored one.
template <class T>
__device__ __forceinline__ T as_multiplied(T x) {
  return x;
}
template <>
__device__ __forceinline__ float as_multiplied(float x) {
  return __uint_as_float(to_tf32(x));
}

// 16 x 8 += 16 x 32 bytes of k times 32 bytes of k x 8.
__device__ __forceinline__ void multiply(BFloat16, float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  mma_bf16(sums, a, b);
}
__device__ __forceinline__ void multiply(Half, float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  mma_f16(sums, a, b);
}
__device__ __forceinline__ void multiply(float, float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  mma_tf32(sums, a, b);
}

// The weights of 16 units and one run of k, for G gates. Forward a unit is a row of each gate in w_hh [G*H, H] and k a
// column; backward, kTransposed, a unit is a column and k a row of each gate.
template <class T, int G, bool kTransposed>
struct WeightFragments {
  static constexpr int kPieces = kRunBytes / kPieceBytes;
  static constexpr int kPiece = kPieceBytes / sizeof(T);  // numbers
  static constexpr int kSums = kTransposed ? 1 : G;       // of a unit; transposed, the gates are added up
  uint32_t word[kPieces][2][G][4];

  // Zero beyond H in either direction. `whole`: H is even and w_hh aligned to pairs. `staged`: kWeightStage bytes of shared
  // memory for each gate; free again after a barrier. Lanes that lie side by side read side by side, which fragments do
  // not; and it is the registers of one piece that loads are under way to.
  __device__ __forceinline__ void load(const T* w_hh, int H, int first_unit, int first_k, int pieces,
                                       bool whole, unsigned char* staged) {
    const int lane = threadIdx.x % 32;
    T* own = reinterpret_cast<T*>(staged) + threadIdx.x / 32 * (G * kStagedGate);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) {
#pragma unroll
        for (int i = 0; i < 2 * G * 4; ++i) word[piece][i / (G * 4)][i / 4 % G][i % 4] = 0;
        continue;
      }
      Line lines[G][kLoads];
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int at = i * 32 + lane, k = first_k + piece * kPiece;
          const int row = (kTransposed ? k : first_unit) + at / kLines,
                    column = (kTransposed ? first_unit : k) + at % kLines * kInWord<T>;
          lines[gate][i] = Line{};
          if (row >= H || column >= H) continue;
          const T* from = w_hh + (gate * H + row) * H + column;
          if (whole) {
            lines[gate][i] = *reinterpret_cast<const Line*>(from);
          } else {
#pragma unroll
            for (int j = 0; j < kInWord<T>; ++j)
              if (column + j < H) lines[gate][i].at[j] = from[j];
          }
        }
      __syncwarp();  // the piece before has been read
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int line = (i * 32 + lane) / kLines, across = (i * 32 + lane) % kLines * kInWord<T>;
#pragma unroll
          for (int j = 0; j < kInWord<T>; ++j) lines[gate][i].at[j] = as_multiplied(lines[gate][i].at[j]);
          if constexpr (kTransposed) {
#pragma unroll
            for (int j = 0; j < kInWord<T>; ++j)
              own[gate * kStagedGate + row_of_unit(across + j) * kStagedRow + line] = lines[gate][i].at[j];
          } else {
            *reinterpret_cast<Line*>(own + gate * kStagedGate + row_of_unit(line) * kStagedRow + across) =
                lines[gate][i];
          }
        }
      __syncwarp();
      if constexpr (kExact) {
        ExactProducts<G, kTransposed>::template load<kStagedGate, kStagedRow>(word[piece], own, row_of_unit);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int gate = 0; gate < G; ++gate)
            load_matrices(word[piece][half][gate], own + gate * kStagedGate + lane % 16 * kStagedRow +
                                                       (2 * half + lane / 16) * (16 / sizeof(T)));
      }
    }
  }

  // What multiply_by wants of this lane. `state`: the first of 8 rows, `row` numbers apart, and the first k.
  static __device__ __forceinline__ const T* first(const T* state, int row) {
    if constexpr (kExact) {
      return ExactProducts<G, kTransposed>::first(state, row);
    } else {  // the address that it gives to load_matrices in the first piece
      const int lane = threadIdx.x % 32;
      return state + (lane % 2 * 4 + lane % 8 / 2) * row + lane / 8 * (16 / sizeof(T));
    }
  }

  // The sums of the products of all k with 8 rows, of which the batch has `rows`. The state is one vector for all gates,
  // or, transposed, one for each, `vector` numbers apart.
  __device__ __forceinline__ void multiply_by(float (&sums)[kSums][4], const T* state, int row, int vector,
                                              int pieces, int rows) const {
    constexpr int V = kTransposed ? G : 1;
    if constexpr (kExact) {
      ExactProducts<G, kTransposed>::template multiply<V>(sums, word, state, row, vector, pieces, rows);
    } else {
      // Sums that do not wait for each other: by gate, and of a gate alone by half.
      constexpr int kChains = G == 1 ? 2 : G;
      float chains[kChains][4];
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain)
        chains[chain][0] = chains[chain][1] = chains[chain][2] = chains[chain][3] = 0;
      // The products of a gate alone take no longer than the way of the state of a piece: there it is loaded before all.
      constexpr bool kAllFirst = G == 1;
      uint32_t b[kAllFirst ? kPieces : 1][V][4];
      const auto load = [&](int piece) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          load_matrices(b[kAllFirst ? piece : 0][v], state + v * vector + piece * kPiece);
      };
#pragma unroll
      for (int piece = 0; piece < kPieces && kAllFirst; ++piece) {
        if (piece >= pieces) break;
        load(piece);
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece >= pieces) break;
        if constexpr (!kAllFirst) load(piece);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int gate = 0; gate < G; ++gate) {
            const uint32_t (&all)[4] = b[kAllFirst ? piece : 0][V == 1 ? 0 : gate];
            const uint32_t own[2] = {all[2 * half], all[2 * half + 1]};
            multiply(T{}, chains[G == 1 ? half : gate], word[piece][half][gate], own);
          }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums[s][i] = chains[s][i];
#pragma unroll
        for (int chain = kSums; chain < kChains; ++chain) sums[0][i] += chains[chain][i];
      }
    }
  }

 private:
  static constexpr bool kExact = std::is_same_v<T, Exact>;
  using Line = Packed<T, kInWord<T>>;
  static constexpr int kLines = (kTransposed ? 16 : kPiece) / kInWord<T>;  // words side by side in w_hh
  static constexpr int kLoads = 16 * kPiece / kInWord<T> / 32;  // words a lane, of a piece of one gate
  static constexpr int kStagedGate = kWeightStage / kTileWarps / sizeof(T), kStagedRow = kStagedGate / 16;

  // Of the tensor core's 16: see above.
  static __device__ __forceinline__ int row_of_unit(int unit) { return unit % 2 * 8 + unit / 2; }
};

// The k_groups warps of the same units each hold sums over their own k. put() lays them down; after a barrier take()
// gives the whole sums of a pair, added in the same order by whoever asks. S sums a unit.
template <int kGroups, int S>
class Reduction {
 public:
  // Pairs of numbers in its buffer.
  static __device__ __forceinline__ int size(int columns) {
    return kGroups == 1 ? 0 : 2 * columns * kGroups * kStride;
  }

  __device__ __forceinline__ Reduction(float2* buffer, int unit_group, int k_group)
      : own_(buffer + unit_group * S * 32 + threadIdx.x % 32), k_group_(k_group) {}

  // Of the 8 rows number `column`.
  __device__ __forceinline__ void put(int column, const float (&sums)[S][4]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int s = 0; s < S; ++s)
        own_[((2 * column + pair) * kGroups + k_group_) * kStride + s * 32] =
            float2{sums[s][pair], sums[s][pair + 2]};
  }

  // `pair` counts through all columns.
  __device__ __forceinline__ void take(int pair, float (&sums)[S][2]) const {
#pragma unroll
    for (int s = 0; s < S; ++s) sums[s][0] = sums[s][1] = 0;
    // All at once would take more registers than the weights leave.
#pragma unroll 4
    for (int source = 0; source < kGroups; ++source) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const float2 part = own_[(pair * kGroups + source) * kStride + s * 32];
        sums[s][0] += part.x;
        sums[s][1] += part.y;
      }
    }
  }

 private:
  static constexpr int kStride = kTileWarps / kGroups * S * 32;
  float2* own_;
  int k_group_;
};

// ---- Pairs of neighbouring units ------------------------------------------------------------------------------------
//
// kWhole: in one access, which needs an even H, and every row of every array aligned to pairs. Otherwise `both` says
// whether there is a second unit: not behind an odd H.

// The whole words of a pair, or of its half.
template <class T>
using PairWord = typename WordOf<2 * sizeof(T)>::type;

template <bool kWhole, class T>
__device__ __forceinline__ StoredPair<T> load_pair(const T* from, bool both) {
  StoredPair<T> pair;
  if constexpr (kWhole) {
    const PairWord<T> word = *reinterpret_cast<const PairWord<T>*>(from);
    memcpy(&pair, &word, sizeof pair);
  } else {
    const T numbers[2] = {from[0], both ? from[1] : T{}};
    memcpy(&pair, numbers, sizeof pair);
  }
  return pair;
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_pair(T* to, const StoredPair<T>& pair, bool both) {
  if constexpr (kWhole) {
    PairWord<T> word;
    memcpy(&word, &pair, sizeof word);
    *reinterpret_cast<PairWord<T>*>(to) = word;
  } else {
    T numbers[2];
    memcpy(numbers, &pair, sizeof numbers);
    to[0] = numbers[0];
    if (both) to[1] = numbers[1];
  }
}

// Into shared memory, where this thread finds it after copy_wait.
template <bool kWhole, class T>
__device__ __forceinline__ void copy_pair(T* to, const T* from, bool both) {
  if constexpr (kWhole)
    copy_async<2 * sizeof(T)>(to, from);
  else
    store_pair<true>(to, load_pair<false>(from, both), true);
}

// Values that a thread has asked for and needs a step or two later: kValues a pair of units, in kAhead rounds that take
// turns. They wait in shared memory; registers have no room for them beside the weights. Of a thread's own no other knows.
template <class T, int kValues, int kAhead>
class Ahead {
 public:
  static constexpr int kNumbers = kAhead * kValues * kPairs * kTileThreads * 2;
  // Of rows that are never asked for zeros are read.
  __device__ __forceinline__ explicit Ahead(T* memory) : own_(memory + 2 * threadIdx.x) {
    for (int i = 0; i < kAhead * kValues * kPairs; ++i)
      store_pair<true>(own_ + i * (kTileThreads * 2), StoredPair<T>(0, 0), true);
  }
  __device__ __forceinline__ T* at(unsigned round, int value, int pair) const {
    return own_ + ((round * kValues + value) * kPairs + pair) * (kTileThreads * 2);
  }
  __device__ __forceinline__ float2 get(unsigned round, int value, int pair) const {
    return load_pair<true>(at(round, value, pair), true).numbers();
  }
  // What was asked for is there after as many rounds as there are.
  static __device__ __forceinline__ void end_round() { copy_commit(); }
  static __device__ __forceinline__ void wait() { copy_wait<kAhead - 1>(); }

 private:
  T* own_;
};

}  // namespace frnn
