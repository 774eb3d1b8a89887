// What the persistent kernels of both passes share: which rows and units a block and a thread have, and how a kernel is
// launched.
#pragma once

#include "approximate.cuh"
#include "exchange.cuh"
#include "launch.cuh"

namespace frnn {

// Step `order` of a direction: its rows, and where they begin among the N.
struct Place {
  int64_t first;
  int rows;
};
template <class Args>
__device__ __forceinline__ Place place(const Args& args, int direction, int64_t order) {
  const int64_t t = direction == 0 ? order : args.steps - 1 - order;
  if (!args.offsets) return {t * args.B, static_cast<int>(args.B)};
  const int64_t first = args.offsets[t];
  return {first, static_cast<int>(args.offsets[t + 1] - first)};
}

template <Exchange kExchange>
constexpr int kLeastBlocks = least_blocks(kExchange);

// Blocks along x: those of a replica, rank by rank, then the next batch tile; along y: directions.
template <int kGroups, Exchange kExchange, class Args>
__device__ __forceinline__ Replica replica_of_block(const Args& args, int columns, int row) {
  Replica replica;
  replica.H = static_cast<int>(args.H);
  const int holding = (replica.H + kTileUnits<kGroups> - 1) / kTileUnits<kGroups>;
  replica.blocks = holding > kLeastBlocks<kExchange> ? holding : kLeastBlocks<kExchange>;
  replica.rank = blockIdx.x % replica.blocks;
  replica.direction = blockIdx.y;
  replica.columns = columns;
  replica.first_row = blockIdx.x / replica.blocks * 8 * columns;
  replica.rows = min(8 * columns, static_cast<int>(args.B) - replica.first_row);
  replica.row = row;
  return replica;
}

// What a warp multiplies and a thread finishes. Warps of the same k group lie side by side: where only some k groups have
// pairs to finish, their warps are on different schedulers.
template <int kGroups>
struct Seat {
  static constexpr int kUnitGroups = kTileWarps / kGroups;
  int unit_group, k_group, lane;
  int first_unit;       // of the warp
  int unit;             // the first of the thread's pairs
  bool both;            // whether the second is one of the layer's too
  int pieces, first_k;  // of the warp's run

  __device__ __forceinline__ Seat(const Replica& replica, int piece) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    unit_group = warp % kUnitGroups;
    k_group = kGroups == 1 ? 0 : warp / kUnitGroups;
    first_unit = replica.rank * kTileUnits<kGroups> + 16 * unit_group;
    unit = first_unit + lane / 4 * 2;
    both = unit + 1 < replica.H;
    pieces = ((replica.H + kGroups - 1) / kGroups + piece - 1) / piece;
    first_k = k_group * pieces * piece;
  }
  // Pair i of the thread: its number in the tile, the first of its batch rows there, and the one that is the thread's.
  __device__ __forceinline__ int pair(int i) const { return k_group + i * kGroups; }
  __device__ __forceinline__ int first_row(int i) const { return pair(i) * 4; }
  __device__ __forceinline__ int row(int i) const { return first_row(i) + lane % 4; }
};

// The pairs that a thread finishes, as both passes see them.
template <int kGroups>
class SeatPairs {
 public:
  __device__ __forceinline__ SeatPairs(const Replica& replica, const Seat<kGroups>& seat)
      : replica_(replica), seat_(seat) {}

  // Whether any thread of the warp has a row to finish as its pair i. Where one block does everything, cells are what takes
  // the time, and those of no row would take as much as the others.
  __device__ __forceinline__ bool any(int i) const {
    if (kGroups == 1) return i == 0 || seat_.first_row(i) < replica_.rows;
    return seat_.pair(i) < 2 * replica_.columns && seat_.first_row(i) < replica_.rows;
  }
  // Whether the batch has the row of pair i, and the layer its units.
  __device__ __forceinline__ bool exists(int i) const {
    return (kGroups == 1 || seat_.pair(i) < 2 * replica_.columns) && seat_.row(i) < replica_.rows &&
           seat_.unit < replica_.H;
  }
  __device__ __forceinline__ bool takes_part(int i, const Place& place) const {
    return exists(i) && replica_.first_row + seat_.row(i) < place.rows;
  }

 protected:
  // Where pair i lies in a state [B, H].
  __device__ __forceinline__ int64_t state_at(int i) const {
    return int64_t{replica_.first_row + seat_.row(i)} * replica_.H + seat_.unit;
  }
  // Where row `row` of the batch's step `place` and vector `vector` begins, of rows of `stride` numbers; and, from that of
  // the tile's first row on, the pair i. The first is the same for all threads, the second for all steps.
  __device__ __forceinline__ int64_t tile_at(const Place& place, int64_t stride) const {
    return (place.first + replica_.first_row) * stride;
  }
  __device__ __forceinline__ int pair_at(int i, int stride) const {
    return seat_.row(i) * stride + seat_.unit;
  }

  const Replica& replica_;
  const Seat<kGroups>& seat_;
};

// The shared memory of a block, taken piece by piece; each piece is a multiple of 16 bytes. tile_shared_bytes adds up the
// same pieces.
class SharedRoom {
 public:
  template <class T>
  __device__ __forceinline__ T* take(int count) {
    unsigned char* piece = next_;
    next_ += count * sizeof(T);
    return reinterpret_cast<T*>(piece);
  }

 private:
  unsigned char* next_ = shared_memory<unsigned char>();
};

