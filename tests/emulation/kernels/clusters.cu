// Kernels of clusters: data that travels through the blocks' shared memory; and mistakes in them.
#include "cuda/wait.cuh"
#include "launch.h"

namespace {

// Each block sums what all blocks of its cluster hold.
__global__ void sum_of_cluster(const float* in, float* out, int mistake) {
  float* own = frnn::shared_memory<float>();
  const unsigned i = threadIdx.x, size = frnn::cluster_size();
  own[i] = in[blockIdx.x * blockDim.x + i];
  frnn::cluster_arrive();
  if (mistake == 1 && i == 7) {
    out[blockIdx.x * blockDim.x + i] = *frnn::pointer_at_rank(own + i, (frnn::cluster_rank() + 1) % size);
  }
  frnn::cluster_wait();
  float sum = 0.0f;
  for (unsigned rank = 0; rank < size; ++rank) {
    if (rank % 2 == 0) {
      sum += *frnn::pointer_at_rank(own + i, rank);
    } else {
      sum += frnn::load_cluster<float>(frnn::address_at_rank(frnn::shared_address(own + i), rank));
    }
  }
  out[blockIdx.x * blockDim.x + i] = sum;
  // A block must not leave while another may read from it.
  if (mistake == 2) return;
  frnn::cluster_arrive();
  frnn::cluster_wait();
}

enum RingKind {
  kByTheLetter,
  kWithoutFences,
  kNoGuard,
  kBlockReach,
  kNoWait,
  kWrongParity,
  kFewBytes,
  kLeavesEarly,
  kNeverSends,
  kArrivesTwice,
};

// Every block holds 4 values a thread and each step sends them to the next block, double-buffered: st.async and a full
// mbarrier one way, an empty mbarrier the other. After `steps` steps the values have travelled so far around the ring.
__global__ void ring(float* data, int steps, int kind) {
  struct Buffers {
    uint64_t full[2], empty[2];
    alignas(16) float4 values[2][64];
  };
  Buffers* own = frnn::shared_memory<Buffers>();
  const unsigned i = threadIdx.x, size = frnn::cluster_size(), rank = frnn::cluster_rank();
  const unsigned next = (rank + 1) % size, previous = (rank + size - 1) % size;
  if (i == 0) {
    for (int b = 0; b < 2; ++b) {
      frnn::mbarrier_init(&own->full[b], 1);
      frnn::mbarrier_init(&own->empty[b], blockDim.x);
    }
  }
  frnn::cluster_arrive();
  frnn::cluster_wait();
  float4 value = reinterpret_cast<const float4*>(data)[blockIdx.x * blockDim.x + i];
  for (int step = 0; step < steps; ++step) {
    const int b = step % 2;
    const unsigned parity = (step / 2) % 2;
    if (i == 0) {
      const unsigned bytes = blockDim.x * sizeof(float4);
      frnn::mbarrier_arrive_expect(&own->full[b], kind == kFewBytes ? bytes - 16 : bytes);
    }
    // The next block has read what was sent two steps ago.
    if (step >= 2 && kind == kByTheLetter) {
      frnn::mbarrier_wait<frnn::Reach::cluster>(&own->empty[b], parity ^ 1);
    } else if (step >= 2 && kind != kNoGuard) {
      frnn::mbarrier_wait<frnn::Reach::block>(&own->empty[b], parity ^ 1);
    }
    const frnn::SharedAddress target = frnn::address_at_rank(frnn::shared_address(&own->values[b][i]), next);
    const frnn::SharedAddress full = frnn::address_at_rank(frnn::shared_address(&own->full[b]), next);
    if (kind != kNeverSends || step < 2) frnn::store_async(target, value, full);
    if (kind == kByTheLetter) {
      frnn::mbarrier_wait<frnn::Reach::cluster>(&own->full[b], parity);
    } else if (kind == kBlockReach) {
      frnn::mbarrier_wait<frnn::Reach::block>(&own->full[b], parity);
    } else if (kind != kNoWait) {
      frnn::mbarrier_wait<frnn::Reach::stores>(&own->full[b], kind == kWrongParity ? parity ^ 1 : parity);
    }
    value = own->values[b][i];
    const frnn::SharedAddress empty = frnn::address_at_rank(frnn::shared_address(&own->empty[b]), previous);
    if (kind == kByTheLetter) {
      frnn::mbarrier_arrive_cluster(empty);
    } else {
      frnn::mbarrier_arrive_after_reads(empty);
    }
    if (kind == kArrivesTwice && i == 0) frnn::mbarrier_arrive(&own->full[b]);
  }
  reinterpret_cast<float4*>(data)[blockIdx.x * blockDim.x + i] = value;
  if (kind == kLeavesEarly) return;
  frnn::cluster_arrive();
  frnn::cluster_wait();
}

// Each block writes into the next one's shared memory, and tells it by an mbarrier.
__global__ void neighbours(float* data, int after_reads, int block_reach) {
  struct Buffers {
    uint64_t full;
    float values[64];
  };
  Buffers* own = frnn::shared_memory<Buffers>();
  const unsigned i = threadIdx.x, next = (frnn::cluster_rank() + 1) % frnn::cluster_size();
  if (i == 0) frnn::mbarrier_init(&own->full, blockDim.x);
  frnn::cluster_arrive();
  frnn::cluster_wait();
  float* mine = data + blockIdx.x * blockDim.x + i;
  frnn::store_cluster(frnn::address_at_rank(frnn::shared_address(&own->values[i]), next), *mine);
  const frnn::SharedAddress full = frnn::address_at_rank(frnn::shared_address(&own->full), next);
  if (after_reads) {
    frnn::mbarrier_arrive_after_reads(full);
  } else {
    frnn::mbarrier_arrive_cluster(full);
  }
  if (block_reach) {
    frnn::mbarrier_wait<frnn::Reach::stores>(&own->full, 0);
  } else {
    while (!frnn::mbarrier_try_wait<frnn::Reach::cluster>(&own->full, 0)) {
    }
  }
  *mine = own->values[i];
  frnn::cluster_arrive();
  frnn::cluster_wait();
}

}  // namespace

TEST_EXPORT int run_sum_of_cluster(const float* in, float* out, int clusters, int size, int threads,
                                   int mistake) {
  if (size > 8) {
    const int error = cudaFuncSetAttribute(sum_of_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error) return error;
  }
  Shape shape{dim3(clusters * size), dim3(threads), threads * sizeof(float)};
  shape.cluster = size;
  return launch(shape, sum_of_cluster, in, out, mistake);
}
TEST_EXPORT int run_ring(float* data, int size, int threads, int steps, int kind) {
  Shape shape{dim3(size), dim3(threads), 4096};
  shape.cluster = size;
  return launch(shape, ring, data, steps, kind);
}
TEST_EXPORT int run_neighbours(float* data, int size, int threads, int after_reads, int block_reach) {
  Shape shape{dim3(size), dim3(threads), 1024};
  shape.cluster = size;
  return launch(shape, neighbours, data, after_reads, block_reach);
}
