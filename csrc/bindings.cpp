// flashkda_ops._C: addresses, sizes, strides and a stream in, one launch out. Importing it makes no CUDA call.
//
// An op is one function here, taking keywords alone, that fills the op's params, has them checked and launches. Tensors are
// described in flashkda_ops/cuda.py; validation for users happens before that, in the op itself.

#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "params.h"
#include "sm90/recurrent_kda/config.h"
#include "sm90/recurrent_kda/launch.h"

namespace py = pybind11;

namespace flashkda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The caller has made `device` current in its own CUDA runtime. This one, linked statically, follows the driver's current
// context, but may not have met it yet in this thread; nothing is restored, since nothing changes for the caller.
void use_device(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
}

int sm_count(int device) {
  static std::array<std::atomic<int>, 64> counts{};
  const bool cached = device >= 0 && device < int(counts.size());
  if (cached && counts[device] > 0) return counts[device];
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (cached) counts[device] = count;
  return count;
}

template <typename T = const void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Strides strides(const std::array<int64_t, 2>& sequence_and_head) { return {sequence_and_head[0], sequence_and_head[1]}; }

}  // namespace
}  // namespace flashkda
