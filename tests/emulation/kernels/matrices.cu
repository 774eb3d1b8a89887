// Matrix instructions against the layouts that ptx.cuh states, copies that arrive later, named barriers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"
#include "launch.h"

namespace {

__device__ unsigned pack(unsigned short low, unsigned short high) {
  return low | static_cast<unsigned>(high) << 16;
}

// c [16, 8] += a [16, k] b [8, k]^T, all of it in one warp. `swapped`: two registers of a change places.
__global__ void product(int kind, const void* a, const void* b, float* c, int swapped) {
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if (kind == 3) {
    const float *fa = static_cast<const float*>(a), *fb = static_cast<const float*>(b);
    unsigned ra[4], rb[2];
    for (int i = 0; i < 4; ++i) ra[i] = frnn::to_tf32(fa[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) rb[i] = frnn::to_tf32(fb[g * 8 + t + i * 4]);
    frnn::mma_tf32(acc, ra, rb);
  } else {
    const int depth = kind == 2 ? 8 : 16;
    const unsigned short *ha = static_cast<const unsigned short*>(a),
                         *hb = static_cast<const unsigned short*>(b);
    unsigned ra[4] = {}, rb[2] = {};
    for (int i = 0; i < depth / 4; ++i) {
      const unsigned short* from = ha + (g + i % 2 * 8) * depth + 2 * t + i / 2 * 8;
      ra[i] = pack(from[0], from[1]);
    }
    for (int i = 0; i < depth / 8; ++i) {
      const unsigned short* from = hb + g * depth + 2 * t + i * 8;
      rb[i] = pack(from[0], from[1]);
    }
    if (swapped) {
      const unsigned kept = ra[1];
      ra[1] = ra[2];
      ra[2] = kept;
    }
    if (kind == 0) frnn::mma_bf16(acc, ra, rb);
    if (kind == 1) frnn::mma_f16(acc, ra, rb);
    if (kind == 2) {
      const unsigned ra8[2] = {ra[0], ra[1]}, rb8[1] = {rb[0]};
      frnn::mma_f16_k8(acc, ra8, rb8);
    }
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

// Four 8 x 8 matrices through shared memory into registers, and out by their layout.
__global__ void matrices(const unsigned short* in, unsigned short* out, int transpose) {
  unsigned short* kept = frnn::shared_memory<unsigned short>();
  for (int i = threadIdx.x; i < 256; i += 32) kept[i] = in[i];
  __syncwarp();
  unsigned registers[4];
  const unsigned short* row = kept + threadIdx.x * 8;
  if (transpose) {
    frnn::load_matrices<true>(registers, row);
  } else {
    frnn::load_matrices(registers, row);
  }
  for (int m = 0; m < 4; ++m) {
    const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
    out[m * 64 + g * 8 + 2 * t] = static_cast<unsigned short>(registers[m]);
    out[m * 64 + g * 8 + 2 * t + 1] = static_cast<unsigned short>(registers[m] >> 16);
  }
}

// Rows of 16 bytes a thread through shared memory, the next row under way while one is used.
__global__ void copies(const float4* in, float4* out, int rows, int mistake) {
  float4* kept = frnn::shared_memory<float4>();
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  frnn::copy_async<16>(&kept[i], &in[i]);
  frnn::copy_commit();
  for (int row = 0; row < rows; ++row) {
    if (row + 1 < rows) frnn::copy_async<16>(&kept[(row + 1) % 2 * n + i], &in[(row + 1) * n + i]);
    frnn::copy_commit();
    if (mistake == 0 || mistake == 2) frnn::copy_wait<1>();
    if (mistake != 2) __syncthreads();
    out[row * n + i] = kept[row % 2 * n + (i + 1) % n];
    __syncthreads();
  }
}

// Producer and consumer warps meet at named barriers: 1 for what is full, 2 for what is empty.
__global__ void hand_over(const float* in, float* out, int rounds, int mistake) {
  float* kept = frnn::shared_memory<float>();
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      if (round > 0 && mistake == 0) frnn::barrier_sync(2, 64);
      kept[lane] = in[round * 32 + lane];
      frnn::barrier_arrive(1, 64);
    }
  } else {
    for (int round = 0; round < rounds; ++round) {
      frnn::barrier_sync(1, 64);
      out[round * 32 + lane] = kept[31 - lane];
      if (round + 1 < rounds && mistake == 0) frnn::barrier_arrive(2, 64);
    }
  }
}

}  // namespace

TEST_EXPORT int run_product(int kind, const void* a, const void* b, float* c, int swapped, int threads) {
  return launch({dim3(1), dim3(threads)}, product, kind, a, b, c, swapped);
}
TEST_EXPORT int run_matrices(const unsigned short* in, unsigned short* out, int transpose) {
  return launch({dim3(1), dim3(32), 512}, matrices, in, out, transpose);
}
TEST_EXPORT int run_copies(const float4* in, float4* out, int rows, int threads, int mistake) {
  return launch({dim3(1), dim3(threads), 2 * threads * sizeof(float4)}, copies, in, out, rows, mistake);
}
TEST_EXPORT int run_hand_over(const float* in, float* out, int rounds, int mistake) {
  return launch({dim3(1), dim3(64), 128}, hand_over, in, out, rounds, mistake);
}
