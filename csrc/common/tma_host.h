// Tensor maps on the host: cuTensorMapEncodeTiled through the driver entry point (so the module links no libcuda and imports
// on a machine without a driver) and a cache, because encoding on every call would cost more than the launch.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "layout.h"

namespace npt {

// A row-major [outer, inner] matrix of 16-bit elements, `ld` elements from row to row, seen through boxes.
struct MapKey {
  const void* ptr;
  int64_t inner, outer, ld;
  int32_t box_inner, box_outer;
  Dtype dtype;

  bool operator==(const MapKey& o) const {
    return ptr == o.ptr && inner == o.inner && outer == o.outer && ld == o.ld && box_inner == o.box_inner &&
           box_outer == o.box_outer && dtype == o.dtype;
  }
};

struct MapKeyHash {
  size_t operator()(const MapKey& k) const {
    uint64_t h = 0x9E3779B97F4A7C15ull;
    for (uint64_t v : {uint64_t(reinterpret_cast<uintptr_t>(k.ptr)), uint64_t(k.inner), uint64_t(k.outer), uint64_t(k.ld),
                       uint64_t(k.box_inner), uint64_t(k.box_outer), uint64_t(k.dtype)}) {
      h ^= v + 0x9E3779B97F4A7C15ull + (h << 6) + (h >> 2);
    }
    return size_t(h);
  }
};

// Raises with the offending value; `what` names the operand. These are TMA's own rules.
inline void check_map(const MapKey& k, const std::string& what) {
  const auto fail = [&](const std::string& why) { throw std::invalid_argument("npt_kernels cuda: " + what + " " + why); };
  const uintptr_t address = reinterpret_cast<uintptr_t>(k.ptr);
  char hex[32];
  std::snprintf(hex, sizeof(hex), "0x%llx", static_cast<unsigned long long>(address));
  if (address == 0) fail("is a null pointer");
  if (address % 16 != 0) fail("starts at " + std::string(hex) + ", which is not a multiple of 16 bytes");
  if (k.inner < 1 || k.outer < 1) fail("has an empty side: [" + std::to_string(k.outer) + ", " + std::to_string(k.inner) + "]");
  if (k.inner > kMaxColumns || k.outer > INT32_MAX) {
    fail("is [" + std::to_string(k.outer) + ", " + std::to_string(k.inner) + "]; TMA's limits here are [2^31 - 1, 2^30 - 1024]");
  }
  if (k.ld < k.inner) fail("has row pitch " + std::to_string(k.ld) + " below its width " + std::to_string(k.inner));
  if (k.ld % 8 != 0) fail("has row pitch " + std::to_string(k.ld) + " elements; TMA needs a multiple of 16 bytes (8 elements)");
  if (uint64_t(k.ld) * 2 >= (uint64_t(1) << 40)) fail("has row pitch " + std::to_string(k.ld) + " elements, beyond 2^40 bytes");
  if (k.box_inner != kChunkCols || k.box_outer < 1 || k.box_outer > 256) fail("has a box outside TMA's limits");
}

class TensorMapCache {
 public:
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

  explicit TensorMapCache(Encode encoder = nullptr) : encoder_(encoder) {}  // null: the driver's

  CUtensorMap get(const MapKey& key, const std::string& what) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = maps_.find(key);
    if (found != maps_.end()) return found->second;
    check_map(key, what);
    // A map holds an address and a shape, nothing that goes stale when memory is freed; the bound only limits memory.
    if (maps_.size() >= kLimit) maps_.clear();
    return maps_.emplace(key, encode(key, what)).first->second;
  }
  size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return maps_.size();
  }

 private:
  static constexpr size_t kLimit = 16384;  // 128 bytes each

  static Encode driver() {
    static const Encode function = [] {
      void* entry = nullptr;
      cudaDriverEntryPointQueryResult found;
      const cudaError_t error =
          cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
      if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || entry == nullptr) {
        throw std::runtime_error(std::string("npt_kernels cuda: the driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer is "
                                             "needed): ") +
                                 cudaGetErrorString(error));
      }
      return reinterpret_cast<Encode>(entry);
    }();
    return function;
  }

  CUtensorMap encode(const MapKey& k, const std::string& what) const {
    CUtensorMap map;
    const cuuint64_t dims[2] = {cuuint64_t(k.inner), cuuint64_t(k.outer)};
    const cuuint64_t strides[1] = {cuuint64_t(k.ld) * 2};
    const cuuint32_t box[2] = {cuuint32_t(k.box_inner), cuuint32_t(k.box_outer)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = (encoder_ != nullptr ? encoder_ : driver())(
        &map, k.dtype == Dtype::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void*>(k.ptr), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // NONE fills with zeros
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("npt_kernels cuda: cuTensorMapEncodeTiled refused " + what + " with CUresult " +
                               std::to_string(int(result)));
    }
    return map;
  }

  const Encode encoder_;
  std::mutex mutex_;
  std::unordered_map<MapKey, CUtensorMap, MapKeyHash> maps_;
};

}  // namespace npt
