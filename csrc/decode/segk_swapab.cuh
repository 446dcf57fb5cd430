// Segmented-K product for at most 64 tokens, operands swapped: the weights are the 64-row side of wgmma, the tokens its
// columns, so no tensor-core row is padding that costs weight bandwidth. Epilogues kStore, kAct, kDual.
//
// One block streams 64 weight rows at a time through a deep ring (8 stages of 17-24 KiB, or 12 of 9-16 KiB): by Little's law
// 4.3 TB/s at ~700 ns needs about 23 KiB in flight per SM. Weights carry an evict-first hint; low-rank segments come last.
// Not here yet: split K for narrow outputs (64 tiles at d = 4096 leave half the SMs idle; predicted 80-90 % of bandwidth
// because each of those keeps 190 KiB in flight) and programmatic dependent launch.
#pragma once
#include "../common/ptx.cuh"
#include "../common/wgmma.inc"
#include "../gemm/epilogue.cuh"
#include "../gemm/segk_params.h"

namespace npt {

template <int kTokens_, bool kMnMajor_, bool kDual_, Dtype kType_>
struct DecodeConfig {
  static constexpr int kTokens = kTokens_, kRows = 64;
  static constexpr bool kMnMajor = kMnMajor_, kDual = kDual_;
  static constexpr Dtype kType = kType_;
  static constexpr int kStages = kDual ? 8 : 12;
  static constexpr uint32_t kTileBytes = kRows * kRowBytes;  // one 64 x 64 weight tile, either layout
  static constexpr uint32_t kWeightBytes = kTileBytes * (kDual ? 2 : 1), kTokenBytes = kTokens * kRowBytes;
  static constexpr uint32_t kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kThreads = 160;  // consumer warpgroup, then one producer warp
  static constexpr int kSmemBytes = kStages * int(kStageBytes) + 16 * kStages + 1024;
  static_assert(kTokens % 8 == 0 && kTokens <= 64 && kSmemBytes <= kMaxDynamicSmem, "tile menu");
};

template <class C>
NPT_DEVICE uint32_t decode_stage_bytes(int kind) {
  return (kind >= kLowSecond ? C::kTileBytes : C::kWeightBytes) + C::kTokenBytes;
}

template <class C>
NPT_DEVICE void decode_produce(const SegkParams& p, uint32_t base, uint32_t full0, uint32_t empty0) {
  const uint64_t stream_once = policy_evict_first();
  RingPosition at{0, 0};
  for (int tile = blockIdx.x; tile < p.tiles_n; tile += gridDim.x) {
    const int n = tile * C::kRows;
    for (int s = 0; s < p.num_segments; ++s) {
      const Segment& seg = p.segment[s];
      const int kind = p.segment_kind[s];
      const bool mn = C::kMnMajor || kind != kMain;
      const int tiles = C::kDual && kind < kLowSecond ? 2 : 1;
      for (int i = 0; i < p.segment_blocks[s]; ++i) {
        const uint32_t stage = base + at.stage * C::kStageBytes, full = full0 + 8 * at.stage;
        const int k = i * kBlockK;
        barrier_wait(empty0 + 8 * at.stage, at.phase ^ 1u);
        barrier_expect(full, decode_stage_bytes<C>(kind));
        for (int t = 0; t < tiles; ++t) {
          tma_load_hint(stage + t * C::kTileBytes, &seg.b[t], full, mn ? n : k, mn ? k : n, stream_once);
        }
        tma_load(stage + C::kWeightBytes, &seg.a, full, k, 0);
        at = ring_advance(at, 1, C::kStages);
      }
    }
  }
}

// `blocks` k-blocks; kFirst..kLast are the accumulators fed, from the weight tiles 0.. of a stage.
template <class C, bool kMn, int kFirst, int kLast>
NPT_DEVICE void decode_multiply(float (&acc)[2][C::kTokens / 2], int blocks, RingPosition& at, int& held, int& accumulate,
                                uint32_t base, uint32_t full0, uint32_t empty0, int lane) {
  for (int i = 0; i < blocks; ++i) {
    const uint32_t stage = base + at.stage * C::kStageBytes;
    const uint64_t w = kMn ? descriptor_mn_major(stage, kMnChunkBytes) : descriptor_k_major(stage);
    const uint64_t x = descriptor_k_major(stage + C::kWeightBytes);
    barrier_wait(full0 + 8 * at.stage, at.phase);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
#pragma unroll
      for (int t = kFirst; t <= kLast; ++t) {
        Wgmma<C::kTokens, C::kType, kMn ? 1 : 0, 0>::mma(acc[t], w + (t - kFirst) * (C::kTileBytes >> 4) + k * descriptor_step(kMn),
                                                         x + k * descriptor_step(false), k == 0 ? accumulate : 1);
      }
    }
    wgmma_commit();
    accumulate = 1;
    wgmma_wait<1>();
    if (held >= 0 && lane == 0) barrier_arrive(empty0 + 8 * held);
    held = at.stage;
    at = ring_advance(at, 1, C::kStages);
  }
}

