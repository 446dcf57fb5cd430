// What a translated kernel sees instead of nvcc: CUDA's keywords, built-in variables and intrinsics. Force-included.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ptx.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emu {

struct Place {
  uint3 thread, block;
  dim3 grid, threads;
};
extern Place* place;  // of the running fiber

// First statement of every kernel (translate.py puts it there). True: the launcher only asks what the kernel takes.
bool only_asked(size_t parameter_bytes, int max_threads, int min_blocks = 1);

uint8_t* dynamic_smem();
void* static_smem_bytes(size_t bytes, const void* key);
template <class T>
T& static_smem() {
  static const char key = 0;
  return *static_cast<T*>(static_smem_bytes(sizeof(T), &key));
}
uint64_t shared_address(const void* p);
uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane);

}  // namespace emu

#define threadIdx (::emu::place->thread)
#define blockIdx (::emu::place->block)
#define gridDim (::emu::place->grid)
#define blockDim (::emu::place->threads)

inline void __syncthreads() { emu::ptx::bar_sync(0, blockDim.x * blockDim.y * blockDim.z); }
inline uint64_t __cvta_generic_to_shared(const void* p) { return emu::shared_address(p); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  static_assert(sizeof(T) == 4, "the emulator shuffles 32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emu::shuffle(mask, bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int offset) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ offset);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __expf(float v) { return std::exp(v); }
// CUDA C++ Programming Guide, "Intrinsic Functions": for 2^126 < |y| < 2^128 the quotient is 0, or NaN if x is infinite.
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f && std::isfinite(y) ? 0.0f * x : x / y; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
