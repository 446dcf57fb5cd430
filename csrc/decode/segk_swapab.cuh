// Segmented-K product for at most 64 tokens, operands swapped: the weights are the 64-row side of wgmma, the tokens its
// columns, so no tensor-core row is padding that costs weight bandwidth. Epilogues kStore, kAct, kGateUp.
//
// One block streams 64 weight rows at a time through a deep ring (8 stages of 17-24 KiB, or 12 of 9-16 KiB): by Little's law
// 4.3 TB/s at ~700 ns needs about 23 KiB in flight per SM. Weights carry an evict-first hint; low-rank segments come last.
//
// Narrow outputs (64 tiles at d = 4096) would leave SMs idle: there a cluster of blocks shares a tile, each takes a part of K and
// leaves its fp32 sums in its own shared memory; after the cluster has met, each block adds up a share of the elements, from the
// first block to the last, and runs the epilogue on it. No workspace, no atomics, no second launch.
//
// Launched to overlap with the kernel before (p.dependent_from >= 0), the weights stream while that one still runs: segments
// from dependent_from on have activations that it writes, everything before was complete when it started. Nothing is written
// before it has ended.
#pragma once
#include "../common/ptx.cuh"
#include "../common/wgmma.inc"
#include "../gemm/epilogue.cuh"
#include "../gemm/segk_params.h"

namespace npt {

template <int kTokens_, bool kMnMajor_, bool kGateUp_, Dtype kType_>
struct DecodeConfig {
  static constexpr int kTokens = kTokens_, kRows = 64;
  static constexpr bool kMnMajor = kMnMajor_, kGateUp = kGateUp_;
  static constexpr Dtype kType = kType_;
  static constexpr int kStages = kGateUp ? 8 : 12;
  static constexpr uint32_t kTileBytes = kRows * kRowBytes;  // one 64 x 64 weight tile, either layout
  static constexpr uint32_t kWeightBytes = kTileBytes * (kGateUp ? 2 : 1), kTokenBytes = kTokens * kRowBytes;
  static constexpr uint32_t kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kThreads = 160;  // consumer warpgroup, then one producer warp
  static constexpr int kSmemBytes = kStages * int(kStageBytes) + 16 * kStages + 1024;
  static_assert(kTokens % 8 == 0 && kTokens <= 64 && kSmemBytes <= kMaxDynamicSmem, "tile menu");
};

template <class C>
NPT_DEVICE uint32_t decode_stage_bytes(int kind) {
  return (kind >= kLowSecond ? C::kTileBytes : C::kWeightBytes) + C::kTokenBytes;
}

// Where a block works: the tiles of its cluster, and a range of the k-blocks of all segments together.
struct DecodeShare {
  int tile, tile_step, first, last, part, parts;
};
NPT_DEVICE DecodeShare decode_share(const SegkParams& p) {
  const int parts = int(cluster_size()), part = int(cluster_rank());
  const int blocks = p.main_blocks + p.low_blocks + p.second_blocks + p.first_blocks;
  return DecodeShare{int(blockIdx.x) / parts, int(gridDim.x) / parts, split_begin(blocks, parts, part),
                     split_begin(blocks, parts, part + 1), part, parts};
}

template <class C>
NPT_DEVICE void decode_produce(const SegkParams& p, const DecodeShare& share, uint32_t base, uint32_t full0, uint32_t empty0) {
  const uint64_t stream_once = policy_evict_first();
  RingPosition at{0, 0};
  bool waited = p.dependent_from < 0;
  int ahead = 0;  // stages whose weights are under way and whose activations are not
  for (int tile = share.tile; tile < p.tiles_n; tile += share.tile_step) {
    const int n = tile * C::kRows;
    int before = 0;  // k-blocks of the segments before
    for (int s = 0; s < p.num_segments; ++s) {
      const Segment& seg = p.segment[s];
      const int kind = p.segment_kind[s];
      const bool mn = C::kMnMajor || kind != kMain;
      const int tiles = C::kGateUp && kind < kLowSecond ? 2 : 1;
      const int begin = max(share.first - before, 0), end = min(share.last - before, p.segment_blocks[s]);
      const auto load_weights = [&](int i) {
        const uint32_t stage = base + at.stage * C::kStageBytes, full = full0 + 8 * at.stage;
        barrier_wait(empty0 + 8 * at.stage, at.phase ^ 1u);
        barrier_expect(full, decode_stage_bytes<C>(kind));
        const int k = i * kBlockK;
        for (int t = 0; t < tiles; ++t) {
          tma_load_hint(stage + t * C::kTileBytes, &seg.b[t], full, mn ? n : k, mn ? k : n, stream_once);
        }
      };
      const auto load_activations = [&](int i) {
        tma_load(base + at.stage * C::kStageBytes + C::kWeightBytes, &seg.a, full0 + 8 * at.stage, i * kBlockK, 0);
      };
      int i = begin;
      if (!waited && s >= p.dependent_from && begin < end) {
        // The ring's first lap (all of its stages are free): weights at once, activations when the kernel before has ended.
        const RingPosition start = at;
        if (s == 0) {
          for (; ahead < C::kStages && begin + ahead < end; ++ahead) {
            load_weights(begin + ahead);
            at = ring_advance(at, 1, C::kStages);
          }
        }
        wait_for_previous();  // [D1]
        waited = true;
        at = start;
        for (; i < begin + ahead; ++i) {
          load_activations(i);
          at = ring_advance(at, 1, C::kStages);
        }
      }
      for (; i < end; ++i) {
        load_weights(i);
        load_activations(i);
        at = ring_advance(at, 1, C::kStages);
      }
      before += p.segment_blocks[s];
    }
  }
}

// `blocks` k-blocks; kFirst..kLast are the accumulators fed, from the weight tiles 0.. of a stage.
template <class C, bool kMn, int kFirst, int kLast>
NPT_DEVICE void decode_multiply(float (&acc)[2][C::kTokens / 2], int blocks, RingPosition& at, int& held, int (&fed)[2],
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
                                                         x + k * descriptor_step(false), k == 0 ? fed[t] : 1);
      }
    }
    wgmma_commit();