template <class C>
NPT_DEVICE void decode_store(const SegkParams& p, int which, const float* v, int n, int warp, int lane) {
  uint16_t* const out = static_cast<uint16_t*>(p.out_ptr[which]);
#pragma unroll
  for (int i = 0; i < C::kTokens / 2; ++i) {
    const int token = fragment_col(lane, i), column = n + fragment_row(warp, lane, i);
    if (token < p.rows && column < p.cols) {
      out[int64_t(token) * p.out_ld[which] + column] = uint16_t(pack<C::kType>(v[i], v[i]) & 0xFFFFu);
    }
  }
}

template <class C>
NPT_DEVICE void decode_bias(float* v, const void* bias, int n, int cols, int warp, int lane) {
  if (bias == nullptr) return;
  float add[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int column = n + fragment_row(warp, lane, 2 * h);
    float unused;
    unpack<C::kType>(column < cols ? uint32_t(__ldg(static_cast<const uint16_t*>(bias) + column)) : 0u, add[h], unused);
  }
#pragma unroll
  for (int i = 0; i < C::kTokens / 2; ++i) v[i] += add[(i >> 1) & 1];
}

template <class C, Epilogue kEpilogue>
__global__ void __launch_bounds__(160, 1) segk_decode(const __grid_constant__ SegkParams p) {
  static_assert(C::kDual == (kEpilogue == Epilogue::kDual));
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = (smem_address(raw_smem) + 1023u) & ~1023u;
  const uint32_t full0 = base + C::kStages * C::kStageBytes, empty0 = full0 + 8 * C::kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(full0 + 8 * s, 1);
      barrier_init(empty0 + 8 * s, 4);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) decode_produce<C>(p, base, full0, empty0);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RingPosition at{0, 0};
  float acc[2][C::kTokens / 2];
  for (int tile = blockIdx.x; tile < p.tiles_n; tile += gridDim.x) {
    int held = -1, accumulate = 0;
    constexpr int kBoth = C::kDual ? 1 : 0;
    decode_multiply<C, C::kMnMajor, 0, kBoth>(acc, p.main_blocks, at, held, accumulate, base, full0, empty0, lane);
    decode_multiply<C, true, 0, kBoth>(acc, p.low_blocks, at, held, accumulate, base, full0, empty0, lane);
    if constexpr (C::kDual) {
      decode_multiply<C, true, 1, 1>(acc, p.second_blocks, at, held, accumulate, base, full0, empty0, lane);
      decode_multiply<C, true, 0, 0>(acc, p.first_blocks, at, held, accumulate, base, full0, empty0, lane);
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty0 + 8 * held);

    const int n = tile * C::kRows;
    if constexpr (!C::kDual) decode_bias<C>(acc[0], p.bias, n, p.cols, warp, lane);  // dual: a segment, as in segk_coop.cuh
    if constexpr (kEpilogue == Epilogue::kDual) {
      if (p.store_pre) {
        decode_store<C>(p, 1, acc[0], n, warp, lane);
        decode_store<C>(p, 2, acc[1], n, warp, lane);
      }
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) acc[0][i] = act_forward(acc[0][i], p.act_a, p.act_b) * acc[1][i];
    } else if constexpr (kEpilogue == Epilogue::kAct) {
      if (p.store_pre) decode_store<C>(p, 1, acc[0], n, warp, lane);
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) acc[0][i] = act_forward(acc[0][i], p.act_a, p.act_b);
    }
    decode_store<C>(p, 0, acc[0], n, warp, lane);
  }
}

}  // namespace npt
