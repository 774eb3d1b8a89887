// See cost.h. The model of a step, from latencies and bandwidths that others have measured on Hopper:
//
//   max(max(product, shared memory) + exchange + the cell's exponentials + the rest of it, HBM)
//
// Nothing in this file has been timed by this project yet. Figures that stand for more than one architecture are for
// Hopper, since the tile and the strategy depend on their ratios, which differ less.
#include "cost.h"

#include <algorithm>

namespace frnn {
namespace {

// One GPU of each architecture, from the vendor's data sheets. `products`: FLOP/ns of a multiprocessor, dense 16-bit
// operands, sums in float.
struct KnownGpu {
  CudaGpu gpu;
  double memory;  // bytes/ns
  double products;
};
constexpr int64_t kGigabyte = int64_t{1} << 30;
constexpr KnownGpu kKnown[] = {
    {{75, 40, 64 << 10, 4 << 20, 16 * kGigabyte}, 320, 1625},      // T4
    {{80, 108, 163 << 10, 40 << 20, 80 * kGigabyte}, 2039, 2890},  // A100
    {{86, 84, 99 << 10, 6 << 20, 48 * kGigabyte}, 696, 1780},      // A40
    {{89, 142, 99 << 10, 96 << 20, 48 * kGigabyte}, 864, 2550},    // L40S
    // H200: mma.sync reaches 63 % of what wgmma does, by microbenchmarks of the H800.
    {{90, 132, 227 << 10, 60 << 20, 141 * kGigabyte}, 4800, 4340},
    // B200, taken to be as Hopper with mma.sync.
    {{100, 148, 227 << 10, 126 << 20, 180 * kGigabyte}, 8000, 4340},
    {{120, 170, 99 << 10, 96 << 20, 32 * kGigabyte}, 1792, 1230},  // RTX 5090
};

const KnownGpu& known(int arch) {
  const KnownGpu* found = &kKnown[0];
  for (const KnownGpu& gpu : kKnown)
    if (gpu.gpu.arch <= arch) found = &gpu;
  return *found;
}

// FLOP/ns of a multiprocessor without tensor cores: 128 lanes at 1.98 GHz.
constexpr double kGigahertz = 1.98, kScalarProducts = 507;
// Bytes/ns: a multiprocessor's shared memory, 128 a cycle; what one of them draws from L2, and all of them together;
// what a block receives from the others of its cluster (3.3 TB/s over the 114 of an H800, by microbenchmarks).
constexpr double kShared = 225, kL2ToOne = 112, kL2ToAll = 6900, kCluster = 29;
// ns: one __syncthreads; h_t from where it is computed to where it is multiplied, by exchange (a barrier; distributed
// shared memory and an mbarrier; a store to L2 and the load that sees it); the cell but for its exponentials, and the
// loop around it.
constexpr double kBarrier = 20, kBlockExchange = 20, kClusterExchange = 170, kGridExchange = 500, kCell = 80;
// Each scheduler of a multiprocessor has a special-function unit with 4 results a cycle: 16 together in CUDA's table of
// the throughput of arithmetic instructions, from 7.5 to 10.0; 12.0 is taken to have as many. A sigmoid or a tanh is two,
// an exponential and a reciprocal, by the kernels' SASS: the exact ones too, whose other instructions take less long.
constexpr int kSchedulers = 4, kSpecials = 4, kSpecialsOfExponential = 2;
// What the registers of a multiprocessor hold of the weights, and the most that registers and shared memory do.
constexpr double kRegisterBytes = 128e3, kWeightBytes = 300e3;
constexpr int64_t kMostCluster = 16;

// Estimates until measured. ns a launch while the host keeps ahead (1300 in a CUDA graph, 3000 to 10,000 a step through
// cuDNN's non-persistent path, which launches twice); of it a cooperative or cluster launch; the share of a GPU's
// products that a small matrix product reaches.
constexpr double kLaunch = 2500, kLargeLaunch = 5000, kProductShare = 0.5;

double products_per_ns(const CudaProblem& p) {
  const double best = known(p.gpu.arch).products;
  switch (p.dtype) {
    case CudaDtype::fp16:
      return best;
    case CudaDtype::bf16:
    case CudaDtype::tf32:
      if (p.gpu.arch < 80) return kScalarProducts;
      return p.dtype == CudaDtype::bf16 ? best : best / 2;
    case CudaDtype::fp32:
      return kScalarProducts;
    case CudaDtype::fp64:
      break;
  }
  return kScalarProducts / 2;
}

double flops(const CudaProblem& p) {  // of one row and direction
  return 2.0 * gates_of(p) * static_cast<double>(p.H) * static_cast<double>(p.P > 0 ? p.P : p.H);
}

double weight_bytes(const CudaProblem& p) {  // of one direction
  return flops(p) / 2 * bytes_of(p.dtype);
}

// ns to read the weights of all directions where they do not stay on the multiprocessors.
double weight_time(const CudaProblem& p) {
  const double bytes = weight_bytes(p) * static_cast<double>(p.D), memory = known(p.gpu.arch).memory;
  return bytes / (bytes <= static_cast<double>(p.gpu.l2_bytes) ? std::max(kL2ToAll, memory) : memory);
}

// ns to move what a step reads and writes of the tensors with a row for every step.
double memory_time(const CudaProblem& p) {
  const int size = bytes_of(p.dtype);
  const int bytes = with_cell(p.cell, [&](auto cell) -> int {  // of a unit and a row
    using Cell = decltype(cell);
    if (p.pass == Pass::backward)  // and output, its gradient, h_{t-1}
      return size * (Cell::kSaved + Cell::kGateGrads + 3);
    return Cell::kGates * accumulate_bytes_of(p.dtype) + size * (1 + (p.training ? Cell::kSaved : 0));
  });
  return static_cast<double>(p.B * p.H * p.D * bytes) / known(p.gpu.arch).memory;
}

// Rows are multiplied by eights, on tensor cores; by fours without.
int64_t multiplied_rows(const CudaProblem& p, int64_t rows) {
  return rounded_up(rows, p.dtype == CudaDtype::fp32 ? 4 : 8);
}

// ns of a block's product in exact.cuh, by its instructions: a multiprocessor issues 128 lanes of them in a cycle, a warp's
// way through shared memory takes one. `pieces`: of each warp.
double exact_product_time(const CudaProblem& p, double pieces, int64_t rows) {
  const int gates = gates_of(p), vectors = exchanged_vectors(p.pass, gates);
  const bool pairs =
      p.pass == Pass::forward && gates > 1;  // what a lane has of the units, and eights otherwise
  const int units = pairs ? 2 : 8, sums = units * (p.pass == Pass::forward ? gates : 1);
  // For four rows: numbers of the state, in pairs and from both halves of a warp, or one by one.
  const double loads = pieces * 4 * (pairs ? 2 : vectors), ways = pairs ? 2 : 1;
  const double halvings = 4 * sums - 2 * sums / units;  // a shuffle and a sum each
  const double issued = pieces * 4 * 8 * gates + loads + 2 * halvings, shared = loads * ways + halvings;
  const double cycles = std::max(issued * kTileThreads / 128, shared * kTileWarps);
  return static_cast<double>(rows) / 4 * cycles / kGigahertz;
}

// ns that the exponentials of a step's cells take, of so many units times rows in a multiprocessor.
double exponential_time(const CudaProblem& p, double cells) {
  const int exponentials = with_cell(p.cell, [&](auto cell) -> int {
    using Cell = decltype(cell);
    return p.pass == Pass::forward ? Cell::kExponentials : Cell::kGradExponentials;
  });
  return cells * exponentials * kSpecialsOfExponential / (kSchedulers * kSpecials * kGigahertz);
}

// Rows and units whose cells a warp computes at a time.
constexpr int64_t kCellRows = 4, kCellUnits = 16;

// Cells of a step that a block computes, if all its schedulers had as many as the busiest: they take the warps in turn,
// first along the units. Those without a unit, or without a row (`any` in persistent.cuh), compute none.
double cells_of_tile(const CudaProblem& p, const Tile& tile) {
  const int64_t fours = rounded_up(std::min(p.B, int64_t{8} * tile.columns), kCellRows) / kCellRows;
  const int64_t units = std::min<int64_t>(p.H, tile_units(tile.k_groups));
  const int64_t across = std::min(kTileWarps / tile.k_groups, kSchedulers), down = kSchedulers / across;
  const int64_t busiest = rounded_up(rounded_up(units, kCellUnits) / kCellUnits, across) / across *
                          (rounded_up(fours, down) / down);
  return static_cast<double>(kSchedulers * busiest * kCellRows * kCellUnits);
}

}  // namespace

CudaGpu typical_gpu(int arch) {
  CudaGpu gpu = known(arch).gpu;
  gpu.arch = arch;
  return gpu;
}

int gates_of(const CudaProblem& p) {
  return with_cell(p.cell, [](auto cell) -> int { return decltype(cell)::kGates; });
}
int bytes_of(CudaDtype dtype) {
  return dtype == CudaDtype::fp64 ? 8 : dtype == CudaDtype::fp32 || dtype == CudaDtype::tf32 ? 4 : 2;
}
int accumulate_bytes_of(CudaDtype dtype) { return dtype == CudaDtype::fp64 ? 8 : 4; }

CudaCost cost_of_steps(const CudaProblem& p, Strategy strategy) {
  const bool fused = strategy == Strategy::step_fused;
  const double rate =
      fused ? std::min(kScalarProducts, products_per_ns(p)) : products_per_ns(p) * kProductShare;
  const double multiply = flops(p) * static_cast<double>(p.B * p.D) / (rate * p.gpu.multiprocessors);
  // With a projection another product, and a copy of its result to the output.
  const double launches = fused ? 1 : p.P > 0 ? 4 : 2;
  return {launches * kLaunch + std::max({multiply, weight_time(p), memory_time(p)}), 0};
}

CudaCost cost_of_tile(const CudaProblem& p, const Tile& tile, int64_t launches) {
  const int gates = gates_of(p), size = bytes_of(p.dtype);
  const int64_t blocks = tile_blocks(tile, p.H), replicas = tile_replicas(tile, p.B) * p.D;
  const double rows = 8.0 * tile.columns;
  const auto multiplied = static_cast<double>(  // of a row of the state, by the warps of a unit
      tile.k_groups * rounded_up((p.H + tile.k_groups - 1) / tile.k_groups, kPieceBytes / size));
  const double weights = gates * tile_units(tile.k_groups) * multiplied;
  const double state = rows * static_cast<double>(p.H * size * exchanged_vectors(p.pass, gates));

  double product = 2 * weights * rows / products_per_ns(p);
  // Every group of units reads all of the state; partial sums are written and read.
  const double read =
      kTileWarps / tile.k_groups * rows * multiplied * size * exchanged_vectors(p.pass, gates) / kShared;
  if (p.dtype == CudaDtype::fp32)
    product = exact_product_time(p, multiplied / tile.k_groups * size / kPieceBytes,
                                 multiplied_rows(p, std::min<int64_t>(p.B, 8 * tile.columns)));
  const int sums_of_row = p.pass == Pass::forward ? gates : 1;
  const double sums =
      tile.k_groups == 1 ? 0 : 2.0 * kTileThreads * 16 * tile.columns * sums_of_row / kShared + kBarrier;
  double exchange = kBlockExchange;
  if (tile.exchange == Exchange::cluster) exchange = kClusterExchange + state / kCluster;
  if (tile.exchange == Exchange::grid) {  // every 4 bytes travel with an epoch of as many
    const double all = static_cast<double>(replicas * blocks) * 2 * state / kL2ToAll;
    exchange = kGridExchange + std::max(2 * state / kL2ToOne, all);
  }
  // More replicas than fit take turns, but for those of a cooperative launch, which all fit.
  const int64_t at_once = std::max<int64_t>(p.gpu.multiprocessors / blocks, 1);
  const double turns = static_cast<double>((replicas + at_once - 1) / at_once);
  const double step =
      std::max(product, read) + sums + exchange + exponential_time(p, cells_of_tile(p, tile)) + kCell;
  const double load =
      (tile.exchange == Exchange::block ? kLaunch : kLargeLaunch) + weights * size / kL2ToOne * turns;
  const double lengths = p.packed ? kLaunch : 0;
  return {std::max(step * turns, memory_time(p)), load * static_cast<double>(launches) + lengths};
}

double floor_of_step(const CudaProblem& p) {
  const double weights = weight_bytes(p), rate = products_per_ns(p);
  const double row = static_cast<double>(p.H * bytes_of(p.dtype) * exchanged_vectors(p.pass, gates_of(p)));
  double floor = std::max(weight_time(p), memory_time(p)) + kLaunch;
  for (int64_t blocks = 1; blocks * p.D <= p.gpu.multiprocessors; ++blocks) {
    const auto share = static_cast<double>(blocks);
    if (weights / share > kWeightBytes) continue;
    for (int64_t parts = 1; parts * blocks * p.D <= p.gpu.multiprocessors && parts <= p.B; ++parts) {
      const int64_t rows = (p.B + parts - 1) / parts;
      const double product = flops(p) * static_cast<double>(multiplied_rows(p, rows)) / (share * rate);
      const double read = (weights / share - kRegisterBytes) / kShared;
      const double state = static_cast<double>(rows) * row;
      double exchange = kGridExchange + std::max(state / kL2ToOne,
                                                 static_cast<double>(parts * p.D) * share * state / kL2ToAll);
      if (blocks <= kMostCluster && p.gpu.arch >= 90)
        exchange = std::min(exchange, kClusterExchange + state / kCluster);
      if (blocks == 1) exchange = kBlockExchange;
      const double cells =
          exponential_time(p, static_cast<double>(p.H * rounded_up(rows, kCellRows)) / share);
      const double step = std::max(std::max(product, read) + exchange + cells + kCell, memory_time(p));
      floor = std::min(floor, step);
    }
  }
  return floor;
}

}  // namespace frnn
