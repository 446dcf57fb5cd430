// Coefficients of a rule from one reading of `a` and `u`: z = a @ w_down, p = u @ w_a_upᵀ, c = rule(z, p), written once.
//
// A cluster of blocks shares one tile of 128 tokens x BR ranks; each block takes a part of K (that is what fills the SMs when
// there are few tokens), leaves its fp32 sums in its own shared memory, and after the cluster has met each block adds up a
// share of the rows, from the first block to the last, and applies the rule to the sums. No workspace, no atomics, no second
// launch; two runs are bitwise equal. Bound by reading a and u: 2·d·2 bytes a token against 2·2·d·R flops.
//
// Why BR <= 128: z and p take BR/2 registers each. Wider R runs in tiles of BR ranks, which read a and u again; then the
// vendor's GEMM is the better choice (npt_kernels/kernels/cuda has the bytes). A rank-1 term must lie in one tile.
#pragma once
#include "ring.cuh"
#include "rule_math.cuh"

namespace npt {

enum class KeyKind : int { kNone = 0, kMatrixK = 1, kMatrixMn = 2, kVector = 3 };

template <int kBR_, bool kZ_, KeyKind kKey_, Dtype kType_>
struct CoefficientsConfig {
  static constexpr int kBR = kBR_, kBM = 128;
  static constexpr bool kZ = kZ_;  // z is computed here; else it is read (a layer's second and third target)
  static constexpr KeyKind kKey = kKey_;
  static constexpr Dtype kType = kType_;
  static constexpr bool kMatrix = kKey == KeyKind::kMatrixK || kKey == KeyKind::kMatrixMn;
  static constexpr int kPCols = kMatrix ? kBR : kKey == KeyKind::kVector ? 8 : 0;
  static constexpr int kZCols = kZ ? kBR : 0;
  static constexpr uint32_t kABytes = kBM * kRowBytes, kBBytes = kBR * kRowBytes, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = kBR == 128 ? 6 : 8;
  static constexpr uint32_t kRingBytes = kStages * kStageBytes;
  static constexpr int kSmemBytes = int(kRingBytes) + 16 * kStages + 1024;
  static_assert(kZ || kKey != KeyKind::kNone, "nothing to compute");
  static_assert(kBR == 64 || kBR == 128, "tile menu");
  static_assert(kSmemBytes <= kMaxDynamicSmem, "shared memory");
  // The partial sums overwrite the ring when every stage has been read.
  static_assert(kBM * partial_pitch(kZCols + kPCols) * 4 <= int(kRingBytes), "partial sums");
};

// Bytes of a stage: whole boxes, as TMA counts.
template <class C, bool kIsZ>
NPT_DEVICE constexpr uint32_t coefficients_bytes() {
  return C::kABytes + (kIsZ || C::kMatrix ? C::kBBytes : 8u * kRowBytes);
}

// k-blocks [first, last) of one of the two products.
template <class C, bool kIsZ>
NPT_DEVICE void coefficients_load(const CoefficientsParams& p, LowRankRing<C::kStages>& ring, int first, int last, int m,
                                  int rank0) {
  const CUtensorMap* const x = kIsZ ? &p.a : &p.u;
  const CUtensorMap* const w = kIsZ ? &p.w_z : &p.w_p;
  for (int i = first; i < last; ++i) {
    const uint32_t full = ring.reserve(coefficients_bytes<C, kIsZ>()), stage = ring.stage(), b = stage + C::kABytes;
    const int k = i * kBlockK;
    tma_load(stage, x, full, k, m);
    if constexpr (kIsZ || C::kKey == KeyKind::kMatrixMn) {
#pragma unroll
      for (int j = 0; j < C::kBR / kChunkCols; ++j) tma_load(b + j * kMnChunkBytes, w, full, rank0 + j * kChunkCols, k);
    } else {
      tma_load(b, w, full, k, C::kKey == KeyKind::kVector ? 0 : rank0);
    }
    ring.advance();
  }
}

// The same k-blocks into acc; the warpgroup's 64 rows start at a_offset.
template <class C, int kCols, bool kMn>
NPT_DEVICE void coefficients_multiply(float* acc, LowRankRing<C::kStages>& ring, int blocks, uint32_t a_offset, int lane) {
  int held = -1;  // stage whose wgmmas may still run
  for (int i = 0; i < blocks; ++i) {
    const uint32_t stage = ring.stage();
    const uint64_t a = descriptor_k_major(stage + a_offset);
    const uint64_t b = kMn ? descriptor_mn_major(stage + C::kABytes, kMnChunkBytes) : descriptor_k_major(stage + C::kABytes);
    ring.wait();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      Wgmma<kCols, C::kType, 0, kMn ? 1 : 0>::mma(acc, a + k * descriptor_step(false), b + k * descriptor_step(kMn), 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (held >= 0) ring.release(held, lane);
    held = ring.at.stage;
    ring.advance();
  }
  // Drained before the other product begins: ptxas serialises wgmma (C7515) if the next accumulators are zeroed in between.
  wgmma_wait<0>();
  if (held >= 0) ring.release(held, lane);
}

// Rows that this block finishes: the cluster's sums, the rule, the stores.
template <class C>
NPT_DEVICE void coefficients_finish(const CoefficientsParams& p, uint32_t base, uint32_t rank, uint32_t parts, int m, int rank0,
                                    int warp, int lane) {
  constexpr int kWidth = C::kZCols + C::kPCols, kPairs = C::kBR / 64;
  const int share = C::kBM / int(parts);
  for (int r = warp; r < share; r += 8) {
    const int row = int(rank) * share + r;
    const int64_t token = int64_t(m) + row;
    if (token >= p.rows) break;
    float z[kPairs][2], q[kPairs][2];  // columns 64·c + 2·lane + {0, 1}
    float vector = 0.0f;
    const auto sum = [&](int column) {
      float2 total = make_float2(0.0f, 0.0f);
      for (uint32_t part = 0; part < parts; ++part) {
        const float2 v = load_cluster(base + partial_offset(row, column, kWidth), part);
        total.x += v.x;
        total.y += v.y;
      }
      return total;
    };
    const float key_scale = load_scale<C::kType>(p.key_scale, token);
    if constexpr (C::kKey == KeyKind::kVector) vector = sum(C::kZCols).x;
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int column = 64 * c + 2 * lane;
      z[c][0] = z[c][1] = q[c][0] = q[c][1] = 0.0f;
      if constexpr (C::kZ) {
        const float2 v = sum(column);
        z[c][0] = v.x;
        z[c][1] = v.y;
      } else {
        if (rank0 + column < p.rank) load_elements<C::kType, 2>(p.z, token, rank0 + column, z[c]);
      }
      if constexpr (C::kMatrix) {
        const float2 v = sum(C::kZCols + column);
        q[c][0] = v.x;
        q[c][1] = v.y;
      }
      if (rank0 + column < p.rank) {  // R is even: a pair lies inside or outside
        if (C::kZ && p.z.ptr != nullptr) store_elements<C::kType, 2>(p.z, token, rank0 + column, z[c]);
        if (C::kMatrix && p.p.ptr != nullptr) store_elements<C::kType, 2>(p.p, token, rank0 + column, q[c]);
      }
      z[c][0] *= key_scale;
      z[c][1] *= key_scale;
    }
    if (C::kKey == KeyKind::kVector && p.p.ptr != nullptr && lane == 0 && rank0 == 0) {
      store_elements<C::kType, 1>(p.p, token, 0, &vector);
    }
    if (p.c.ptr == nullptr) continue;
    if constexpr (C::kKey == KeyKind::kVector) {
#pragma unroll
      for (int c = 0; c < kPairs; ++c) {
        z[c][0] *= vector;
        z[c][1] *= vector;
      }
    } else if constexpr (C::kMatrix) {
      if (p.rule == int(RuleId::kDiagonal)) {
#pragma unroll
        for (int c = 0; c < kPairs; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) z[c][e] = p.scale * tanh_exact(z[c][e]) * q[c][e];
        }
      } else {
        float s[kPairs][2];
#pragma unroll
        for (int c = 0; c < kPairs; ++c) s[c][0] = s[c][1] = 0.0f;
        // Terms of this tile; columns beyond R hold zeros.
        const int last = (p.rank - rank0 < C::kBR ? p.rank - rank0 : C::kBR);
        for (int begin = 0; begin < last; begin += p.width) {
          float part = 0.0f;
#pragma unroll
          for (int c = 0; c < kPairs; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = 64 * c + 2 * lane + e;
              if (column >= begin && column < begin + p.width) part = fmaf(z[c][e], q[c][e], part);
            }
          }
          part = warp_sum(part);
#pragma unroll
          for (int c = 0; c < kPairs; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int column = 64 * c + 2 * lane + e;
              if (column >= begin && column < begin + p.width) s[c][e] = part;
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kPairs; ++c) {
          z[c][0] *= s[c][0];
          z[c][1] *= s[c][1];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int column = rank0 + 64 * c + 2 * lane;
      if (column < p.rank) store_elements<C::kType, 2>(p.c, token, column, z[c]);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kLowRankThreads, 1) low_rank_coefficients(const __grid_constant__ CoefficientsParams p) {
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = (smem_address(raw_smem) + 1023u) & ~1023u;
  LowRankRing<C::kStages> ring(base, C::kStageBytes, base + C::kRingBytes);
  if (threadIdx.x == 0) {
    ring.init();
    barrier_init_fence();
  }
  __syncthreads();
  launch_dependents();

  const uint32_t rank = cluster_rank(), parts = cluster_size();
  const int m = int(blockIdx.x / parts) * C::kBM, rank0 = int(blockIdx.y) * C::kBR;
  const int z_first = split_begin(p.blocks_a, int(parts), int(rank)), z_last = split_begin(p.blocks_a, int(parts), int(rank) + 1);
  const int p_first = split_begin(p.blocks_u, int(parts), int(rank)), p_last = split_begin(p.blocks_u, int(parts), int(rank) + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x >= 256) {
    if (threadIdx.x == 256) {
      if constexpr (C::kZ) coefficients_load<C, true>(p, ring, z_first, z_last, m, rank0);
      if constexpr (C::kKey != KeyKind::kNone) coefficients_load<C, false>(p, ring, p_first, p_last, m, rank0);
    }
    cluster_sync();  // [S1]
  } else {
    const int group = threadIdx.x / 128;
    const uint32_t a_offset = group * 64 * kRowBytes;
    constexpr int kPAcc = C::kPCols > 0 ? C::kPCols : 8;
    float z[C::kBR / 2], q[kPAcc / 2];
#pragma unroll
    for (int i = 0; i < C::kBR / 2; ++i) z[i] = 0.0f;  // zeros, not scale-d = 0: a part of a split may have no k-block
#pragma unroll
    for (int i = 0; i < kPAcc / 2; ++i) q[i] = 0.0f;
    if constexpr (C::kZ) coefficients_multiply<C, C::kBR, true>(z, ring, z_last - z_first, a_offset, lane);
    if constexpr (C::kKey != KeyKind::kNone) {
      coefficients_multiply<C, kPAcc, C::kKey == KeyKind::kMatrixMn>(q, ring, p_last - p_first, a_offset, lane);
    }
#pragma unroll
    for (int i = 0; i < C::kBR / 2; ++i) asm volatile("" : "+f"(z[i])::"memory");
#pragma unroll
    for (int i = 0; i < kPAcc / 2; ++i) asm volatile("" : "+f"(q[i])::"memory");
    // Both warpgroups have waited for every stage of this block, so no load is in flight and the ring is free.
    named_barrier(1, 256);  // [S2]
    constexpr int kWidth = C::kZCols + C::kPCols;
    if constexpr (C::kZ) put_partials<C::kBR>(base, z, group * 64, 0, kWidth, warp % 4, lane);
    if constexpr (C::kKey != KeyKind::kNone) put_partials<kPAcc>(base, q, group * 64, C::kZCols, kWidth, warp % 4, lane);
    cluster_sync();  // [S1] every block's sums are in place
    coefficients_finish<C>(p, base, rank, parts, m, rank0, warp, lane);
  }
  cluster_sync();  // [S3] no block leaves while another reads its shared memory
}

}  // namespace npt
