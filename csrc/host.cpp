// CUDA runtime calls that the launchers share.
#include "host.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace npt {
namespace {

CUresult encode_nothing(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                        const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                        CUtensorMapFloatOOBfill) {
  *map = CUtensorMap{};
  return CUDA_SUCCESS;
}

// Once per kernel and device.
void allow_smem(const void* function, int smem, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> done;
  std::lock_guard<std::mutex> lock(mutex);
  if (done.emplace(std::make_pair(function, device), true).second) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (error != cudaSuccess) done.erase({function, device});
    check_cuda(error, "cudaFuncSetAttribute");
  }
}

}  // namespace

void fail(const std::string& why) { throw std::invalid_argument("npt_kernels cuda: " + why); }

void check_cuda(int error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("npt_kernels cuda: ") + what + ": " + cudaGetErrorString(cudaError_t(error)));
  }
}

void use_device(int device) {
  if (device != kDryRun) check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

TensorMapCache& maps(int device) {
  static TensorMapCache real;
  static TensorMapCache dry(&encode_nothing);
  return device == kDryRun ? dry : real;
}

int sm_count(int device) {
  if (device == kDryRun) return kDryRunSms;
  static std::mutex mutex;
  static std::map<int, int> counts;
  std::lock_guard<std::mutex> lock(mutex);
  int& count = counts[device];
  if (count == 0) check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

LaunchPlan launch_kernel(const void* function, const LaunchPlan& plan, void* parameters, int device, void* stream) {
  if (device == kDryRun) return plan;
  if (plan.smem > 48 * 1024) allow_smem(function, plan.smem, device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.grid_x), unsigned(plan.grid_y), unsigned(plan.grid_z));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.smem);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (plan.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = unsigned(plan.cluster);
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (plan.overlap) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {parameters};
  check_cuda(cudaLaunchKernelExC(&config, function, arguments), "kernel launch");
  return plan;
}

}  // namespace npt
