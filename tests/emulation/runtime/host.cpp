// The host side of the emulated device: what it is like, what fits on it, and launches.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "exported.h"
#include "races.h"
#include "state.h"

namespace frnn_emulation {
namespace {

// An H200, but for its name.
constexpr int kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr uint64_t kSharedPerMultiprocessor = 228 << 10, kSharedPerBlock = 227 << 10,
                   kSharedByDefault = 48 << 10;
constexpr uint64_t kSharedReserved = 1 << 10;
constexpr int kL2Bytes = 60 << 20;
constexpr uint64_t kMemoryBytes = uint64_t{141} << 30;
int multiprocessors = 132;
bool capturing = false, old_driver = false;
int threads_of_kernels = kThreadsOfBlock;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

struct KernelSettings {
  uint64_t shared_bytes = kSharedByDefault;
  bool large_clusters = false;
};
std::map<const void*, KernelSettings> settings;
std::mutex one_launch;
cudaError_t sticky = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) sticky = error;
  return error;
}

cudaError_t refuse(const void* kernel, cudaError_t error, const std::string& why) {
  launch_state.kernel = kernel;
  Failure failure;
  failure.text = "not launched: " + why;
  last_error = render(failure);
  last_error_code = error;
  return remember(error);
}

std::string text(const dim3& v) {
  return std::to_string(v.x) + " x " + std::to_string(v.y) + " x " + std::to_string(v.z);
}

uint64_t volume(const dim3& v) { return uint64_t{v.x} * v.y * v.z; }

int blocks_per_multiprocessor(uint64_t threads, uint64_t shared_bytes) {
  const uint64_t warps = (threads + kLanes - 1) / kLanes;
  const uint64_t by_threads = kThreadsPerMultiprocessor / kLanes / std::max<uint64_t>(warps, 1);
  const uint64_t by_shared = kSharedPerMultiprocessor / (shared_bytes + kSharedReserved);
  return static_cast<int>(std::min<uint64_t>({by_threads, by_shared, kBlocksPerMultiprocessor}));
}

// Blocks that run at the same time, in the order in which they do.
std::vector<std::vector<uint32_t>> batches() {
  const Launch& launch = launch_state;
  const auto count = static_cast<uint32_t>(volume(launch.grid));
  std::vector<std::vector<uint32_t>> all;
  if (launch.cooperative) {
    all.emplace_back();
    for (uint32_t block = 0; block < count; ++block) all.back().push_back(block);
    return all;
  }
  const dim3 &grid = launch.grid, &cluster = launch.cluster;
  all.resize(count / volume(cluster));
  for (uint32_t block = 0; block < count; ++block) {
    const uint32_t x = block % grid.x, y = block / grid.x % grid.y, z = block / grid.x / grid.y;
    all[(z / cluster.z * (grid.y / cluster.y) + y / cluster.y) * (grid.x / cluster.x) + x / cluster.x]
        .push_back(block);
  }
  for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[random_below(i)]);
  return all;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Arguments& arguments) {
  if (in_kernel) return cudaErrorNotSupported;
  const std::lock_guard<std::mutex> lock(one_launch);
  Launch& launch = launch_state;
  launch.kernel = kernel;
  launch.arguments = arguments;
  launch.grid = config.gridDim;
  launch.block = config.blockDim;
  launch.cluster = dim3(1, 1, 1);
  launch.cooperative = false;
  launch.shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      launch.cluster =
          dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    }
  }
  const uint64_t blocks = volume(launch.grid), threads = volume(launch.block),
                 cluster = volume(launch.cluster);
  if (threads == 0 || threads > kThreadsOfBlock || blocks == 0) {
    return refuse(kernel, cudaErrorInvalidConfiguration,
                  "a grid of " + text(launch.grid) + " blocks of " + text(launch.block) + " threads");
  }
  if (launch.grid.y > 65535 || launch.grid.z > 65535) {
    return refuse(kernel, cudaErrorInvalidConfiguration, "a grid of " + text(launch.grid) + " blocks");
  }
  if (blocks > kMostBlocks) return refuse(kernel, cudaErrorNotSupported, "too many blocks for the emulation");
  const KernelSettings& allowed = settings[kernel];
  if (launch.shared_bytes > allowed.shared_bytes) {
    return refuse(kernel, cudaErrorInvalidValue,
                  std::to_string(launch.shared_bytes) + " bytes of shared memory, but at most " +
                      std::to_string(allowed.shared_bytes) + " without cudaFuncSetAttribute");
  }
  if (cluster == 0 || launch.grid.x % launch.cluster.x || launch.grid.y % launch.cluster.y ||
      launch.grid.z % launch.cluster.z) {
    return refuse(kernel, cudaErrorInvalidConfiguration,
                  "a grid of " + text(launch.grid) + " blocks in clusters of " + text(launch.cluster));
  }
  if (cluster > (allowed.large_clusters ? 16 : 8)) {
    return refuse(kernel, cudaErrorInvalidConfiguration,
                  "a cluster of " + std::to_string(cluster) + " blocks");
  }
  launch.threads = static_cast<uint32_t>(threads);
  const uint64_t room = uint64_t(blocks_per_multiprocessor(threads, launch.shared_bytes)) * multiprocessors;
  if (launch.cooperative && blocks > room) {
    return refuse(kernel, cudaErrorCooperativeLaunchTooLarge,
                  "a cooperative launch of " + std::to_string(blocks) + " blocks, where " +
                      std::to_string(room) + " can run at once");
  }
  if ((launch.cooperative ? blocks : cluster) > kSlots) {
    return refuse(kernel, cudaErrorNotSupported, "too many blocks at once for the emulation");
  }
  launch.failure = Failure();
  ++launch.number;
  launch.base += launch.last_time;
  launch.last_time = 0;
  forget_readers();
  forget_publications();
  start_watchdog();
  for (const std::vector<uint32_t>& batch : batches()) {
    run_batch(batch);
    if (launch.failure.error != cudaSuccess) break;
  }
  stop_watchdog();
  if (launch.failure.error != cudaSuccess) {
    last_error = render(launch.failure);
    last_error_code = launch.failure.error;
  }
  return remember(launch.failure.error);
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(one_launch);
  KernelSettings& kernel_settings = settings[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<uint64_t>(value) > kSharedPerBlock) return remember(cudaErrorInvalidValue);
    kernel_settings.shared_bytes = static_cast<uint64_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    kernel_settings.large_clusters = value != 0;
  }
  return cudaSuccess;
}

