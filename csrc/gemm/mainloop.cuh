// The K loop that every Hopper GEMM here shares: one TMA producer thread, consumer warpgroups, one ring of stages that
// runs on through segments and tiles without draining.
//
// Protocol (tools/protocol_model.py checks it exhaustively for small rings; lines marked [P1]..[P7] are the ones it
// mirrors):
//   full[s]   1 arrival (the producer's expect_tx) + the bytes of the stage, own and multicast by the peer.
//   empty[s]  one arrival per consumer warp that reads the stage, of both blocks of a cluster: a peer's multicast writes
//             into this block's stage, so its producer must know that the readers here are done.
#pragma once
#include "../common/ptx.cuh"
#include "../common/wgmma.inc"
#include "segk_params.h"

namespace npt {

// kCluster: blocks that share a tile's weights by multicast. kSplit: a cluster holds several such groups, each with a part of K.
template <int kBM_, int kBN_, int kStages_, int kCluster_, bool kMnMajor_, bool kGateUp_, bool kPingPong_, Dtype kType_,
          bool kSplit_ = false>
struct TileConfig {
  static constexpr int kBM = kBM_, kBN = kBN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr bool kMnMajor = kMnMajor_, kGateUp = kGateUp_, kPingPong = kPingPong_, kSplit = kSplit_;
  static constexpr Dtype kType = kType_;
  // 64-row slabs of one consumer warpgroup: cooperative warpgroups split a tile's rows, ping-pong ones take tiles in turn.
  static constexpr int kSlabs = kPingPong ? kBM / 64 : 1;
  static constexpr int kAccumulators = kBN / 2;  // floats a thread and slab
  static constexpr int kThreads = 384;           // producer + 2 consumer warpgroups
  static constexpr uint32_t kABytes = kBM * kRowBytes, kBBytes = kBN * kRowBytes, kStageBytes = kABytes + kBBytes;
  static constexpr int kEmptyCount = kCluster * (kPingPong ? 4 : 8);
  static constexpr int kEpilogueBytes = kSplit ? 0 : kPingPong ? 65536 : 32768;
  // ring, epilogue buffers, barriers (full, empty, 2 order, 4 epilogue), and slack to align the base to 1024
  static constexpr int kSmemBytes = kStages * int(kStageBytes) + kEpilogueBytes + 8 * (2 * kStages + 6) + 1024;
  static_assert((kBM == 128 || (kBM == 64 && kPingPong)) && kBN % 64 == 0 && kBN <= 256, "tile menu");
  static_assert(!kGateUp || kBN == 256, "a gate-up tile is 128 gate + 128 up columns");
  static_assert((kBN / kCluster) * kRowBytes % 1024 == 0, "a multicast slice must start at a swizzle atom");
  static_assert(kSmemBytes <= kMaxDynamicSmem, "shared memory");
  static_assert(kSlabs * kAccumulators <= 192, "accumulators must leave 40 of 232 registers");
};

struct Barriers {
  uint32_t full, empty, order, epilogue;  // addresses of arrays of 8-byte barriers
};

template <class C>
NPT_DEVICE uint32_t ring_base(const uint8_t* raw) {
  return (smem_address(raw) + 1023u) & ~1023u;  // the same offset in every block: multicast needs it
}
template <class C>
NPT_DEVICE Barriers barrier_addresses(uint32_t base) {
  const uint32_t at = base + C::kStages * C::kStageBytes + C::kEpilogueBytes;
  return Barriers{at, at + 8 * C::kStages, at + 16 * C::kStages, at + 16 * C::kStages + 16};
}

template <class C>
NPT_DEVICE void init_barriers(const Barriers& b) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(b.full + 8 * s, 1);                 // [P1] the producer's expect_tx
      barrier_init(b.empty + 8 * s, C::kEmptyCount);   // [P2] every reading warp of the cluster
    }
    for (int i = 0; i < 2; ++i) barrier_init(b.order + 8 * i, 4);     // the other warpgroup's warps
    for (int i = 0; i < 4; ++i) barrier_init(b.epilogue + 8 * i, 1);  // [warpgroup][buffer], expect_tx
    barrier_init_fence();
  }
  if constexpr (C::kCluster > 1) {
    cluster_sync();  // a peer's multicast or arrival must find initialised barriers
  } else {
    __syncthreads();
  }
}

