// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/tile_counter.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace online_attention::cuda::hopper {
namespace {

constexpr int kCounters = 1024;
constexpr int kWordsApart = 32;                         // a cache line each
__device__ uint32_t counters[kCounters * kWordsApart];  // of each device, 0 from the start

struct Owner {
  int device;
  unsigned long long stream;  // its id, which no later stream gets again
  uint32_t* counter;
};

// nullptr: there is none for this stream.
uint32_t* owned_counter(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  int device = 0;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess ||
      capture != cudaStreamCaptureStatusNone || cudaStreamGetId(stream, &id) != cudaSuccess ||
      cudaGetDevice(&device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // or the next launch would report it
    return nullptr;
  }
  static std::mutex mutex;
  static std::vector<Owner> owners;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto is_same = [&](const Owner& o) { return o.device == device && o.stream == id; };
  const auto known = std::find_if(owners.begin(), owners.end(), is_same);
  if (known != owners.end()) return known->counter;
  const auto taken = std::count_if(owners.begin(), owners.end(),
                                   [&](const Owner& o) { return o.device == device; });
  void* first = nullptr;
  if (taken == kCounters || cudaGetSymbolAddress(&first, counters) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  uint32_t* counter = static_cast<uint32_t*>(first) + taken * kWordsApart;
  owners.push_back({device, id, counter});
  return counter;
}

}  // namespace

Status zeroed_counter(void* stream, void* spare, uint32_t*& counter) {
  const auto on = static_cast<cudaStream_t>(stream);
  counter = owned_counter(on);
  if (counter != nullptr) return kOk;
  counter = static_cast<uint32_t*>(spare);
  const cudaError_t error = cudaMemsetAsync(counter, 0, sizeof(*counter), on);
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

}  // namespace online_attention::cuda::hopper
