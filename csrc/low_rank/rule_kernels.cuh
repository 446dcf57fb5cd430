// The rules alone (a warp for each row and term) and the second stage of split sums. All bound by memory.
#pragma once
#include "rule_math.cuh"

namespace npt {

constexpr int kRuleWarps = 8;

// Rows are numbered warp by warp over the grid; rules other than rank1 have one term of R columns.
struct RulePlace {
  int64_t row;
  int first, lane;  // first column of the term
};
NPT_DEVICE RulePlace rule_place(const RuleParams& p) {
  const int64_t job = int64_t(blockIdx.x) * kRuleWarps + threadIdx.x / 32;
  return RulePlace{job / p.terms, int(job % p.terms) * p.width, int(threadIdx.x % 32)};
}

template <Dtype kType, int kVec>
__global__ void __launch_bounds__(32 * kRuleWarps) rule_forward(const __grid_constant__ RuleParams p) {
  const RulePlace at = rule_place(p);
  if (at.row >= p.rows) return;
  const float key_scale = load_scale<kType>(p.key_scale, at.row);
  float z[kVec], q[kVec], factor = 1.0f;
  if (p.rule == int(RuleId::kRank1)) {
    factor = 0.0f;
    for (int i = at.lane * kVec; i < p.width; i += 32 * kVec) {
      load_elements<kType, kVec>(p.z, at.row, at.first + i, z);
      load_elements<kType, kVec>(p.p, at.row, at.first + i, q);
#pragma unroll
      for (int e = 0; e < kVec; ++e) factor = fmaf(z[e] * key_scale, q[e], factor);
    }
    factor = warp_sum(factor);
  } else if (p.rule == int(RuleId::kAnchored)) {
    load_elements<kType, 1>(p.p, at.row, 0, &factor);
  }
  for (int i = at.lane * kVec; i < p.width; i += 32 * kVec) {
    load_elements<kType, kVec>(p.z, at.row, at.first + i, z);
    if (p.rule == int(RuleId::kDiagonal)) {
      load_elements<kType, kVec>(p.p, at.row, at.first + i, q);
#pragma unroll
      for (int e = 0; e < kVec; ++e) z[e] = p.scale * tanh_exact(z[e] * key_scale) * q[e];
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) z[e] = z[e] * key_scale * factor;
    }
    store_elements<kType, kVec>(p.c, at.row, at.first + i, z);
  }
}

// dc of one column pair: a tensor, or the sum of shares from the first to the last.
template <Dtype kType, int kVec, bool kShares>
NPT_DEVICE void load_dc(const RuleParams& p, int64_t row, int column, float* v) {
  if constexpr (!kShares) {
    load_elements<kType, kVec>(p.dc, row, column, v);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) v[e] = 0.0f;
    const float* at = p.shares + row * p.rank + column;
    for (int part = 0; part < p.parts; ++part, at += int64_t(p.rows) * p.rank) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] += __ldg(at + e);
    }
  }
}

// With shares, `width` may not exceed kHeld columns: they are added once and kept in shared memory between the two passes.
constexpr int kHeld = 1024;

template <Dtype kType, int kVec, bool kShares>
__global__ void __launch_bounds__(32 * kRuleWarps) rule_backward(const __grid_constant__ RuleParams p) {
  __shared__ float held[kShares ? kRuleWarps : 1][kShares ? kHeld : 1];
  const RulePlace at = rule_place(p);
  if (at.row >= p.rows) return;
  const int warp = threadIdx.x / 32;
  const float key_scale = load_scale<kType>(p.key_scale, at.row);
  const bool want_z = p.dz.ptr != nullptr, want_p = p.dp.ptr != nullptr;
  float dc[kVec], z[kVec], q[kVec], dot_z = 0.0f, dot_p = 0.0f, vector = 0.0f;
  if (p.rule == int(RuleId::kAnchored) && want_z) load_elements<kType, 1>(p.p, at.row, 0, &vector);
  const bool first_pass = p.rule == int(RuleId::kRank1) || p.rule == int(RuleId::kAnchored);
  if (first_pass) {
    for (int i = at.lane * kVec; i < p.width; i += 32 * kVec) {
      load_dc<kType, kVec, kShares>(p, at.row, at.first + i, dc);
      load_elements<kType, kVec>(p.z, at.row, at.first + i, z);
      if (p.rule == int(RuleId::kRank1) && want_z) load_elements<kType, kVec>(p.p, at.row, at.first + i, q);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if constexpr (kShares) held[warp][i + e] = dc[e];  // read back by the lane that wrote it
        dot_z = fmaf(dc[e], z[e] * key_scale, dot_z);
        if (p.rule == int(RuleId::kRank1) && want_z) dot_p = fmaf(z[e] * key_scale, q[e], dot_p);
      }
    }
    dot_z = warp_sum(dot_z);
    dot_p = warp_sum(dot_p);
  }
  if (p.rule == int(RuleId::kAnchored) && want_p && at.lane == 0) store_elements<kType, 1>(p.dp, at.row, 0, &dot_z);
  for (int i = at.lane * kVec; i < p.width; i += 32 * kVec) {
    if (kShares && first_pass) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) dc[e] = held[warp][i + e];
    } else {
      load_dc<kType, kVec, kShares>(p, at.row, at.first + i, dc);
    }
    float dz[kVec], dp[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) dz[e] = dp[e] = dc[e];
    if (p.rule == int(RuleId::kAnchored)) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) dz[e] = dc[e] * vector;
    } else if (p.rule != int(RuleId::kSelfKey)) {
      load_elements<kType, kVec>(p.z, at.row, at.first + i, z);
      if (want_z) load_elements<kType, kVec>(p.p, at.row, at.first + i, q);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float scaled = z[e] * key_scale;
        if (p.rule == int(RuleId::kRank1)) {
          dp[e] = dot_z * scaled;
          if (want_z) dz[e] = fmaf(dot_p, dc[e], dot_z * q[e]);
        } else {
          const float m = tanh_exact(scaled);
          dp[e] = p.scale * m * dc[e];
          if (want_z) dz[e] = p.scale * (1.0f - m * m) * dc[e] * q[e];
        }
      }
      if (want_p) store_elements<kType, kVec>(p.dp, at.row, at.first + i, dp);
    }
    if (want_z) store_elements<kType, kVec>(p.dz, at.row, at.first + i, dz);
  }
}

// out[i] = Σ_part source[part, i], from the first part to the last, four elements a thread.
template <Dtype kType>
__global__ void __launch_bounds__(256) reduce_shares(const __grid_constant__ ReduceParams p) {
  const int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (i >= p.size) return;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float* at = p.source + i;
  for (int part = 0; part < p.parts; ++part, at += p.size) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(at));
    total.x += v.x;
    total.y += v.y;
    total.z += v.z;
    total.w += v.w;
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + i) = make_uint2(pack<kType>(total.x, total.y), pack<kType>(total.z, total.w));
}

}  // namespace npt
