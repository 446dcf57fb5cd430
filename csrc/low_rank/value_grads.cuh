// Value gradients from one reading of dy [T, N]: dc = dy @ w_b_upᵀ [T, R] and d w_b_up = cᵀ @ dy [R, N].
//
// A block owns 512 columns of dy and a range of tokens. Its block of w_b_up and the accumulators of d w_b_up stay on chip, and
// tiles of 64 tokens stream through: as the A operand (K-major) of dc and, the same bytes, as the B operand (MN-major) of
// d w_b_up. Its share of dc (over its columns) goes to an fp32 workspace for every tile, its share of d w_b_up (over its tokens)
// once at the end; rule_kernels.cuh adds the shares in a fixed order. No atomics.
//
// Two stages of 64 KiB: 64-128 KiB in flight a SM, three times what 4.3 TB/s at 700 ns needs. Tensor core per tile at R = 64:
// ~2,600 clocks (dc is bound by shared-memory reads at n32) against ~3,500 for the tile's bytes, so memory decides.
#pragma once
#include "ring.cuh"

namespace npt {

template <Dtype kType_>
struct ValueGradsConfig {
  static constexpr Dtype kType = kType_;
  static constexpr int kTokens = 64, kRanks = 64, kColumns = 512, kChunks = kColumns / kChunkCols, kStages = 2;
  static constexpr uint32_t kChunkBytes = kTokens * kRowBytes;  // 8192
  static constexpr uint32_t kDyBytes = kChunks * kChunkBytes, kStageBytes = kDyBytes + kChunkBytes;  // and c [64, 64]
  static constexpr uint32_t kResidentBytes = kChunks * kRanks * kRowBytes;                           // w_b_up [64, 512]
  static constexpr int kSmemBytes = kStages * int(kStageBytes) + int(kResidentBytes) + 8 * (2 * kStages + 1) + 1024;
  static_assert(kSmemBytes <= kMaxDynamicSmem, "shared memory");
};

template <class C>
__global__ void __launch_bounds__(384, 1) low_rank_value_grads(const __grid_constant__ ValueGradsParams p) {
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = (smem_address(raw_smem) + 1023u) & ~1023u;
  const uint32_t resident = base + C::kStages * C::kStageBytes, barriers = resident + C::kResidentBytes;
  const uint32_t resident_full = barriers + 16 * C::kStages;
  LowRankRing<C::kStages> ring(base, C::kStageBytes, barriers);
  if (threadIdx.x == 0) {
    ring.init();
    barrier_init(resident_full, 1);
    barrier_init_fence();
  }
  __syncthreads();

  const int n = int(blockIdx.x) * C::kColumns, rank0 = int(blockIdx.z) * C::kRanks;
  const int first = split_begin(p.tiles, int(gridDim.y), int(blockIdx.y));
  const int last = split_begin(p.tiles, int(gridDim.y), int(blockIdx.y) + 1);
  if (threadIdx.x < 128) {  // a whole producer warpgroup: only then can setmaxnreg give its registers to the others
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      barrier_expect(resident_full, C::kResidentBytes);  // [S4]
      for (int j = 0; j < C::kChunks; ++j) {
        tma_load(resident + j * C::kChunkBytes, &p.b, resident_full, n + j * kChunkCols, rank0);
      }
      for (int i = first; i < last; ++i) {
        const uint32_t full = ring.reserve(C::kStageBytes), stage = ring.stage();
        for (int j = 0; j < C::kChunks; ++j) {
          tma_load(stage + j * C::kChunkBytes, &p.dy, full, n + j * kChunkCols, i * C::kTokens);
        }
        tma_load(stage + C::kDyBytes, &p.c, full, rank0, i * C::kTokens);
        ring.advance();
      }
    }
    return;
  }
  registers_grow<232>();

  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float db[128], dc[16];  // [64 ranks, 256 columns] of this warpgroup; [64 tokens, 32 ranks] of this warpgroup
#pragma unroll
  for (int i = 0; i < 128; ++i) db[i] = 0.0f;
  // Outputs of this thread: everything but the tile's first token is fixed.
  const int dc_rank = rank0 + group * 32;
  float* const dc_out = p.dc + int64_t(blockIdx.x) * p.rows * p.rank;
  barrier_wait(resident_full, 0);  // [S5]
  for (int i = first; i < last; ++i) {
    const uint32_t stage = ring.stage();
    const uint64_t c = descriptor_mn_major(stage + C::kDyBytes, kMnChunkBytes);
    const uint64_t dy_n = descriptor_mn_major(stage + group * (C::kDyBytes / 2), kMnChunkBytes);
    const uint64_t dy_k = descriptor_k_major(stage), b = descriptor_k_major(resident + group * 32 * kRowBytes);
    ring.wait();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kTokens / 16; ++k) {  // d w_b_up += cᵀ dy
      Wgmma<256, C::kType, 1, 1>::mma(db, c + k * descriptor_step(true), dy_n + k * descriptor_step(true), 1);
    }
#pragma unroll
    for (int j = 0; j < C::kChunks; ++j) {  // dc = dy w_b_upᵀ over this block's columns
#pragma unroll
      for (int k = 0; k < kBlockK / 16; ++k) {
        const uint64_t step = j * (C::kChunkBytes >> 4) + k * descriptor_step(false);
        Wgmma<32, C::kType, 0, 0>::mma(dc, dy_k + step, b + step, j + k == 0 ? 0 : 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int e = 0; e < 16; ++e) asm volatile("" : "+f"(dc[e])::"memory");
    ring.release(ring.at.stage, lane);
    ring.advance();
#pragma unroll
    for (int e = 0; e < 16; e += 2) {
      const int64_t token = int64_t(i) * C::kTokens + fragment_row(warp, lane, e);
      const int column = dc_rank + fragment_col(lane, e);
      if (token < p.rows && column < p.rank) {
        *reinterpret_cast<float2*>(dc_out + token * p.rank + column) = make_float2(dc[e], dc[e + 1]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 128; ++e) asm volatile("" : "+f"(db[e])::"memory");
  float* const db_out = p.db + int64_t(blockIdx.y) * p.rank * p.cols;
#pragma unroll
  for (int e = 0; e < 128; e += 2) {
    const int row = rank0 + fragment_row(warp, lane, e), column = n + group * 256 + fragment_col(lane, e);
    if (row < p.rank && column < p.cols) {
      *reinterpret_cast<float2*>(db_out + int64_t(row) * p.cols + column) = make_float2(db[e], db[e + 1]);
    }
  }
}

}  // namespace npt
