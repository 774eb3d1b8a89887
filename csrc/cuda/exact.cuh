// The products of persistent kernels in true float32: by FFMA, since tensor cores round float's factors to TF32.
//
// A lane multiplies its own weights by four rows of the state at a time, then the lanes that have the same units add up
// their sums. Of 16 units a lane has two, and a quarter of k; or eight, and a sixteenth of k: as many as let it multiply a
// number of the state eight times, so that shared memory keeps up.
//
// As tile.cuh wants them, lane (g, t) ends with the sums of units 2g and 2g + 1 and of row t. What lanes share, rows and
// pairs of units, each numbers from its own on: number i of a lane is i XOR its own. So whichever lane it is, it hands
// over the second half of its numbers and keeps the first, and selects nothing.
#pragma once

#include "numbers.cuh"

namespace frnn {

// A piece of 16 units, 16 numbers of k and G gates. kTransposed: as in WeightFragments.
template <int G, bool kTransposed>
class ExactProducts {
 public:
  static constexpr int kSums = kTransposed ? 1 : G;  // of a unit; transposed, the gates are added up

  // `staged`: [G][16 rows of kStagedRow numbers], the units in the order of row_of_unit.
  template <int kStagedGate, int kStagedRow, class RowOfUnit>
  static __device__ __forceinline__ void load(uint32_t (&word)[2][G][4], const Exact* staged,
                                              const RowOfUnit& row_of_unit) {
#pragma unroll
    for (int gate = 0; gate < G; ++gate)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const Exact* row = staged + gate * kStagedGate + row_of_unit(unit(u)) * kStagedRow + first_k();
#pragma unroll
        for (int i = 0; i < kNumbers; ++i)
          word[(u * kNumbers + i) / 4][gate][(u * kNumbers + i) % 4] = __float_as_uint(row[k(i)].value);
      }
  }

  // Where a lane's first number of the state is, in an eight of rows.
  static __device__ __forceinline__ const Exact* first(const Exact* state, int row) {
    return state + static_cast<int>(threadIdx.x % kRows) * row + first_k();
  }

  // As WeightFragments::multiply_by. Rows 0 to 3, and where the batch has more than these, 4 to 7.
  template <int V, int kPieces>
  static __device__ __forceinline__ void multiply(float (&sums)[kSums][4],
                                                  const uint32_t (&word)[kPieces][2][G][4],
                                                  const Exact* state, int row, int vector, int pieces,
                                                  int rows) {
    // Not unrolled: the weights are hundreds of instructions as it is. The last to come is pair 0.
#pragma unroll 1
    for (int half = rows > kRows; half >= 0; --half) {
      float part[kRows * kParts];
#pragma unroll
      for (int i = 0; i < kRows * kParts; ++i) part[i] = 0;
      const Exact* of_row[kRows];
      const int own = threadIdx.x % kRows;
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_row[r] = state + (half * kRows + (own ^ r) - own) * row;
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          if (piece >= pieces) break;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float h[kNumbers];
            load_state(h, of_row[r] + piece * 16);
#pragma unroll
            for (int i = 0; i < kNumbers; ++i)
#pragma unroll
              for (int u = 0; u < kUnits; ++u)
#pragma unroll
                for (int s = 0; s < kSums; ++s) {
                  const int at = u * kNumbers + i, gate = kTransposed ? v : s;
                  float& sum = part[r * kParts + (u / 2 * kSums + s) * 2 + u % 2];
                  sum = fmaf(__uint_as_float(word[piece][at / 4][gate][at % 4]), h[i], sum);
                }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) of_row[r] += vector;
      }
      halve<2 * kParts, 2>(part);
      halve<kParts, 1>(part);
      if constexpr (kUnits == 8) {
        halve<kParts / 2, 8>(part);
        halve<kParts / 4, 4>(part);
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        sums[s][1] = sums[s][0], sums[s][3] = sums[s][2];
        sums[s][0] = part[2 * s], sums[s][2] = part[2 * s + 1];
      }
    }
  }

 private:
  static constexpr int kUnits = kTransposed || G == 1 ? 8 : 2;  // of a lane
  static constexpr int kSharing = 2 * kUnits;                   // lanes that have the same
  static constexpr int kNumbers = 16 / kSharing;                // of k
  static constexpr int kRows = 4;                               // at once
  static constexpr int kParts = kSums * kUnits;                 // sums of a row

  // A lane's numbers of k lie in pairs that are loaded as one, and rows of the state 4 banks apart: so two lanes of a load
  // meet in no bank.
  static __device__ __forceinline__ int first_k() { return threadIdx.x % kSharing * (kNumbers == 1 ? 1 : 2); }
  static __device__ __forceinline__ int k(int i) { return i / 2 * 8 + i % 2; }
  static __device__ __forceinline__ int unit(int u) {
    return (static_cast<int>(threadIdx.x % 32 / 4) ^ u / 2) * 2 + u % 2;
  }

  static __device__ __forceinline__ void load_state(float (&h)[kNumbers], const Exact* from) {
    if constexpr (kNumbers == 1) {
      h[0] = from->value;
    } else {
#pragma unroll
      for (int i = 0; i < kNumbers; i += 2) {
        const float2 both = *reinterpret_cast<const float2*>(from + k(i));
        h[i] = both.x, h[i + 1] = both.y;
      }
    }
  }

  // Adds what lane ^ kDistance has as number i + kCount to number i, for the first kCount.
  template <int kCount, int kDistance>
  static __device__ __forceinline__ void halve(float* part) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) part[i] += __shfl_xor_sync(0xffffffffu, part[i + kCount], kDistance);
  }
};

}  // namespace frnn