template <class T, int V, int kGroups, Exchange kExchange>
__device__ __forceinline__ ExchangeMemory<T> take_exchange(SharedRoom& room, const Replica& replica,
                                                           void* messages, unsigned* gave_up, int64_t B) {
  const int lines = 8 * replica.columns * V;
  ExchangeMemory<T> memory{};
  memory.tiles = room.take<T>(StateExchange<kExchange, T, V, kGroups>::kTiles * lines * replica.row);
  if constexpr (kExchange == Exchange::cluster) {
    memory.staged = room.take<T>(lines * kTileUnits<kGroups>);
    memory.mbarriers = room.take<uint64_t>(4);
  }
  memory.messages = messages;
  memory.gave_up = gave_up;
  memory.B = B;
  return memory;
}

// Whether there is a kernel on the architecture that is compiled for. The emulation has those of every one.
template <class T, int kGroups, Exchange kExchange>
#ifdef FRNN_EMULATION
constexpr bool kHasKernel = true;
#else
constexpr bool kHasKernel =
    tile_exists(Tile{kGroups, 1, kExchange}, FRNN_ARCH / 10, std::is_same_v<T, Exact>);
#endif

// Threads of a block. Where there is no kernel, fewer than any launch has: a plan goes by the GPU, and where the driver
// translated the code from PTX of an older one, as of 8.0+PTX for an sm_90, the kernel that it asks for is not there.
// So it is known from its attributes (residents), and a launch is refused, where to trap would be the end of the process.
template <class T, int kGroups, Exchange kExchange>
constexpr int kBlockThreads = kHasKernel<T, kGroups, kExchange> ? kTileThreads : 32;

// ---- Host ------------------------------------------------------------------------------------------------------------

// Calls f with k_groups and exchange as constants, of the combinations that there are.
template <class T, class F>
const char* with_tile(const Tile& tile, F&& f) {
  constexpr auto cluster = std::integral_constant<Exchange, Exchange::cluster>{};
  constexpr auto grid = std::integral_constant<Exchange, Exchange::grid>{};
  const bool in_cluster = tile.exchange == Exchange::cluster;
  if (tile.exchange == Exchange::block)
    return f(std::integral_constant<int, 1>{}, std::integral_constant<Exchange, Exchange::block>{});
  if (in_cluster && tile.k_groups == 4) return f(std::integral_constant<int, 4>{}, cluster);
  if constexpr (!std::is_same_v<T, Exact>) {
    if (in_cluster) return f(std::integral_constant<int, 2>{}, cluster);
    if (tile.k_groups == 2) return f(std::integral_constant<int, 2>{}, grid);
    if (tile.k_groups == 4) return f(std::integral_constant<int, 4>{}, grid);
  }
  return f(std::integral_constant<int, 8>{}, grid);
}

// What a kernel must be told before it is launched in this shape. Its bound on shared memory is always the largest that
// there is: another thread may be about to launch the same kernel in a larger shape.
template <class Kernel>
const char* prepare(Kernel* kernel, const LaunchShape& shape) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > (48 << 10)) {
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && shape.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error_text(error);
}

inline LaunchShape shape_of(Pass pass, int gates, int size, const Tile& tile, int64_t B, int64_t H,
                            int64_t D) {
  const auto blocks = static_cast<unsigned>(tile_blocks(tile, H));
  LaunchShape shape;
  shape.grid = dim3(blocks * static_cast<unsigned>(tile_replicas(tile, B)), static_cast<unsigned>(D));
  shape.block = dim3(kTileThreads);
  shape.shared_bytes = static_cast<size_t>(tile_shared_bytes(pass, gates, size, tile, H));
  shape.cluster = tile.exchange == Exchange::cluster ? blocks : 0;
  shape.cooperative = tile.exchange == Exchange::grid;
  return shape;
}

template <class Args>
const char* launch_persistent(void (*kernel)(Args, int, int, bool), Pass pass, int gates, int size,
                              const Tile& tile, const Args& args, bool whole, void* stream) {
  const LaunchShape shape = shape_of(pass, gates, size, tile, args.B, args.H, args.D);
  if (const char* error = prepare(kernel, shape)) return error;
  if (tile.exchange == Exchange::grid) {
    const int64_t bytes = tile_exchange_bytes(pass, gates, size, tile, args.B, args.H, args.D);
    if (const char* error = error_text(
            cudaMemsetAsync(args.exchange, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream))))
      return error;
  }
  return launch(kernel, shape, stream, args, tile.columns, static_cast<int>(tile_row(tile, args.H, size)),
                whole);
}

template <class Kernel>
const char* residents(Kernel* kernel, const Tile& tile, const LaunchShape& shape, int64_t* replicas) {
  *replicas = 0;
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  if (const char* error = error_text(cudaFuncGetAttributes(&attributes, kernel))) return error;
  if (attributes.maxThreadsPerBlock < kTileThreads) return nullptr;  // kBlockThreads
  if (const char* error = prepare(kernel, shape)) return error;
  int count = 0;
  if (tile.exchange == Exchange::cluster) {
    const LaunchConfig config(shape, nullptr);
    if (const char* error = error_text(cudaOccupancyMaxActiveClusters(&count, kernel, config.get())))
      return error;
    *replicas = count;
    return nullptr;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kTileThreads, shape.shared_bytes);
  if (error == cudaSuccess) *replicas = int64_t{count} * multiprocessors / shape.grid.x;
  return error_text(error);
}

}  // namespace frnn
