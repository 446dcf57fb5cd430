// The norm before the MLP with the statistics of t = h + a: a block for each row, which it reads once, 16 bytes a thread and access,
// and keeps in registers as 16-bit pairs; sums in fp32 in a fixed order, the mean before the squares about it. Bound by memory.
#pragma once
#include "../low_rank/rule_math.cuh"
#include "norm_params.h"

namespace npt {

constexpr int kNormWarps = kNormThreads / 32;

// Eight neighbouring elements as four packed pairs; zeros from column `width` on.
template <Dtype kType>
NPT_DEVICE void load_eight(const void* base, int64_t start, int column, const NormParams& p, uint32_t* v) {
  const uint16_t* const at = static_cast<const uint16_t*>(base) + start + column;
  v[0] = v[1] = v[2] = v[3] = 0;
  if (p.vector && column + kNormElements <= p.width) {
    const uint4 all = *reinterpret_cast<const uint4*>(at);
    v[0] = all.x;
    v[1] = all.y;
    v[2] = all.z;
    v[3] = all.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < kNormElements; ++e) {
    if (column + e < p.width) v[e / 2] |= uint32_t(at[e]) << (16 * (e % 2));
  }
}
template <Dtype kType>
NPT_DEVICE void store_eight(void* base, int64_t start, int column, const NormParams& p, const float* x) {
  uint16_t* const at = static_cast<uint16_t*>(base) + start + column;
  uint32_t v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = pack<kType>(x[2 * j], x[2 * j + 1]);
  if (p.vector && column + kNormElements <= p.width) {
    *reinterpret_cast<uint4*>(at) = make_uint4(v[0], v[1], v[2], v[3]);
    return;
  }
#pragma unroll
  for (int e = 0; e < kNormElements; ++e) {
    if (column + e < p.width) at[e] = uint16_t(v[e / 2] >> (16 * (e % 2)));
  }
}
template <Dtype kType>
NPT_DEVICE void unpack_eight(const uint32_t* v, float* x) {
#pragma unroll
  for (int j = 0; j < 4; ++j) unpack<kType>(v[j], x[2 * j], x[2 * j + 1]);
}

// Sums of x and y over the block, from the first warp to the last. `held` is used by one call only.
NPT_DEVICE void block_sums(float& x, float& y, float* held) {
  const int warp = threadIdx.x / 32, warps = int(blockDim.x) / 32;
  x = warp_sum(x);
  y = warp_sum(y);
  if (threadIdx.x % 32 == 0) {
    held[2 * warp] = x;
    held[2 * warp + 1] = y;
  }
  __syncthreads();  // every warp's sums
  x = y = 0.0f;
  for (int i = 0; i < warps; ++i) {
    x += held[2 * i];
    y += held[2 * i + 1];
  }
}

template <int kChunks>
struct NormRow {
  uint32_t h[kChunks][4], t[kChunks][4];  // t = h + a, rounded as the original layer rounds it
  float mean_h, mean_t, s;                // means are 0 without `layer`
};

// `held`: 4 · kNormWarps floats of shared memory.
template <Dtype kType, int kChunks>
NPT_DEVICE void norm_row(const NormParams& p, int64_t row, NormRow<kChunks>& r, float* held) {
  float x[kNormElements], y[kNormElements], sum_h = 0.0f, sum_t = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {  // all reads first, so that they are in flight together
    const int column = (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements;
    load_eight<kType>(p.h.ptr, row * p.h.ld, column, p, r.h[i]);
    load_eight<kType>(p.a.ptr, row * p.a.ld, column, p, r.t[i]);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    unpack_eight<kType>(r.h[i], x);
    unpack_eight<kType>(r.t[i], y);
#pragma unroll
    for (int j = 0; j < 4; ++j) r.t[i][j] = pack<kType>(x[2 * j] + y[2 * j], x[2 * j + 1] + y[2 * j + 1]);
    unpack_eight<kType>(r.t[i], y);
#pragma unroll
    for (int e = 0; e < kNormElements; ++e) {
      sum_h += x[e];
      sum_t += y[e];
    }
  }
  r.mean_h = r.mean_t = 0.0f;
  if (p.layer) {
    block_sums(sum_h, sum_t, held);
    r.mean_h = sum_h / float(p.width);
    r.mean_t = sum_t / float(p.width);
  }
  float squares = 0.0f, unused = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements;
    unpack_eight<kType>(r.t[i], y);
#pragma unroll
    for (int e = 0; e < kNormElements; ++e) {
      const float apart = column + e < p.width ? y[e] - r.mean_t : 0.0f;
      squares = fmaf(apart, apart, squares);
    }
  }
  block_sums(squares, unused, held + 2 * kNormWarps);
  r.s = 1.0f / sqrtf(squares / float(p.width) + p.eps);
}

template <Dtype kType, int kChunks>
__global__ void __launch_bounds__(kNormThreads, 1) matched_norm_forward(const __grid_constant__ NormParams p) {
  __shared__ float held[4 * kNormWarps];
  const int64_t row = blockIdx.x;
  NormRow<kChunks> r;
  norm_row<kType, kChunks>(p, row, r, held);
  float x[kNormElements], factor[kNormElements];
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements;
    if (column >= p.width) break;
    unpack_eight<kType>(r.h[i], x);
#pragma unroll
    for (int e = 0; e < kNormElements; ++e) x[e] = (x[e] - r.mean_h) * r.s;
    if (p.weight != nullptr) {
      load_eight<kType>(p.weight, 0, column, p, packed);
      unpack_eight<kType>(packed, factor);
#pragma unroll
      for (int e = 0; e < kNormElements; ++e) x[e] *= factor[e];
    }
    if (p.bias != nullptr) {
      load_eight<kType>(p.bias, 0, column, p, packed);
      unpack_eight<kType>(packed, factor);
#pragma unroll
      for (int e = 0; e < kNormElements; ++e) x[e] += factor[e];
    }
    store_eight<kType>(p.u.ptr, row * p.u.ld, column, p, x);
  }
  if (threadIdx.x == 0) static_cast<uint16_t*>(p.key_scale)[row] = uint16_t(pack<kType>(r.s, r.s) & 0xFFFFu);
}

