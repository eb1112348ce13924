// Launching a kernel: shared memory above 48 KB, clusters, and whether it overlaps with the kernel before.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/context.h"

namespace flashkda {

struct Launch {
  dim3 grid;
  int threads;
  int shared_bytes;
  bool overlap = false;  // it need not wait for the kernel before
  int cluster = 1;       // blocks, on multiprocessors next to each other
};

// A launch in the form of the runtime, which points into it.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Launch& launch, cudaStream_t stream) {
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (launch.overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(launch.cluster), 1, 1};
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Lets a kernel have that much dynamic shared memory: once a device; again does no harm.
template <auto kKernel>
cudaError_t allow_shared_bytes(int shared_bytes) {
  static std::atomic<uint64_t> devices{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device >= 64 || !(devices.load() & bit)) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    devices.fetch_or(bit);
  }
  return cudaSuccess;
}

// Whether all clusters of a launch run at the same time where no other kernel runs. A thread asks once a context, since
// green contexts have some multiprocessors of a device only; such a part has no room for clusters that fill GPCs.
template <auto kKernel>
bool has_room_for_clusters(const Launch& launch) {
  thread_local unsigned long long asked = 0;
  thread_local int clusters = 0;  // that run at the same time
  const unsigned long long context = current_context_id();
  if (context == 0 || context != asked) {
    Launch one_cluster = launch;
    one_cluster.grid = dim3(launch.cluster);
    const LaunchConfig configured(one_cluster, nullptr);
    asked = context;
    if (is_part_of_device() || allow_shared_bytes<kKernel>(launch.shared_bytes) != cudaSuccess ||
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&clusters, kKernel, &configured.config) != cudaSuccess) {
      cudaGetLastError();
      clusters = 0;
    }
  }
  return clusters >= int(launch.grid.x) / launch.cluster;
}

template <auto kKernel, typename Arguments>
cudaError_t launch(const Arguments& arguments, const Launch& launch, cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes<kKernel>(launch.shared_bytes);
  if (error != cudaSuccess) return error;
  const LaunchConfig configured(launch, stream);
  return cudaLaunchKernelEx(&configured.config, kKernel, arguments);
}

}  // namespace flashkda
