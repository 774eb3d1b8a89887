// The instructions by which blocks exchange data while they run: clusters and their shared memory, mbarriers, stores that
// arrive later, strong accesses to global memory. See ptx.cuh for how these functions are written.
#pragma once

#include "ptx.cuh"

namespace frnn {

// ---- Clusters: all of it sm_90 --------------------------------------------------------------------------------------

// %cluster_ctarank.
__device__ __forceinline__ unsigned cluster_rank() {
#if defined(FRNN_EMULATION)
  return frnn_emulation::cluster_rank();
#elif FRNN_ARCH >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// %cluster_nctarank.
__device__ __forceinline__ unsigned cluster_size() {
#if defined(FRNN_EMULATION)
  return frnn_emulation::cluster_size();
#elif FRNN_ARCH >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  __trap();
  return 0;
#endif
}

// All threads of the cluster: what one did before it arrived is visible to all that have waited. Each arrival is
// followed by its wait. barrier.cluster.arrive.release, barrier.cluster.wait.acquire.
__device__ __forceinline__ void cluster_arrive() {
#if defined(FRNN_EMULATION)
  frnn_emulation::cluster_arrive();
#elif FRNN_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(FRNN_EMULATION)
  frnn_emulation::cluster_wait();
#elif FRNN_ARCH >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Plain accesses to any block's shared memory, of 4, 8 or 16 bytes. ld.shared::cluster, st.shared::cluster.
template <class T>
__device__ __forceinline__ T load_cluster(SharedAddress address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  T value{};
#if defined(FRNN_EMULATION)
  value = *static_cast<const T*>(frnn_emulation::shared_pointer(address));
#elif FRNN_ARCH >= 900
  uint32_t word[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(word[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared::cluster.v2.b32 {%0,%1}, [%2];"
                 : "=r"(word[0]), "=r"(word[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
  }
  memcpy(&value, word, sizeof(T));
#else
  __trap();
#endif
  return value;
}
template <class T>
__device__ __forceinline__ void store_cluster(SharedAddress address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#if defined(FRNN_EMULATION)
  *static_cast<T*>(frnn_emulation::shared_pointer(address)) = value;
#elif FRNN_ARCH >= 900
  uint32_t word[sizeof(T) / 4];
  memcpy(word, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(word[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(word[0]), "r"(word[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(word[0]), "r"(word[1]),
                 "r"(word[2]), "r"(word[3])
                 : "memory");
  }
#else
  __trap();
#endif
}

// ---- mbarriers: phases of arrivals and of bytes, in shared memory; all of it sm_90 -----------------------------------
//
// A phase is over when `arrivals` arrivals have come and every expected byte; phases have parities 0, 1, 0, 1, ... Any
// block of the cluster may arrive, only the mbarrier's own may wait.

// What a thread sees once it has waited.
enum class Reach {
  block,  // what threads of its block did before they arrived; and others of the cluster have read what they had to
  stores,  // also what store_async brought. The instruction is that of `block`: PTX promises this for `cluster` only, but
           // every library that waits for data in its own shared memory waits so
  cluster,  // also what other blocks did before mbarrier_arrive_cluster. Empties the L1 cache: on sm_90 a CCTL.IVALL
};

// Others may use it after a barrier that follows: of the cluster, if they are in another block. mbarrier.init.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mbarrier_init(mbarrier, arrivals);
#elif FRNN_ARCH >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}

// Arrives at this block's own; what the thread did before is visible to those of the block that wait for the phase.
// mbarrier.arrive.release.cta.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* mbarrier) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mbarrier_arrive(mbarrier, 0);
#elif FRNN_ARCH >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier))
               : "memory");
#else
  __trap();
#endif
}

// The same, and the phase is to wait for `bytes` more of store_async. mbarrier.arrive.expect_tx.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mbarrier_arrive(mbarrier, bytes);
#elif FRNN_ARCH >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Arrives at any block's of the cluster: what the thread did before is seen by who waits with Reach::cluster. A fence of
// the whole GPU precedes it: on sm_90 a MEMBAR.ALL.GPU. mbarrier.arrive.release.cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(SharedAddress mbarrier) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mbarrier_arrive_cluster(mbarrier, frnn_emulation::Publish::all);
#elif FRNN_ARCH >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  __trap();
#endif
}

// The same without the fence, to say that a buffer in shared memory has been read and may be overwritten: whoever waits
// knows that this thread's reads are done, and nothing of its writes. PTX promises that within a block only; pipelines
// across blocks are built on it all the same, since shared memory is read in order. mbarrier.arrive.
__device__ __forceinline__ void mbarrier_arrive_after_reads(SharedAddress mbarrier) {
#if defined(FRNN_EMULATION)
  frnn_emulation::mbarrier_arrive_cluster(mbarrier, frnn_emulation::Publish::reads);
#elif FRNN_ARCH >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  __trap();
#endif
}

// Whether the last phase of this parity is over. It may take its time to say no. mbarrier.try_wait.parity.acquire.
template <Reach kReach>
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* mbarrier, unsigned parity) {
#if defined(FRNN_EMULATION)
  return frnn_emulation::mbarrier_try_wait(mbarrier, parity, static_cast<frnn_emulation::Wait>(kReach));
#elif FRNN_ARCH >= 900
  uint32_t over;
  if constexpr (kReach == Reach::cluster) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.b32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(mbarrier)), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        " selp.b32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(mbarrier)), "r"(parity)
        : "memory");
  }
  return over != 0;
#else
  __trap();
  return false;
#endif
}

// A store of 4, 8 or 16 bytes, aligned to their number, that arrives some time later and then counts its bytes at an
// mbarrier of the same block. Neither that block nor anything at the address may go away before. In clusters of two blocks
// and more only. st.async.mbarrier::complete_tx::bytes, sm_90.
template <class T>
__device__ __forceinline__ void store_async(SharedAddress address, T value, SharedAddress mbarrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#if defined(FRNN_EMULATION)
  frnn_emulation::store_async(address, &value, sizeof(T), mbarrier);
#elif FRNN_ARCH >= 900
  uint32_t word[sizeof(T) / 4];
  memcpy(word, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(word[0]), "r"(mbarrier)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(address),
        "r"(word[0]), "r"(word[1]), "r"(mbarrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
            address),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(mbarrier)
        : "memory");
  }
#else
  __trap();
#endif
}

// ---- Global memory that blocks exchange during a launch -------------------------------------------------------------
//
// Strong accesses of 4, 8 or 16 bytes (load_relaxed, store_relaxed) and of 4 or 8 (acquire, release), at the scope of the
// GPU. Each is one access: a reader never sees half of a store of the same size. The 16-byte ones are .b128, whose
// atomicity PTX grants; of a vector access (.v4.b32) it grants that of each part only.

template <class T>
__device__ __forceinline__ T load_relaxed(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  T value;
#ifdef FRNN_EMULATION
  frnn_emulation::strong_load(address, &value, sizeof(T), frnn_emulation::Order::relaxed,
                              frnn_emulation::Scope::device);
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else {
    uint64_t bits[2];
    asm volatile(
        "{\n .reg .b128 whole;\n ld.relaxed.gpu.global.b128 whole, [%2];\n mov.b128 {%0, %1}, whole;\n}"
        : "=l"(bits[0]), "=l"(bits[1])
        : "l"(address)
        : "memory");
    memcpy(&value, bits, sizeof(T));
  }
#endif
  return value;
}

template <class T>
__device__ __forceinline__ void store_relaxed(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#ifdef FRNN_EMULATION
  frnn_emulation::strong_store(address, &value, sizeof(T), frnn_emulation::Order::relaxed,
                               frnn_emulation::Scope::device);
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
  } else {
    uint64_t bits[2];
    memcpy(bits, &value, sizeof(T));
    asm volatile(
        "{\n .reg .b128 whole;\n mov.b128 whole, {%1, %2};\n st.relaxed.gpu.global.b128 [%0], whole;\n}" ::
            "l"(address),
        "l"(bits[0]), "l"(bits[1])
        : "memory");
  }
#endif
}

// Two neighbours of 8 bytes, together aligned to 16: one instruction, but each is an access of its own. ld.relaxed.v2,
// st.relaxed.v2.
template <class T>
__device__ __forceinline__ void load_relaxed_both(T (&values)[2], const T* address) {
  static_assert(sizeof(T) == 8, "8 bytes");
#ifdef FRNN_EMULATION
  values[0] = load_relaxed(address);
  values[1] = load_relaxed(address + 1);
#else
  uint64_t bits[2];
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(bits[0]), "=l"(bits[1])
               : "l"(address)
               : "memory");
  memcpy(values, bits, sizeof(bits));
#endif
}
template <class T>
__device__ __forceinline__ void store_relaxed_both(T* address, const T (&values)[2]) {
  static_assert(sizeof(T) == 8, "8 bytes");
#ifdef FRNN_EMULATION
  store_relaxed(address, values[0]);
  store_relaxed(address + 1, values[1]);
#else
  uint64_t bits[2];
  memcpy(bits, values, sizeof(bits));
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(bits[0]), "l"(bits[1])
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ T load_acquire(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  T value;
#ifdef FRNN_EMULATION
  frnn_emulation::strong_load(address, &value, sizeof(T), frnn_emulation::Order::ordered,
                              frnn_emulation::Scope::device);
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else {
    uint64_t bits;
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  }
#endif
  return value;
}

template <class T>
__device__ __forceinline__ void store_release(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
#ifdef FRNN_EMULATION
  frnn_emulation::strong_store(address, &value, sizeof(T), frnn_emulation::Order::ordered,
                               frnn_emulation::Scope::device);
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  } else {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(T));
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
  }
#endif
}

// The upper half of the multiprocessor's clock. %clock_hi.
__device__ __forceinline__ unsigned clock_high() {
#ifdef FRNN_EMULATION
  return frnn_emulation::clock_high();
#else
  unsigned high;
  asm volatile("mov.u32 %0, %%clock_hi;" : "=r"(high));
  return high;
#endif
}

// With one on each side, relaxed accesses order what lies before and after. fence.acq_rel.gpu, .cluster.
__device__ __forceinline__ void fence_device() {
#ifdef FRNN_EMULATION
  frnn_emulation::fence(frnn_emulation::Scope::device);
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_cluster() {
#if defined(FRNN_EMULATION)
  frnn_emulation::fence(frnn_emulation::Scope::cluster);
#elif FRNN_ARCH >= 900
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#else
  __trap();
#endif
}

}  // namespace frnn
