// Launches the kernels of misuse.cu; called through ctypes by tests/cuda/test_emulator.py.
#include <cuda_runtime_api.h>

#include <string>

#include "misuse.h"

namespace {
std::string message;

cudaError_t launch(const void* kernel, Params& params, unsigned threads, unsigned cluster, bool overlaps) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 8192 + 1024 + 64;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  if (overlaps) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int rule_count() { return int(sizeof kRules / sizeof kRules[0]); }
EXPORT const char* rule_name(int rule) { return kRules[rule].name; }

// The emulator's error, or "". `data`: 64 x 64 elements, `out`: 128.
EXPORT const char* break_rule(int rule, uint16_t* data, uint16_t* out, unsigned extra_threads) {
  void* entry = nullptr;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, nullptr);
  Params params{{}, data, out, rule};
  const cuuint64_t size[2] = {64, 64}, pitch[1] = {128};
  const cuuint32_t box[2] = {64, 64}, steps[2] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &params.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, size, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  const cudaError_t error = launch(misuse_kernel(), params, kRules[rule].threads + extra_threads,
                                   kRules[rule].cluster, false);
  message = error == cudaSuccess ? "" : cudaGetErrorString(error);
  return message.c_str();
}

// Call between emu_configure(.., deferred = 1) and emu_flush.
EXPORT int overlap(uint16_t* data, uint16_t* out, int waits) {
  Params params{{}, data, out, waits};
  if (launch(slow_reader_kernel(), params, 32, 1, false) != cudaSuccess) return 1;
  return launch(writer_kernel(), params, 32, 1, true) != cudaSuccess;
}