#pragma unroll
    for (int t = kFirst; t <= kLast; ++t) fed[t] = 1;
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

// Bias of one output column.
template <class C>
NPT_DEVICE float decode_bias_at(const void* bias, int column, int cols) {
  if (bias == nullptr || column >= cols) return 0.0f;
  float add, unused;
  unpack<C::kType>(uint32_t(__ldg(static_cast<const uint16_t*>(bias) + column)), add, unused);
  return add;
}

// The epilogue of a split tile: this block's share of the elements, a pair of tokens of one column at a time.
template <class C, Epilogue kEpilogue>
NPT_DEVICE void decode_finish_split(const SegkParams& p, const DecodeShare& share, float (&acc)[2][C::kTokens / 2], uint32_t base,
                                    int n, int warp, int lane) {
  constexpr int kPairs = C::kTokens / 4, kHalves = C::kGateUp ? 2 : 1;
  static_assert(kHalves * kPairs * 128 * 8 <= C::kStages * int(C::kStageBytes), "partial sums overwrite the ring");
  const auto slot = [&](int half, int pair) { return base + split_slot(half, pair, kPairs, int(threadIdx.x)); };
  named_barrier(1, 128);  // every warp has read the last stage
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) store_shared(slot(half, j), acc[half][2 * j], acc[half][2 * j + 1]);
  }
  cluster_sync();  // [D2] every block's sums are in place
  for (int j = share.part; j < kPairs; j += share.parts) {
    float v[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    for (int part = 0; part < share.parts; ++part) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float2 add = load_cluster(slot(half, j), uint32_t(part));
        v[half][0] += add.x;
        v[half][1] += add.y;
      }
    }
    const int column = n + fragment_row(warp, lane, 2 * j), token = fragment_col(lane, 2 * j);
    if (column >= p.cols) continue;
    const auto put = [&](int which, const float* value) {
      uint16_t* const out = static_cast<uint16_t*>(p.out_ptr[which]) + column;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (token + e < p.rows) out[int64_t(token + e) * p.out_ld[which]] = uint16_t(pack<C::kType>(value[e], value[e]) & 0xFFFFu);
      }
    };
    if constexpr (!C::kGateUp) {
      const float add = decode_bias_at<C>(p.bias, column, p.cols);
      v[0][0] += add;
      v[0][1] += add;
    }
    if constexpr (kEpilogue != Epilogue::kStore) {
      if (p.store_pre) {
        put(1, v[0]);
        if constexpr (C::kGateUp) put(2, v[1]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) v[0][e] = act_forward(v[0][e], p.act_a, p.act_b) * (C::kGateUp ? v[1][e] : 1.0f);
    }
    put(0, v[0]);
  }
  cluster_sync();  // [D3] no block leaves while another reads its shared memory
}