// On a GPU the first question loads the kernel.
cudaError_t get_attributes(cudaFuncAttributes* attributes) {
  if (capturing && capture_mode != cudaStreamCaptureModeRelaxed)
    return remember(cudaErrorStreamCaptureUnsupported);
  attributes->maxThreadsPerBlock = threads_of_kernels;
  return cudaSuccess;
}

cudaError_t active_blocks(int* count, int threads, size_t shared_bytes) {
  *count = blocks_per_multiprocessor(static_cast<uint64_t>(threads), shared_bytes);
  return cudaSuccess;
}

cudaError_t active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard<std::mutex> lock(one_launch);
  uint64_t cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = uint64_t{size.x} * size.y * size.z;
  }
  const KernelSettings& allowed = settings[kernel];
  *count = 0;
  if (cluster == 0 || cluster > (allowed.large_clusters ? 16 : 8) ||
      config.dynamicSmemBytes > allowed.shared_bytes) {
    return remember(cudaErrorInvalidValue);
  }
  // A cluster lies within a group of multiprocessors: 16 of them.
  const uint64_t blocks =
      uint64_t(blocks_per_multiprocessor(volume(config.blockDim), config.dynamicSmemBytes));
  *count = static_cast<int>(uint64_t(multiprocessors / 16) * (16 * blocks / cluster) +
                            uint64_t(multiprocessors % 16) * blocks / cluster);
  return cudaSuccess;
}

}  // namespace frnn_emulation

using namespace frnn_emulation;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(e) \
  case e:       \
    return #e;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorMemoryAllocation)
    NAME(cudaErrorInvalidConfiguration)
    NAME(cudaErrorInsufficientDriver)
    NAME(cudaErrorNoDevice)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorIllegalAddress)
    NAME(cudaErrorLaunchOutOfResources)
    NAME(cudaErrorLaunchTimeout)
    NAME(cudaErrorMisalignedAddress)
    NAME(cudaErrorLaunchFailure)
    NAME(cudaErrorCooperativeLaunchTooLarge)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorStreamCaptureUnsupported)
#undef NAME
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaSuccess && error == last_error_code) return last_error.c_str();
  return cudaGetErrorName(error);
}
cudaError_t cudaGetLastError() { return std::exchange(sticky, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return sticky; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = old_driver ? 0 : 1;
  return old_driver ? remember(cudaErrorInsufficientDriver) : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (old_driver) return remember(cudaErrorInsufficientDriver);
  if (device != 0) return remember(cudaErrorInvalidDevice);
  *properties = cudaDeviceProp();
  strcpy(properties->name, "emulated");
  properties->major = 9;
  properties->multiProcessorCount = multiprocessors;
  properties->l2CacheSize = kL2Bytes;
  properties->warpSize = kLanes;
  properties->maxThreadsPerBlock = kThreadsOfBlock;
  properties->maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
  properties->regsPerMultiprocessor = 65536;
  properties->cooperativeLaunch = 1;
  properties->sharedMemPerBlock = kSharedByDefault;
  properties->sharedMemPerBlockOptin = kSharedPerBlock;
  properties->sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
  properties->totalGlobalMem = kMemoryBytes;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(properties.sharedMemPerBlock);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = properties.regsPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.sharedMemPerBlockOptin);
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kSharedReserved;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch:
      *value = 1;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  if (!global_range_is_valid(address, bytes)) {
    last_error = "cudaMemsetAsync of " + std::to_string(bytes) + " bytes: " + describe_global(address);
    last_error_code = cudaErrorInvalidValue;
    return remember(cudaErrorInvalidValue);
  }
  memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

EXPORTED uint32_t frnn_emulation_launches() { return launch_state.number; }
EXPORTED void frnn_emulation_set_threads_of_kernels(int count) { threads_of_kernels = count; }
EXPORTED void frnn_emulation_set_old_driver(bool is) { old_driver = is; }
EXPORTED void frnn_emulation_set_capturing(bool is) { capturing = is; }
EXPORTED void frnn_emulation_set_multiprocessors(int count) { multiprocessors = count; }
EXPORTED const char* frnn_emulation_last_error() { return last_error.c_str(); }