// dh and da; those of weight and bias are sums over rows, which frozen norms do not ask for.
template <Dtype kType, int kChunks>
__global__ void __launch_bounds__(kNormThreads, 1) matched_norm_backward(const __grid_constant__ NormParams p) {
  __shared__ float held[6 * kNormWarps];
  const int64_t row = blockIdx.x;
  uint32_t du[kChunks][4], packed[4];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements;
    du[i][0] = du[i][1] = du[i][2] = du[i][3] = 0;
    if (p.du.ptr != nullptr) load_eight<kType>(p.du.ptr, row * p.du.ld, column, p, du[i]);
  }
  NormRow<kChunks> r;
  norm_row<kType, kChunks>(p, row, r, held);
  float g[kNormElements], x[kNormElements], dot = 0.0f, mean_g = 0.0f;
  // g = γ ⊙ du; γ is read twice, the second time from a cache, rather than g kept in fp32.
  const auto gradient = [&](int i, int column) {
    unpack_eight<kType>(du[i], g);
    if (p.weight != nullptr) {
      load_eight<kType>(p.weight, 0, column, p, packed);
      unpack_eight<kType>(packed, x);
#pragma unroll
      for (int e = 0; e < kNormElements; ++e) g[e] *= x[e];
    }
  };
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    gradient(i, (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements);
    unpack_eight<kType>(r.h[i], x);
#pragma unroll
    for (int e = 0; e < kNormElements; ++e) {  // g is 0 beyond the row
      dot = fmaf(g[e], x[e] - r.mean_h, dot);
      mean_g += g[e];
    }
  }
  block_sums(dot, mean_g, held + 4 * kNormWarps);
  mean_g = p.layer ? mean_g / float(p.width) : 0.0f;
  if (p.d_key_scale != nullptr) dot += load_scale<kType>(p.d_key_scale, row);
  const float factor = -dot * r.s * r.s * r.s / float(p.width);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (i * int(blockDim.x) + int(threadIdx.x)) * kNormElements;
    if (column >= p.width) break;
    gradient(i, column);
    unpack_eight<kType>(r.t[i], x);
#pragma unroll
    for (int e = 0; e < kNormElements; ++e) {
      x[e] = (x[e] - r.mean_t) * factor;
      g[e] = fmaf(g[e] - mean_g, r.s, x[e]);
    }
    if (p.da.ptr != nullptr) store_eight<kType>(p.da.ptr, row * p.da.ld, column, p, x);
    if (p.dh.ptr != nullptr) store_eight<kType>(p.dh.ptr, row * p.dh.ld, column, p, g);
  }
}

}  // namespace npt
