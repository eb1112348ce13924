// Words that begin as zeros.
#pragma once

#include <cuda_runtime.h>

namespace flashkda::chunk_kda {

// Who reads the words waits for this kernel, and the rest of the launch need not.
static __global__ void clear_kernel(int* words, int count) {
  cudaTriggerProgrammaticLaunchCompletion();
  for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
}

inline cudaError_t clear(int* words, int count, cudaStream_t stream) {
  clear_kernel<<<1, count <= 1024 ? 128 : 1024, 0, stream>>>(words, count);
  return cudaGetLastError();
}

}  // namespace flashkda::chunk_kda