// Loads of one k-block. Its bytes per block: stage_bytes(kBM, kBN, kind). `rank` is this block's in its multicast group, which
// begins at block `group` of the cluster.
template <class C>
NPT_DEVICE void load_block(const Segment& seg, int kind, uint32_t a_dst, uint32_t b_dst, uint32_t bar, int k, int m, int n,
                           uint32_t rank, uint32_t group) {
  constexpr uint16_t kAll = (1u << C::kCluster) - 1;
  tma_load(a_dst, &seg.a, bar, k, m);
  const auto load_b = [&](uint32_t dst, const CUtensorMap* map, int x, int y) {
    if constexpr (C::kCluster > 1) {
      tma_load_multicast(dst, map, bar, x, y, uint16_t(kAll << group));
    } else {
      tma_load(dst, map, bar, x, y);
    }
  };
  if (!C::kMnMajor && kind == kMain) {
    // Two boxes of BN/2 rows; in a cluster each block fetches one and multicasts it. Box h of a gate-up tile is gate or up.
    constexpr int kHalf = C::kBN / 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (C::kCluster == 1 || uint32_t(h) == rank) {
        load_b(b_dst + h * kHalf * kRowBytes, &seg.b[h], k, C::kGateUp ? n : n + h * kHalf);
      }
    }
  } else {
    // 64-column boxes, one per 8 KiB chunk; in a cluster each block fetches its half of the 64 rows of K.
    constexpr int kRows = kBlockK / C::kCluster;
    const int chunks = (C::kGateUp && kind == kLowFirst ? C::kBN / 2 : C::kBN) / kChunkCols;
#pragma unroll
    for (int c = 0; c < C::kBN / kChunkCols; ++c) {
      if (c < chunks) {
        int x = n + (C::kGateUp ? c % 2 : c) * kChunkCols;
        if (C::kGateUp && c < 2 && kind == kLowSecond) x = kOutsideColumn;  // zeros for the gate half
        load_b(b_dst + c * kMnChunkBytes + rank * kRows * kRowBytes, &seg.b[C::kGateUp ? c / 2 : 0], x, k + int(rank) * kRows);
      }
    }
  }
}

// Column of the output where tile n starts: a gate-up tile covers 128 columns of f.
template <class C>
NPT_DEVICE int tile_column(int n) {
  return n * (C::kGateUp ? C::kBN / 2 : C::kBN);
}

NPT_DEVICE void prefetch_maps(const SegkParams& p) {
  for (int s = 0; s < p.num_segments; ++s) {
    tma_prefetch_map(&p.segment[s].a);
    tma_prefetch_map(&p.segment[s].b[0]);
  }
}

// k-blocks [begin, end) of segment s, for the tile at (m, n).
template <class C>
NPT_DEVICE void produce_segment(const SegkParams& p, int s, int begin, int end, uint32_t base, const Barriers& bars, int m, int n,
                                uint32_t rank, uint32_t group, RingPosition& at) {
  const int kind = p.segment_kind[s];
  for (int i = begin; i < end; ++i) {
    const uint32_t stage = base + at.stage * C::kStageBytes, full = bars.full + 8 * at.stage;
    barrier_wait(bars.empty + 8 * at.stage, at.phase ^ 1u);  // [P3] a fresh barrier passes parity 1: first lap is free
    barrier_expect(full, stage_bytes(C::kBM, C::kBN, kind));  // [P4]
    load_block<C>(p.segment[s], kind, stage, stage + C::kABytes, full, i * kBlockK, m, n, rank, group);
    at = ring_advance(at, 1, C::kStages);
  }
}

// The producer thread: all tiles of this cluster, all segments, all k-blocks.
template <class C>
NPT_DEVICE void produce(const SegkParams& p, uint32_t base, const Barriers& bars, uint32_t rank) {
  prefetch_maps(p);
  RingPosition at{0, 0};
  const int tiles = p.tiles_m * p.tiles_n;
  for (int tile = blockIdx.x / C::kCluster; tile < tiles; tile += gridDim.x / C::kCluster) {
    const TileCoord c = tile_coord(tile, p.tiles_m, p.tiles_n, p.group_m);
    const int m = (c.m * C::kCluster + int(rank)) * C::kBM, n = tile_column<C>(c.n);
    for (int s = 0; s < p.num_segments; ++s) {
      produce_segment<C>(p, s, 0, p.segment_blocks[s], base, bars, m, n, rank, 0, at);
    }
  }
}

