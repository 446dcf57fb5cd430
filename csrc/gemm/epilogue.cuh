// Pieces of the epilogues: activation, accumulator ↔ swizzled 64x64 tile, bias.
#pragma once
#include "../common/ptx.cuh"
#include "segk_params.h"

namespace npt {

// silu (a = 1, b = 0), quick_gelu (1.702, 0) and tanh-gelu (2·√(2/π), 2·√(2/π)·0.044715) are one function of two numbers:
// v · sigmoid(v · (a + b·v²)). So the activation is data, not a template parameter.
NPT_DEVICE float act_sigmoid(float v, float a, float b) {
  return __fdividef(1.0f, 1.0f + __expf(-v * fmaf(b, v * v, a)));  // exp overflow → 1/inf = 0, the right limit
}
NPT_DEVICE float act_forward(float v, float a, float b) { return v * act_sigmoid(v, a, b); }
// d/dv, given s = act_sigmoid(v): s + v·s·(1 - s)·(a + 3·b·v²)
NPT_DEVICE float act_slope(float v, float s, float a, float b) {
  return fmaf(v * s * (1.0f - s), fmaf(3.0f * b, v * v, a), s);
}

// 32 accumulators (64 columns of the warp's 16 rows) → swizzled tile of 64 rows x 64 columns.
template <Dtype kType>
NPT_DEVICE void put_tile(uint32_t tile, const float* v, int warp, int lane) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    stmatrix_x4(tile + matrix_offset(warp, lane, p), pack<kType>(v[8 * p], v[8 * p + 1]),
                pack<kType>(v[8 * p + 2], v[8 * p + 3]), pack<kType>(v[8 * p + 4], v[8 * p + 5]),
                pack<kType>(v[8 * p + 6], v[8 * p + 7]));
  }
}

// v[0..32) = acc[0..32) + bias[column ..]; `column` is that of the 64-column chunk. Pairs never straddle `cols`, a multiple
// of 8. A copy and no branch around it: adding in place under `if (bias)` made ptxas serialise the gate-up kernel (C7511).
template <Dtype kType>
NPT_DEVICE void add_bias(float* v, const float* acc, const void* bias, int column, int cols, int lane) {
  const int end = bias == nullptr ? 0 : cols;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int at = column + fragment_col(lane, 4 * j);
    uint32_t pair = 0;
    if (at < end) pair = load_pair(bias, at >> 1);
    float lo, hi;
    unpack<kType>(pair, lo, hi);
    v[4 * j] = acc[4 * j] + lo;
    v[4 * j + 1] = acc[4 * j + 1] + hi;
    v[4 * j + 2] = acc[4 * j + 2] + lo;
    v[4 * j + 3] = acc[4 * j + 3] + hi;
  }
}

}  // namespace npt
