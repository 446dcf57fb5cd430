// The rules on columns that a warp holds: c from (z̃, p), and gradients. z̃ = key_scale · z.
//
//   rank1     c_j = z_j s_j, s_j = ⟨z_j, p_j⟩      dz_j = s_j dc_j + ⟨dc_j, z_j⟩ p_j       dp_j = ⟨dc_j, z_j⟩ z_j
//   diagonal  c = m ⊙ p, m = scale·tanh z          dz = scale·(1 − tanh² z) ⊙ dc ⊙ p       dp = m ⊙ dc
//   anchored  c = z p                              dz = dc p                               dp = ⟨dc, z⟩
//   self_key  c = z                                dz = dc                                 –
#pragma once
#include "../common/ptx.cuh"
#include "low_rank_params.h"

namespace npt {

NPT_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, o);
  return v;
}

// tanh to fp32 accuracy: tanh.approx has 11 bits, fewer than bf16's error after the products would hide at small z.
NPT_DEVICE float tanh_exact(float v) { return tanhf(v); }

NPT_DEVICE float element(Dtype type, uint16_t bits) {
  if (type == Dtype::kBf16) return __uint_as_float(uint32_t(bits) << 16);
  float lo, hi;
  unpack<Dtype::kF16>(bits, lo, hi);
  return lo;
}

// kVec neighbouring 16-bit elements (kVec 1 or 2; 2 needs an even index and pitch).
template <Dtype kType, int kVec>
NPT_DEVICE void load_elements(const MatrixArg& m, int64_t row, int column, float* v) {
  const uint16_t* const at = static_cast<const uint16_t*>(m.ptr) + row * m.ld + column;
  if constexpr (kVec == 2) {
    unpack<kType>(*reinterpret_cast<const uint32_t*>(at), v[0], v[1]);
  } else {
    v[0] = element(kType, *at);
  }
}
template <Dtype kType, int kVec>
NPT_DEVICE void store_elements(const MatrixArg& m, int64_t row, int column, const float* v) {
  uint16_t* const at = static_cast<uint16_t*>(m.ptr) + row * m.ld + column;
  if constexpr (kVec == 2) {
    *reinterpret_cast<uint32_t*>(at) = pack<kType>(v[0], v[1]);
  } else {
    *at = uint16_t(pack<kType>(v[0], v[0]) & 0xFFFFu);
  }
}
template <Dtype kType>
NPT_DEVICE float load_scale(const void* key_scale, int64_t row) {
  return key_scale == nullptr ? 1.0f : element(kType, __ldg(static_cast<const uint16_t*>(key_scale) + row));
}

}  // namespace npt