// Hands a stage back: lane 0 of every consumer warp to the first block of the multicast group, lane 1 to the second. Per warp
// because wgmma.wait_group speaks for the executing warp only.
template <class C>
NPT_DEVICE void release(const Barriers& bars, int stage, uint32_t lane, uint32_t group) {
  if constexpr (C::kCluster > 1) {
    if (lane < uint32_t(C::kCluster)) barrier_arrive_cluster(bars.empty + 8 * stage, group + lane);  // [P6]
  } else {
    if (lane == 0) barrier_arrive(bars.empty + 8 * stage);
  }
}

struct LoopState {
  RingPosition at;
  int held;        // stage whose wgmmas may still run, or -1
  int accumulate;  // 0 for the first k16 of a tile: overwrites the accumulators
  uint32_t group;  // first block of this block's multicast group; 0 unless K is split
};

// `blocks` k-blocks of one kind into acc[slab][0..kCols/2). Leaves the last k-block in flight.
template <class C, int kCols, bool kMn>
NPT_DEVICE void multiply(float (&acc)[C::kSlabs][C::kAccumulators], int blocks, LoopState& s, uint32_t base,
                         const Barriers& bars, uint32_t a_offset, uint32_t lane) {
  for (int i = 0; i < blocks; ++i) {
    const uint32_t stage = base + s.at.stage * C::kStageBytes;
    const uint64_t a = descriptor_k_major(stage + a_offset);
    const uint64_t b = kMn ? descriptor_mn_major(stage + C::kABytes, kMnChunkBytes) : descriptor_k_major(stage + C::kABytes);
    barrier_wait(bars.full + 8 * s.at.stage, s.at.phase);  // [P5]
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
#pragma unroll
      for (int slab = 0; slab < C::kSlabs; ++slab) {
        // 64 rows of 128 bytes are 8192 bytes: 512 in descriptor units.
        Wgmma<kCols, C::kType, 0, kMn ? 1 : 0>::mma(acc[slab], a + slab * 512 + k * descriptor_step(false),
                                                    b + k * descriptor_step(kMn), k == 0 ? s.accumulate : 1);
      }
    }
    wgmma_commit();
    s.accumulate = 1;
    wgmma_wait<1>();  // everything but this k-block is done, so the one before may be overwritten
    if (s.held >= 0) release<C>(bars, s.held, lane, s.group);
    s.held = s.at.stage;
    s.at = ring_advance(s.at, 1, C::kStages);
  }
}

// All k-blocks of one tile. MAIN comes first and has at least one block, so it is what overwrites the accumulators.
template <class C>
NPT_DEVICE void multiply_tile(float (&acc)[C::kSlabs][C::kAccumulators], const SegkParams& p, LoopState& s, uint32_t base,
                              const Barriers& bars, uint32_t a_offset, uint32_t lane) {
  s.held = -1;
  s.accumulate = 0;
  if constexpr (C::kMnMajor) {  // the same instruction: one loop, fewer registers (two made ptxas serialise one instance)
    multiply<C, C::kBN, true>(acc, p.main_blocks + p.low_blocks, s, base, bars, a_offset, lane);
  } else {
    multiply<C, C::kBN, false>(acc, p.main_blocks, s, base, bars, a_offset, lane);
    multiply<C, C::kBN, true>(acc, p.low_blocks, s, base, bars, a_offset, lane);
  }
  if constexpr (C::kGateUp) {
    // wgmmas of different shapes on the same accumulators are not ordered by the hardware (PTX: only those of one shape are), so
    // m64n256 must be done before m64n128 adds to its first half. One drain a tile, and only where LOW_FIRST has blocks.
    if (p.first_blocks > 0) wgmma_wait<0>();
    multiply<C, C::kBN / 2, true>(acc, p.first_blocks, s, base, bars, a_offset, lane);
  }
}

// Tells the compiler that every accumulator changes here, so nothing that reads one moves above a wgmma wait.
template <class C>
NPT_DEVICE void pin(float (&acc)[C::kSlabs][C::kAccumulators]) {
#pragma unroll
  for (int slab = 0; slab < C::kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) asm volatile("" : "+f"(acc[slab][i])::"memory");
  }
}

template <class C>
NPT_DEVICE void finish_tile(float (&acc)[C::kSlabs][C::kAccumulators], LoopState& s, const Barriers& bars, uint32_t lane) {
  wgmma_wait<0>();
  pin<C>(acc);
  release<C>(bars, s.held, lane, s.group);  // [P7]
}

}  // namespace npt
