// What the kernels need and CUDA C++ has no name for: each instruction of PTX is one function, here or, where blocks
// exchange data, in ptx_exchange.cuh. The comment of a function gives the instruction and the architecture that first has
// it; on an older one a call traps, so that every file compiles for every architecture. Under FRNN_EMULATION
// (tests/emulation) the functions have bodies for the host.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#ifdef FRNN_EMULATION
#include <emulation/ptx_hooks.h>
#endif

// The architecture that is compiled for, 900 for sm_90, for `#if`; 0 where host code is compiled.
#if defined(FRNN_EMULATION)
#define FRNN_ARCH 900
#elif defined(__CUDA_ARCH__)
#define FRNN_ARCH __CUDA_ARCH__
#else
#define FRNN_ARCH 0
#endif

namespace frnn {

// ---- Shared memory and its addresses --------------------------------------------------------------------------------

// The dynamic shared memory of the block, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef FRNN_EMULATION
  return reinterpret_cast<T*>(frnn_emulation::dynamic_shared_memory());
#else
  extern __shared__ __align__(128) unsigned char frnn_shared_memory[];
  return reinterpret_cast<T*>(frnn_shared_memory);
#endif
}

// A 32-bit address in the shared memory of the block (shared::cta) or of the cluster (shared::cluster).
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
#ifdef FRNN_EMULATION
  return frnn_emulation::shared_address(pointer);
#else
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#endif
}

// Where block `rank` of the cluster has what this block has at `address`. mapa.shared::cluster, sm_90.
__device__ __forceinline__ SharedAddress address_at_rank(SharedAddress address, unsigned rank) {
#if defined(FRNN_EMULATION)
  return frnn_emulation::address_at_rank(address, rank);
#elif FRNN_ARCH >= 900
  SharedAddress mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  __trap();
  return 0;
#endif
}

// The same for a pointer, to be read and written like any other. mapa, sm_90.
template <class T>
__device__ __forceinline__ T* pointer_at_rank(T* pointer, unsigned rank) {
#if defined(FRNN_EMULATION)
  return static_cast<T*>(frnn_emulation::shared_pointer(address_at_rank(shared_address(pointer), rank)));
#elif FRNN_ARCH >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  __trap();
  return nullptr;
#endif
}

// ---- Matrix products of a warp --------------------------------------------------------------------------------------
//
// acc (16 x 8) += a (16 x k) b (k x 8). With g = lane / 4 and t = lane % 4, a lane holds
//   acc[0..3]: (row g, columns 2t, 2t+1), (row g+8, columns 2t, 2t+1);
//   16-bit types, two values a register, the lower one first; k = 16:
//     a[0..3]: (row g, k 2t, 2t+1), (row g+8, k 2t, 2t+1), (row g, k 2t+8, 2t+9), (row g+8, k 2t+8, 2t+9);
//     b[0..1]: (k 2t, 2t+1, column g), (k 2t+8, 2t+9, column g);
//   k = 8, 16-bit: the first half of each;
//   tf32, k = 8: a[0..3]: (row g, k t), (row g+8, k t), (row g, k t+4), (row g+8, k t+4); b[0..1]: (k t, column g),
//     (k t+4, column g).

// mma.sync.m16n8k16 bf16, sm_80.
__device__ __forceinline__ void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mma(frnn_emulation::Mma::bf16, acc, a, b);
#elif FRNN_ARCH >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// mma.sync.m16n8k16 f16, sm_80.
__device__ __forceinline__ void mma_f16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mma(frnn_emulation::Mma::f16, acc, a, b);
#elif FRNN_ARCH >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// mma.sync.m16n8k8 f16, sm_75.
__device__ __forceinline__ void mma_f16_k8(float (&acc)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mma(frnn_emulation::Mma::f16_k8, acc, a, b);
#elif FRNN_ARCH >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
  __trap();
#endif
}

// mma.sync.m16n8k8 tf32, sm_80. The registers hold what to_tf32 gives.
__device__ __forceinline__ void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mma(frnn_emulation::Mma::tf32, acc, a, b);
#elif FRNN_ARCH >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// The nearest tf32, ties away from zero. cvt.rna.tf32.f32, sm_80.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#if defined(FRNN_EMULATION)
  return frnn_emulation::to_tf32(value);
#elif FRNN_ARCH >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#else
  __trap();
  return 0;
#endif
}

// Four matrices of 8 x 8 16-bit values from shared memory into a fragment's layout. Lane i gives the address of the
// 16 bytes of row i % 8 of matrix i / 8; of matrix j, register j gets (row g, columns 2t, 2t+1), or with kTranspose
// (rows 2t, 2t+1, column g). ldmatrix.x4, sm_75.
template <bool kTranspose = false>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
#if defined(FRNN_EMULATION)
  frnn_emulation::load_matrices(registers, row, kTranspose);
#elif FRNN_ARCH >= 750
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#else
  __trap();
#endif
}

// ---- The special-function unit --------------------------------------------------------------------------------------

// 2^x within 2^-22 of it, or what a denormal is flushed to. ex2.approx.ftz.f32.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef FRNN_EMULATION
  return frnn_emulation::coarse(exp2f(x));
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1 / x within an ulp; 0 of infinities, and of numbers whose reciprocal is denormal. rcp.approx.ftz.f32.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#ifdef FRNN_EMULATION
  return frnn_emulation::coarse(1.0f / x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// ---- Named barriers of a block --------------------------------------------------------------------------------------

// `threads` threads of the block, a multiple of 32, meet at barrier `id` (0 is that of __syncthreads). bar.sync.
__device__ __forceinline__ void barrier_sync(unsigned id, unsigned threads) {
#ifdef FRNN_EMULATION
  frnn_emulation::block_barrier(id, threads, false);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts among them without waiting. bar.arrive.
__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned threads) {
#ifdef FRNN_EMULATION
  frnn_emulation::block_barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- Copies from global to shared memory ----------------------------------------------------------------------------

// 4, 8 or 16 bytes, both addresses aligned to as many. They may be read by this thread after copy_wait, by others after a
// barrier that follows. cp.async.shared.global, sm_80; before that an ordinary copy.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
#if defined(FRNN_EMULATION)
  frnn_emulation::copy_async(shared, global, kBytes);
#elif FRNN_ARCH >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes)
                 : "memory");
  }
#else
  struct alignas(kBytes) Chunk {
    uint32_t word[kBytes / 4];
  };
  *static_cast<Chunk*>(shared) = *static_cast<const Chunk*>(global);
#endif
}

// The copies since the last call become a group. cp.async.commit_group.
__device__ __forceinline__ void copy_commit() {
#if defined(FRNN_EMULATION)
  frnn_emulation::copy_commit();
#elif FRNN_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most the last kGroups groups are under way. cp.async.wait_group.
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
#if defined(FRNN_EMULATION)
  frnn_emulation::copy_wait(kGroups);
#elif FRNN_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace frnn
