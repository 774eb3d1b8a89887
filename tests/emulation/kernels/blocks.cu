// Kernels whose blocks know nothing of each other: barriers, shuffles, votes, atomics, vectors; and mistakes in them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"
#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void reverse(const float* in, float* out, int n) {
  float* kept = frnn::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  kept[i] = in[blockIdx.x * n + i];
#ifndef WITHOUT_BARRIER
  __syncthreads();
#endif
  out[blockIdx.x * n + i] = kept[n - 1 - i];
}

// The second round writes what slow threads may still read in the first.
__global__ void rotate(float* data, int n, int rounds) {
  float* kept = frnn::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  float value = data[i];
  for (int round = 0; round < rounds; ++round) {
    kept[i] = value;
    __syncthreads();
    value = kept[(i + 1) % n];
#ifndef WITHOUT_SECOND_BARRIER
    __syncthreads();
#endif
  }
  data[i] = value;
}

__global__ void sum(const __nv_bfloat16* in, float* out, int* blocks_done, int n) {
  float* partial = frnn::shared_memory<float>();
  float s = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += __bfloat162float(in[blockIdx.x * n + i]);
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(kAll, s, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  s = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
  for (int d = 16; d > 0; d /= 2) s += __shfl_down_sync(kAll, s, d);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = s;
    atomicAdd(blocks_done, 1);
  }
}

// Inclusive scan of one block; a vote tells whether all are positive.
__global__ void scan(const int* in, int* out, int* all_positive) {
  int* ends = frnn::shared_memory<int>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own = in[threadIdx.x];
  int value = own;
  for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(kAll, value, d);
    if (lane >= d) value += before;
  }
  if (lane == 31) ends[warp] = value;
  const int positive = __syncthreads_and(own > 0);
  for (int w = 0; w < warp; ++w) value += ends[w];
  out[threadIdx.x] = value;
  if (threadIdx.x == 0) *all_positive = positive;
}

__global__ void copy_vectors(const uint4* in, uint4* out) { out[threadIdx.x] = __ldg(in + threadIdx.x); }
__global__ void copy_vectors(const float2* in, float2* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void to_half(const float* in, __half* half, __nv_bfloat16* bfloat) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  half[i] = __float2half_rn(in[i]);
  bfloat[i] = __float2bfloat16_rn(in[i]);
}

__global__ void from_half(const __half* half, const __nv_bfloat16* bfloat, float* out_half,
                          float* out_bfloat) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out_half[i] = __half2float(half[i]);
  out_bfloat[i] = __bfloat162float(bfloat[i]);
}

__global__ void nothing() {}

enum Mistake {
  kNone,
  kReadsAfterEnd,
  kWritesBefore,
  kHostMemory,
  kSharedAfterEnd,
  kOthersStack,
  kSameValue,
  kBytesOfAWord,
  kBarrierInBranch,
  kMissingLane,
  kShuffleOrders,
  kSpinsForEver,
  kLoopsForEver,
  kPlainFlag,
  kUninitialised,
};

__global__ void mistaken(int mistake, float* data, int n, float* elsewhere) {
  float* shared = frnn::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  float own = static_cast<float>(i);
  switch (mistake) {
    case kNone:  // bytes of one word belong to different threads, which is no race
      reinterpret_cast<unsigned char*>(data)[i] = static_cast<unsigned char>(i);
      break;
    case kReadsAfterEnd:
      if (i == 3) elsewhere[0] = data[n];
      break;
    case kWritesBefore:
      if (i == 3) data[-1] = 0.0f;
      break;
    case kHostMemory:
      if (i == 3) elsewhere[0] = 0.0f;
      break;
    case kSharedAfterEnd:
      if (i == 3) shared[blockDim.x] = 0.0f;
      break;
    case kOthersStack: {
      float** addresses = reinterpret_cast<float**>(shared);
      if (i == 0) addresses[0] = &own;
      __syncthreads();
      if (i == 1) data[0] = *addresses[0];
      __syncthreads();
      data[i] = own;
      break;
    }
    case kSameValue:
      data[0] = 1.0f;
      break;
    case kBytesOfAWord:
      if (i == 0) reinterpret_cast<unsigned char*>(data)[1] = 0;
      if (i == 1) reinterpret_cast<unsigned short*>(data)[0] = 0;
      break;
    case kBarrierInBranch:
      if (i < 32) frnn::barrier_sync(1, 64);
      break;
    case kMissingLane:
      if (i != 5) __syncwarp();
      if (i == 5) __shfl_sync(kAll, own, 0);
      break;
    case kShuffleOrders:
      if (i == 0) data[0] = own;
      own = __shfl_sync(kAll, own, 0);
      if (i == 1) data[1] = data[0];
      break;
    case kSpinsForEver:
      if (i == 0) {
        while (*const_cast<const volatile float*>(data) == 0.0f) {
        }
      }
      break;
    case kLoopsForEver:  // what is left of a loop whose load the compiler took out
      if (i == 0) {
        while (n > 0) asm volatile("");
      }
      break;
    case kPlainFlag:
      if (i == 0) data[0] = 1.0f;
      if (i == 33) data[1] = data[0];
      break;
    case kUninitialised:
      data[i] = shared[i];
      break;
  }
}

}  // namespace

TEST_EXPORT int run_reverse(const float* in, float* out, int n, int blocks) {
  return launch({dim3(blocks), dim3(n), n * sizeof(float)}, reverse, in, out, n);
}
TEST_EXPORT int run_rotate(float* data, int n, int rounds) {
  return launch({dim3(1), dim3(n), n * sizeof(float)}, rotate, data, n, rounds);
}
TEST_EXPORT int run_sum(const __nv_bfloat16* in, float* out, int* blocks_done, int n, int blocks,
                        int threads) {
  return launch({dim3(blocks), dim3(threads), 128}, sum, in, out, blocks_done, n);
}
TEST_EXPORT int run_scan(const int* in, int* out, int* all_positive, int threads) {
  return launch({dim3(1), dim3(threads), 128}, scan, in, out, all_positive);
}
TEST_EXPORT int run_copy_16(const uint4* in, uint4* out, int n) {
  return launch({dim3(1), dim3(n)}, static_cast<void (*)(const uint4*, uint4*)>(copy_vectors), in, out);
}
TEST_EXPORT int run_copy_8(const float2* in, float2* out, int n) {
  return launch({dim3(1), dim3(n)}, static_cast<void (*)(const float2*, float2*)>(copy_vectors), in, out);
}
TEST_EXPORT int run_to_half(const float* in, __half* half, __nv_bfloat16* bfloat, int blocks) {
  return launch({dim3(blocks), dim3(256)}, to_half, in, half, bfloat);
}
TEST_EXPORT int run_from_half(const __half* half, const __nv_bfloat16* bfloat, float* out_half,
                              float* out_bfloat, int blocks) {
  return launch({dim3(blocks), dim3(256)}, from_half, half, bfloat, out_half, out_bfloat);
}
TEST_EXPORT int run_mistaken(int mistake, float* data, int n, float* elsewhere, int threads) {
  return launch({dim3(1), dim3(threads), threads * sizeof(float)}, mistaken, mistake, data, n, elsewhere);
}
TEST_EXPORT int run_shared_bytes(int bytes, int allow) {
  if (allow) {
    const int error = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;
  }
  return launch({dim3(1), dim3(32), static_cast<size_t>(bytes)}, nothing);
}
