// Cooperative 128 x 256 with K split over a cluster, for products whose tiles would leave most SMs idle: a down projection of 65
// to 512 tokens has 16 to 64 of them and a long K. Epilogue kStore.
//
// A cluster is `parts` groups of kCluster blocks, and owns kCluster row tiles side by side. Part q of the k-blocks of all
// segments together is group q's, whose blocks share the weights by multicast as in segk_coop.cuh. Then each block leaves its
// fp32 sums over its own ring, the cluster meets, and each block adds up its share of its tile's rows, from the first part to the
// last: no workspace, no atomics, no second launch, two runs bitwise equal.
//
// The meetings are those of low_rank/coefficients.cuh and decode_finish_split (tools/protocol_model.py, meeting_machine).
#pragma once
#include "mainloop.cuh"

namespace npt {

// This block's share of the rows: sums of the parts, bias, stores. `first` is the tile's first row, `column` its first column.
template <class C>
NPT_DEVICE void split_finish(const SegkParams& p, uint32_t base, int part, int parts, uint32_t rank, int first, int column,
                             int warp, int lane) {
  constexpr int kChunks = C::kBN / 64;
  const int share = C::kBM / parts;  // 16 to 128: a multiple of the 16 rows that the 8 warps take at a time
  for (int r = warp; r < share; r += 16) {
    float2 sum[2][kChunks];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) sum[e][c] = make_float2(0.0f, 0.0f);
    }
    for (int q = 0; q < parts; ++q) {
      float2 add[2][kChunks];  // all reads first: each takes some 200 clocks
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t at = base + partial_offset(part * share + r + 8 * e, 64 * c + 2 * lane, C::kBN);
          add[e][c] = load_cluster(at, q * C::kCluster + rank);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          sum[e][c].x += add[e][c].x;
          sum[e][c].y += add[e][c].y;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = column + 64 * c + 2 * lane;
      if (at >= p.cols) continue;  // cols is a multiple of 8: a pair of columns lies inside or outside
      float lo = 0.0f, hi = 0.0f;
      if (p.bias != nullptr) unpack<C::kType>(load_pair(p.bias, at >> 1), lo, hi);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first + part * share + r + 8 * e;
        if (row < p.rows) {
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out_ptr[0]) + int64_t(row) * p.out_ld[0] + at) =
              pack<C::kType>(sum[e][c].x + lo, sum[e][c].y + hi);
        }
      }
    }
  }
}

template <class C, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 1) segk_split(const __grid_constant__ SegkParams p) {
  static_assert(C::kSplit && !C::kGateUp && !C::kPingPong && kEpilogue == Epilogue::kStore);
  static_assert(C::kBM * partial_pitch(C::kBN) * 4 <= C::kStages * int(C::kStageBytes), "partial sums overwrite the ring");
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = ring_base<C>(raw_smem);
  const Barriers bars = barrier_addresses<C>(base);
  const uint32_t block = cluster_rank(), rank = block % C::kCluster, peers = block - rank;
  const int parts = int(cluster_size()) / C::kCluster, part = int(block) / C::kCluster;
  init_barriers<C>(bars);

  // One tile a cluster: its blocks meet once.
  const TileCoord c = tile_coord(int(blockIdx.x) / (C::kCluster * parts), p.tiles_m, p.tiles_n, p.group_m);
  const int m = (c.m * C::kCluster + int(rank)) * C::kBM, n = tile_column<C>(c.n);
  const int blocks = p.main_blocks + p.low_blocks;
  const int first = split_begin(blocks, parts, part), last = split_begin(blocks, parts, part + 1);  // never equal: check_launch

  const int group = threadIdx.x / 128;
  if (group == 0) {
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      prefetch_maps(p);
      RingPosition at{0, 0};
      int before = 0;  // k-blocks of the segments before
      for (int s = 0; s < p.num_segments; ++s) {
        const int begin = max(first - before, 0), end = min(last - before, p.segment_blocks[s]);
        produce_segment<C>(p, s, begin, end, base, bars, m, n, rank, peers, at);
        before += p.segment_blocks[s];
      }
    }
    cluster_sync();  // [S6]
  } else {
    registers_grow<232>();
    const int consumer = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const uint32_t a_offset = consumer * 64 * kRowBytes;
    LoopState loop{{0, 0}, -1, 0, peers};
    float acc[1][C::kAccumulators];
    if constexpr (C::kMnMajor) {
      multiply<C, C::kBN, true>(acc, last - first, loop, base, bars, a_offset, lane);
    } else {
      multiply<C, C::kBN, false>(acc, overlap_count(first, last, 0, p.main_blocks), loop, base, bars, a_offset, lane);
      multiply<C, C::kBN, true>(acc, overlap_count(first, last, p.main_blocks, p.low_blocks), loop, base, bars, a_offset, lane);
    }
    finish_tile<C>(acc, loop, bars, lane);
    // Both warpgroups have waited for every stage, the peer's multicasts included, so no load is in flight and the ring is free.
    named_barrier(1, 256);  // [S7]
    put_partials<C::kBN>(base, acc[0], consumer * 64, 0, C::kBN, thread / 32, lane);
    cluster_sync();  // [S6] every block's sums are in place
    split_finish<C>(p, base, part, parts, rank, m, n, 4 * consumer + thread / 32, lane);
  }
  cluster_sync();  // [S8] no block leaves while another reads its shared memory
}

}  // namespace npt
