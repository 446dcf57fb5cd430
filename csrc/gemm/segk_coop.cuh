// Cooperative segmented-K GEMM: two consumer warpgroups share a 128 x 256 tile (64 rows each). Epilogues kStore, kAct, kGateUp.
//
// The epilogue is not overlapped with the next tile's wgmma, only its TMA stores are; that suits large K, where a tile's
// K loop is long. Short K and read-heavy epilogues: segk_pingpong.cuh.
#pragma once
#include "epilogue.cuh"
#include "mainloop.cuh"

namespace npt {

template <class C>
struct CoopEpilogue {
  const SegkParams& p;
  uint32_t buffers;  // this warpgroup's two 8 KiB tiles
  int barrier_id, thread, warp, lane, row;

  // Tile → shared memory → TMA store. `number` counts the stores of a tile (an even number of them), so buffers alternate
  // and the store that read this buffer two calls ago must be done.
  NPT_DEVICE void store(const CUtensorMap* map, const float* v, int number, int column) const {
    const uint32_t tile = buffers + (number & 1) * 8192;
    if (thread == 0) store_wait_read<1>();
    named_barrier(barrier_id, 128);
    put_tile<C::kType>(tile, v, warp, lane);
    fence_async_proxy();
    named_barrier(barrier_id, 128);
    if (thread == 0) {
      if (row < p.rows && column < p.cols) tma_store(map, tile, column, row);  // TMA clips a tile that reaches over the edge
      store_commit();  // also when nothing was stored: store_wait_read counts groups
    }
  }
};

template <class C, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 1) segk_coop(const __grid_constant__ SegkParams p) {
  static_assert(C::kGateUp == (kEpilogue == Epilogue::kGateUp) && !C::kPingPong);
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = ring_base<C>(raw_smem);
  const Barriers bars = barrier_addresses<C>(base);
  const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
  init_barriers<C>(bars);

  const int group = threadIdx.x / 128;  // not warpgroup(): that costs the gate-up MN-major instance its registers (C7511)
  if (group == 0) {
    registers_shrink<40>();
    if (threadIdx.x == 0) produce<C>(p, base, bars, rank);
  } else {
    registers_grow<232>();
    const int consumer = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const uint32_t a_offset = consumer * 64 * kRowBytes;
    LoopState loop{{0, 0}, -1, 0, 0};
    float acc[1][C::kAccumulators];
    const int tiles = p.tiles_m * p.tiles_n;
    for (int tile = blockIdx.x / C::kCluster; tile < tiles; tile += gridDim.x / C::kCluster) {
      multiply_tile<C>(acc, p, loop, base, bars, a_offset, lane);
      finish_tile<C>(acc, loop, bars, lane);

      const TileCoord c = tile_coord(tile, p.tiles_m, p.tiles_n, p.group_m);
      const int column = tile_column<C>(c.n);
      const CoopEpilogue<C> out{p, base + C::kStages * C::kStageBytes + consumer * 16384u, 1 + consumer, thread,
                                thread / 32, lane, (c.m * C::kCluster + int(rank)) * C::kBM + consumer * 64};
      if constexpr (kEpilogue == Epilogue::kGateUp) {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          // No bias here: with the half segments' loops it left ptxas too few registers (C7511). The host passes a bias as
          // one more low-rank segment, ones [T, 8] times [bias; 0].
          float* const gate = acc[0] + chunk * 32;
          const float* const up = acc[0] + 64 + chunk * 32;
          const int at = column + chunk * kChunkCols;
          if (p.store_pre) {
            out.store(&p.out[1], gate, 3 * chunk, at);
            out.store(&p.out[2], up, 3 * chunk + 1, at);
          }
#pragma unroll
          for (int i = 0; i < 32; ++i) gate[i] = act_forward(gate[i], p.act_a, p.act_b) * up[i];
          out.store(&p.out[0], gate, chunk, at);  // or 3·chunk + 2 after the two above: the same parity
        }
      } else {
#pragma unroll
        for (int chunk = 0; chunk < C::kBN / kChunkCols; ++chunk) {
          float y[32];
          const int at = column + chunk * kChunkCols;
          add_bias<C::kType>(y, acc[0] + chunk * 32, p.bias, at, p.cols, lane);
          if constexpr (kEpilogue == Epilogue::kAct) {
            if (p.store_pre) out.store(&p.out[1], y, 2 * chunk, at);
#pragma unroll
            for (int i = 0; i < 32; ++i) y[i] = act_forward(y[i], p.act_a, p.act_b);
          }
          out.store(&p.out[0], y, kEpilogue == Epilogue::kAct && p.store_pre ? 2 * chunk + 1 : chunk, at);
        }
      }
    }
    if (thread == 0) store_wait_all();
  }
  // A block must not leave while the peer may still multicast into it or arrive at its barriers.
  if constexpr (C::kCluster > 1) cluster_sync();
}

}  // namespace npt