template <class C, Epilogue kEpilogue>
__global__ void __launch_bounds__(160, 1) segk_decode(const __grid_constant__ SegkParams p) {
  static_assert(C::kGateUp == (kEpilogue == Epilogue::kGateUp));
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
  launch_dependents();

  const DecodeShare share = decode_share(p);
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) decode_produce<C>(p, share, base, full0, empty0);
    if (share.parts > 1) {  // decode_finish_split's two meetings
      cluster_sync();
      cluster_sync();
    }
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int main_blocks = overlap_count(share.first, share.last, 0, p.main_blocks);
  const int low_blocks = overlap_count(share.first, share.last, p.main_blocks, p.low_blocks);
  const int second_blocks = overlap_count(share.first, share.last, p.main_blocks + p.low_blocks, p.second_blocks);
  const int first_blocks = overlap_count(share.first, share.last, p.main_blocks + p.low_blocks + p.second_blocks, p.first_blocks);
  RingPosition at{0, 0};
  float acc[2][C::kTokens / 2];
  for (int tile = share.tile; tile < p.tiles_n; tile += share.tile_step) {
    int held = -1;
    constexpr int kBoth = C::kGateUp ? 1 : 0;
    int fed[2] = {0, 0};  // 0: the next product overwrites that half (zeroing it made ptxas serialise the pipeline, C7515)
    decode_multiply<C, C::kMnMajor, 0, kBoth>(acc, main_blocks, at, held, fed, base, full0, empty0, lane);
    decode_multiply<C, true, 0, kBoth>(acc, low_blocks, at, held, fed, base, full0, empty0, lane);
    if constexpr (C::kGateUp) {
      decode_multiply<C, true, 1, 1>(acc, second_blocks, at, held, fed, base, full0, empty0, lane);
      decode_multiply<C, true, 0, 0>(acc, first_blocks, at, held, fed, base, full0, empty0, lane);
    }
    wgmma_wait<0>();
    if (lane == 0 && held >= 0) barrier_arrive(empty0 + 8 * held);
    wait_for_previous();  // [D4] it may still read the memory that this kernel's outputs were given

    const int n = tile * C::kRows;
    if (share.parts > 1) {  // one tile a block
#pragma unroll
      for (int half = 0; half <= kBoth; ++half) {  // a part may hold no k-block of a half
#pragma unroll
        for (int i = 0; i < C::kTokens / 2; ++i) acc[half][i] = fed[half] ? acc[half][i] : 0.0f;
      }
      decode_finish_split<C, kEpilogue>(p, share, acc, base, n, warp, lane);
      break;
    }
    if constexpr (!C::kGateUp) decode_bias<C>(acc[0], p.bias, n, p.cols, warp, lane);  // gate-up: a segment, as in segk_coop.cuh
    if constexpr (kEpilogue == Epilogue::kGateUp) {
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
