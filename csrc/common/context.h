// The driver's current context, which the runtime follows and does not tell of. The extension links no libcuda: the
// driver's functions are found at run time.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

namespace flashkda {

// A function of the driver as of that CUDA version, or null where the driver has none.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result);
  const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<Function>(function) : nullptr;
}

// The context that is current in this thread: a device's primary one, or a green one with some of its multiprocessors.
// Null where there is none yet.
inline CUcontext current_context() {
  static const auto get = driver_function<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent", 4000);
  CUcontext context = nullptr;
  return get && get(&context) == CUDA_SUCCESS ? context : nullptr;
}

// The device of the current context; -1 where there is none.
inline int current_context_device() {
  static const auto get = driver_function<PFN_cuCtxGetDevice_v2000>("cuCtxGetDevice", 2000);
  CUdevice device;
  return get && get(&device) == CUDA_SUCCESS ? int(device) : -1;
}

// A number that no other context has, before or after; 0 where the driver cannot tell.
inline unsigned long long current_context_id() {
  static const auto get = driver_function<PFN_cuCtxGetId_v12000>("cuCtxGetId", 12000);
  unsigned long long id = 0;
  return get && get(current_context(), &id) == CUDA_SUCCESS ? id : 0;
}

inline bool make_context_current(CUcontext context) {
  static const auto set = driver_function<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent", 4000);
  return set && set(context) == CUDA_SUCCESS;
}

// Whether the current context has fewer multiprocessors than its device: a green context.
inline bool is_part_of_device() {
  static const auto resource_of = driver_function<PFN_cuCtxGetDevResource_v12040>("cuCtxGetDevResource", 12040);
  CUdevResource resource = {};
  int device = 0, count = 0;
  if (!resource_of || resource_of(current_context(), &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) return false;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return false;
  return int(resource.sm.smCount) < count;
}

}  // namespace flashkda
