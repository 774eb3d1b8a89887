// Strategy "persistent": one launch runs many steps of a layer, both directions; the recurrent weights stay in the
// registers of its blocks all the time. How the blocks that share one direction's weights hand each other the state is
// the tier: inside one block, through the shared memory of a cluster (sm_90), or through global memory.
//
// Names as in args.h: T steps, N rows of all steps, B rows of the longest step, H hidden size, G gates. T is Half,
// BFloat16, float, whose products are then in TF32, or Exact, float without. sm_80 and newer.
#pragma once

#include <stdint.h>

#include "../cells/cells.h"
#include "../dtypes.h"

namespace frnn {

enum class Exchange {
  block,    // one block holds all weights of a direction
  cluster,  // a cluster does, of 2 to 16 blocks
  grid,     // blocks anywhere on the GPU do; they must all run at once, so the launch is cooperative
};
enum class Pass { forward, backward };

// How the work is cut. A replica is what holds one direction's weights once and computes `8 * columns` rows of the batch:
// tile_blocks(tile, H) blocks of 8 warps. In a block, 8 / k_groups warps stand side by side along the units, each with 16
// of them, and k_groups warps share the sums over k of the same 16.
struct Tile {
  int k_groups;  // 1, 2, 4 or 8
  int columns;   // 1 to most_columns(k_groups)
  Exchange exchange;
};

constexpr int kTileWarps = 8;

// Which there are on an architecture, 90 for sm_90: one warp for all of a sum where one block holds everything and nowhere
// else, and eight only across the grid. A cluster, where there are any, takes all that 2 or 4 reach: fewer kernels to
// compile. `exact`: for T = Exact. The more blocks share its products, which take the longest part of a step, the better:
// four warps to a sum in a cluster, eight in a grid.
constexpr bool tile_exists(const Tile& tile, int arch, bool exact) {
  if (arch < 80) return false;
  if (tile.k_groups == 1 || tile.exchange == Exchange::block)
    return tile.k_groups == 1 && tile.exchange == Exchange::block;
  if (exact && tile.k_groups != (tile.exchange == Exchange::cluster ? 4 : kTileWarps)) return false;
  const bool in_cluster = arch >= 90 && tile.k_groups < kTileWarps;
  return tile.exchange == (in_cluster ? Exchange::cluster : Exchange::grid);
}

constexpr int kTileThreads = 32 * kTileWarps;
constexpr int kRunBytes = 256;   // of h that a warp multiplies, for each of its 16 units and every gate
constexpr int kPieceBytes = 64;  // and it does so in pieces of this many bytes

constexpr int kWeightStage = kTileWarps * 16 * (kPieceBytes + 16);  // bytes a gate, to load weights through

constexpr int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Pairs of units that a thread finishes in a step, at most: of 2 * columns, each of k_groups warps has its share.
constexpr int kPairs = 2;
// How many steps ahead a thread asks for what it reads from global memory. Inside one block a step is shorter than that
// takes; otherwise the wait for the other blocks lies between.
constexpr int steps_ahead(int k_groups) { return k_groups == 1 ? 2 : 1; }

constexpr int tile_units(int k_groups) { return 16 * (kTileWarps / k_groups); }
constexpr int most_columns(int k_groups) { return k_groups * kPairs / 2; }

// The largest H. `size`: bytes of a stored number.
constexpr int64_t tile_reach(int k_groups, Exchange exchange, int size) {
  const int64_t k = int64_t{k_groups} * (kRunBytes / size), units = tile_units(k_groups);
  return exchange != Exchange::block ? k : k < units ? k : units;
}

// The smallest k_groups whose reach is H, or 0. It is 1 wherever Exchange::block can be used.
constexpr int k_groups_for(int64_t H, int size) {
  for (int k_groups = 1; k_groups <= kTileWarps; k_groups *= 2)
    if (H <= tile_reach(k_groups, k_groups == 1 ? Exchange::block : Exchange::grid, size)) return k_groups;
  return 0;
}

// In a cluster of one block st.async is undefined: a second one comes along, if need be without units.
constexpr int least_blocks(Exchange exchange) { return exchange == Exchange::cluster ? 2 : 1; }
// Blocks of a replica: P in the cost model.
constexpr int64_t tile_blocks(const Tile& tile, int64_t H) {
  const int64_t blocks = rounded_up(H, tile_units(tile.k_groups)) / tile_units(tile.k_groups);
  return blocks > least_blocks(tile.exchange) ? blocks : least_blocks(tile.exchange);
}
constexpr int64_t tile_replicas(const Tile& tile, int64_t B) {
  return rounded_up(B, 8 * tile.columns) / (8 * tile.columns);
}

// Numbers of a row of the state in shared memory: all that the warps multiply and all that the blocks hold, and so many
// more that rows lie 4 banks apart.
constexpr int64_t tile_row(const Tile& tile, int64_t H, int size) {
  const int64_t multiplied =
      tile.k_groups * rounded_up((H + tile.k_groups - 1) / tile.k_groups, kPieceBytes / size);
  const int64_t held =
      tile.exchange == Exchange::block ? 0 : tile_blocks(tile, H) * tile_units(tile.k_groups);
  return rounded_up((multiplied > held ? multiplied : held) * size, 128) / size + 16 / size;
}

// The exchange carries `vectors` rows of H numbers a row of the batch: h_t, or the G gradients of the gates.
constexpr int exchanged_vectors(Pass pass, int gates) { return pass == Pass::forward ? 1 : gates; }

// What a thread reads of global memory for a pair of units in a step: forward gates_x; backward `saved`, the output where
// the cell wants it, the states one step earlier and the gradient of h_t.
constexpr int inputs_of_pair(Pass pass, int gates) {
  return pass == Pass::forward ? gates : gates == 1 ? 3 : 2 * gates;
}

// Dynamic shared memory of a block.
constexpr int64_t tile_shared_bytes(Pass pass, int gates, int size, const Tile& tile, int64_t H) {
  const int64_t rows = int64_t{8} * tile.columns, vectors = exchanged_vectors(pass, gates);
  const int64_t state =
      (tile.exchange == Exchange::grid ? 1 : 2) * rows * vectors * tile_row(tile, H, size) * size;
  const int64_t sums = tile.k_groups == 1 ? 0
                                          : kTileThreads * 4 * sizeof(float) * tile.columns *
                                                (pass == Pass::forward ? gates : 1);
  const int64_t staged =
      tile.exchange == Exchange::cluster ? rows * vectors * tile_units(tile.k_groups) * size : 0;
  const int64_t mbarriers = tile.exchange == Exchange::cluster ? 32 : 0;
  const int64_t biases = pass == Pass::forward ? (gates + 1) * tile_units(tile.k_groups) * sizeof(float) : 0;
  const int64_t ahead = int64_t{steps_ahead(tile.k_groups)} * inputs_of_pair(pass, gates) * kPairs *
                        kTileThreads * 2 * (pass == Pass::forward ? sizeof(float) : size);
  const int64_t all = state + sums + staged + mbarriers + biases + ahead,
                weights = int64_t{gates} * kWeightStage;
  return all > weights ? all : weights;
}

// Global memory that Exchange::grid needs, aligned to 16 bytes; 0 otherwise. What it holds does not matter: each launch
// zeroes it on its stream.
constexpr int64_t tile_exchange_bytes(Pass pass, int gates, int size, const Tile& tile, int64_t B, int64_t H,
                                      int64_t D) {
  if (tile.exchange != Exchange::grid) return 0;
  const int64_t words = rounded_up(H * size, 8) / 4;  // of 4 bytes; each travels with its number
  return 2 * D * B * exchanged_vectors(pass, gates) * words * 8;
}

template <class T>
struct PersistentForwardDirection {
  // [rows, G*H] = x w_ih^T without bias, of the rows of this launch's steps; it begins with row gates_x_first of the N.
  const float* gates_x;
  int64_t gates_x_first;
  const T* w_hh;      // [G*H, H]
  const T* b_ih;      // [G*H] or null
  const T* b_hh;      // [G*H] or null
  const bool* reset;  // [N] or null; where set, the row's state is zero before this step
  const T* h0;        // [B, H] or null: zero
  const T* c0;        // [B, H] or null: zero
  T* hn;              // [B, H] or null; the last state of the rows that took part in a step of this launch
  T* cn;              // [B, H] or null; the cell state of all rows, written by the launch that ends the scan
  float* c;           // [B, H], the cell state between launches; null where one launch runs all steps
  T* output;          // [N, H], row stride output_stride; a later launch takes h from there
  int64_t output_stride;
  T* saved;  // [N, kSaved*H] or null: inference
};

// Directions go forward in `order` 0 .. T-1; direction 1 meets the steps from last to first.
template <class T>
struct PersistentForward {
  int64_t steps;        // T
  int64_t first, last;  // this launch runs first <= order < last; the launches of a scan follow each other
  int64_t B, H, D;
  const int64_t*
      offsets;     // [T+1], on the device: step t has the rows offsets[t] to offsets[t+1]; null: B each
  void* exchange;  // tile_exchange_bytes
  unsigned*
      gave_up;  // null, or zero, on the device: 1 afterwards if a block waited for another in vain. Null: it traps
  PersistentForwardDirection<T> direction[2];
};

template <class T>
struct PersistentBackwardDirection {
  const T* w_hh;    // [G*H, H]
  const T* saved;   // [N, kSaved*H]
  const T* output;  // [N, H], row stride output_stride
  int64_t output_stride;
  const T* h0;           // [B, H] or null: zero
  const T* c0;           // [B, H] or null: zero
  const bool* reset;     // [N] or null, as in the forward pass
  const T* grad_output;  // [N, H], row stride grad_output_stride, or null: zero
  int64_t grad_output_stride;
  float* dh;  // [B, H]: the gradient of h_n, which becomes the gradient that reached h_0 through the product
  float* carry;  // [B, H], in place: see step_grad; null for cells without
  T* dgates;     // [N, kGateGrads*H]
  T* previous;   // [N, H] or null; receives h_{t-1}, which the gradient of w_hh multiplies
};

// All steps, from the last in order to the first.
template <class T>
struct PersistentBackward {
  int64_t steps, B, H, D;
  const int64_t* offsets;  // as in the forward pass
  void* exchange;
  unsigned* gave_up;  // as in the forward pass
  bool wants_dh0;     // whether the last product is made: without it, dh is not written
  PersistentBackwardDirection<T> direction[2];
};

// Each launches one kernel on `stream` (a cudaStream_t of the current device). Returns null, or what CUDA says is wrong.
template <class T>
const char* persistent_forward(CellKind cell, const Tile& tile, const PersistentForward<T>& args,
                               void* stream);
template <class T>
const char* persistent_backward(CellKind cell, const Tile& tile, const PersistentBackward<T>& args,
                                void* stream);

// How many replicas the current device can run at once; 0 where it cannot run any. With Exchange::grid all of a launch
// must: D * tile_replicas(tile, B) at most. Returns null, or what CUDA says is wrong.
template <class T>
const char* persistent_forward_residents(CellKind cell, const Tile& tile, int64_t H, int64_t* replicas);
template <class T>
const char* persistent_backward_residents(CellKind cell, const Tile& tile, int64_t H, int64_t* replicas);

}  // namespace frnn
