// Cooperative kernels: blocks that wait for each other through global memory; and mistakes in them.
#include "cuda/ptx_exchange.cuh"
#include "launch.h"

namespace {

struct alignas(16) Packet {
  float value[3];
  unsigned epoch;
};

// Data as flag: value and epoch travel in one 16-byte store, and readers spin on the data itself. Each step every block
// replaces its values by the sum of all blocks'. Three buffers, so that a fast block cannot overwrite what a slow one
// has yet to read.
__global__ void exchange(float* data, Packet* packets, int steps, unsigned first_epoch) {
  const unsigned i = threadIdx.x, threads = blockDim.x, blocks = gridDim.x;
  float value[3];
  for (int j = 0; j < 3; ++j) value[j] = data[(blockIdx.x * threads + i) * 3 + j];
  for (int step = 0; step < steps; ++step) {
    Packet* buffer = packets + step % 3 * blocks * threads;
    const unsigned epoch = first_epoch + step;
    Packet own{{value[0], value[1], value[2]}, epoch};
    frnn::store_relaxed(buffer + blockIdx.x * threads + i, own);
    value[0] = value[1] = value[2] = 0.0f;
    for (unsigned block = 0; block < blocks; ++block) {
      Packet packet;
      do {
        packet = frnn::load_relaxed(buffer + block * threads + i);
      } while (packet.epoch != epoch);
      for (int j = 0; j < 3; ++j) value[j] += packet.value[j];
    }
    // All have sent this step's before any sends the next but two.
    __syncthreads();
  }
  for (int j = 0; j < 3; ++j) data[(blockIdx.x * threads + i) * 3 + j] = value[j];
}

enum FlagMistake {
  kNone,
  kRelaxedStore,
  kRelaxedLoad,
  kNoBarrier,
  kFences,
  kBlockFence,
  kVolatile,
  kNotCooperative
};

// A flag in memory says that the data is there: block 0 writes, the others read.
__global__ void broadcast(const float* in, float* shared_data, unsigned* flag, float* out, int mistake) {
  const unsigned i = threadIdx.x;
  if (blockIdx.x == 0) {
    shared_data[i] = in[i];
    if (mistake != kNoBarrier) __syncthreads();
    if (i == 0) {
      if (mistake == kFences) __threadfence();
      if (mistake == kBlockFence) __threadfence_block();
      if (mistake == kVolatile) {
        *const_cast<volatile unsigned*>(flag) = 1;
      } else if (mistake == kRelaxedStore || mistake == kFences || mistake == kBlockFence) {
        frnn::store_relaxed(flag, 1u);
      } else {
        frnn::store_release(flag, 1u);
      }
    }
    return;
  }
  if (i == 0) {
    if (mistake == kRelaxedLoad || mistake == kFences || mistake == kBlockFence) {
      while (frnn::load_relaxed(flag) == 0) {
      }
    } else {
      while (frnn::load_acquire(flag) == 0) {
      }
    }
    if (mistake == kFences || mistake == kBlockFence) frnn::fence_device();
  }
  __syncthreads();
  out[(blockIdx.x - 1) * blockDim.x + i] = shared_data[i];
}

// Counts all blocks by atomics with fences; the last block adds up what each left.
__global__ void last_block(float* partial, unsigned* count, float* out, int with_fence) {
  partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
  if (with_fence) __threadfence();
  if (atomicAdd(count, 1u) != gridDim.x - 1) return;
  if (with_fence) __threadfence();
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block];
  *out = sum;
}

}  // namespace

TEST_EXPORT int run_exchange(float* data, void* packets, int blocks, int threads, int steps,
                             unsigned first_epoch) {
  Shape shape{dim3(blocks), dim3(threads)};
  shape.cooperative = true;
  return launch(shape, exchange, data, static_cast<Packet*>(packets), steps, first_epoch);
}
TEST_EXPORT int run_broadcast(const float* in, float* shared_data, unsigned* flag, float* out, int blocks,
                              int threads, int mistake) {
  Shape shape{dim3(blocks), dim3(threads)};
  shape.cooperative = mistake != kNotCooperative;
  return launch(shape, broadcast, in, shared_data, flag, out, mistake);
}
TEST_EXPORT int run_last_block(float* partial, unsigned* count, float* out, int blocks, int with_fence) {
  return launch({dim3(blocks), dim3(1)}, last_block, partial, count, out, with_fence);
}
