// Ping-pong segmented-K GEMM: two consumer warpgroups take tiles in turn, one in its K loop while the other is in its
// epilogue. Epilogues kGateUpBwd and kActBwd, which read and write T·f elements (128 x 192), and where K is short kStore, kAct
// (128 x 128: with 192 columns these two spilled 4-32 bytes) and kGateUp (64 x 256, K-major weights).
//
// Order (tools/protocol_model.py mirrors it): order[w] says "warpgroup w may start its K loop" and is completed by the
// other one after it has waited for its last full stage. Besides keeping the tensor core with one tile at a time, this is
// what makes parity waits safe: a warpgroup that started early would wait for a stage use two laps ahead, and mbarrier
// parity cannot tell that from the lap before.
#pragma once
#include "epilogue.cuh"
#include "mainloop.cuh"

namespace npt {

// Per warpgroup 32 KiB of epilogue buffers: kStore / kAct use four 8 KiB tiles in rotation, backward two pairs
// [buffer][first, second] that TMA fills with (gate, up), that are overwritten with (d gate, d up) and stored from.
template <class C>
struct PingPongEpilogue {
  const SegkParams& p;
  uint32_t buffers, barriers;
  int consumer, thread, warp, lane;

  NPT_DEVICE void sync() const { named_barrier(1 + consumer, 128); }

  // `number` counts stores modulo 4 and goes on from tile to tile, so a buffer's last store is four back.
  NPT_DEVICE void store(const CUtensorMap* map, const float* v, int number, int row, int column) const {
    const uint32_t tile = buffers + (number & 3) * 8192;
    if (thread == 0) store_wait_read<3>();
    sync();
    put_tile<C::kType>(tile, v, warp, lane);
    fence_async_proxy();
    sync();
    if (thread == 0) {
      if (row < p.rows && column < p.cols) tma_store(map, tile, column, row);
      store_commit();
    }
  }

  // Thread 0: fetch part j's (gate, up) or (pre) into its buffer. The caller knows that the buffer's last store has read it.
  template <int kInputs>
  NPT_DEVICE void fetch(int j, int row, int column) const {
    const uint32_t buffer = buffers + (j & 1) * 16384, bar = barriers + 8 * (j & 1);
    barrier_expect(bar, kInputs * 8192);  // [E1]
#pragma unroll
    for (int i = 0; i < kInputs; ++i) tma_load(buffer + i * 8192, &p.in[i], bar, column, row);
  }

  // 64 x 64 part: (d inter, gate, up) → (d gate, d up) in place; or (d act, pre) → d pre.
  template <int kInputs>
  NPT_DEVICE void backward(const float* v, int j) const {
    const uint32_t first = buffers + (j & 1) * 16384, second = first + 8192;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t at = matrix_offset(warp, lane, q);
      uint32_t g[4], u[4];
      ldmatrix_x4(first + at, g[0], g[1], g[2], g[3]);
      if constexpr (kInputs == 2) ldmatrix_x4(second + at, u[0], u[1], u[2], u[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float gate[2], up[2] = {1.0f, 1.0f}, d_gate[2], d_up[2];
        unpack<C::kType>(g[i], gate[0], gate[1]);
        if constexpr (kInputs == 2) unpack<C::kType>(u[i], up[0], up[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float d = v[8 * q + 2 * i + e], s = act_sigmoid(gate[e], p.act_a, p.act_b);
          d_gate[e] = d * up[e] * act_slope(gate[e], s, p.act_a, p.act_b);
          d_up[e] = d * gate[e] * s;
        }
        g[i] = pack<C::kType>(d_gate[0], d_gate[1]);
        if constexpr (kInputs == 2) u[i] = pack<C::kType>(d_up[0], d_up[1]);
      }
      // In place: this warp alone reads and writes this block, and its ldmatrix has returned.
      stmatrix_x4(first + at, g[0], g[1], g[2], g[3]);
      if constexpr (kInputs == 2) stmatrix_x4(second + at, u[0], u[1], u[2], u[3]);
    }
  }
};

template <class C, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 1) segk_pingpong(const __grid_constant__ SegkParams p) {
  static_assert(C::kPingPong && C::kGateUp == (kEpilogue == Epilogue::kGateUp));
  constexpr bool kBackward = kEpilogue == Epilogue::kGateUpBwd || kEpilogue == Epilogue::kActBwd;
  constexpr int kInputs = kEpilogue == Epilogue::kGateUpBwd ? 2 : 1;
  constexpr int kChunks = C::kBN / kChunkCols, kParts = C::kSlabs * kChunks;
  static_assert(kBackward ? kParts % 2 == 0 && kParts / 2 % 2 == 1 : kParts % 4 == 0, "buffer rotation and parity below");
  static_assert(!C::kGateUp || C::kSlabs == 1, "gate and up of one slab");
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = ring_base<C>(raw_smem);
  const Barriers bars = barrier_addresses<C>(base);
  const uint32_t rank = C::kCluster > 1 ? cluster_rank() : 0;
  init_barriers<C>(bars);

  const int group = warpgroup();
  if (group == 0) {
    registers_shrink<40>();
    if (threadIdx.x == 0) produce<C>(p, base, bars, rank);
  } else {
    registers_grow<232>();
    const int consumer = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const int tiles = p.tiles_m * p.tiles_n, stride = gridDim.x / C::kCluster;
    const int tile_blocks =
        p.main_blocks + p.low_blocks + (C::kGateUp ? p.first_blocks : 0);  // what the other warpgroup takes from the ring per tile
    const PingPongEpilogue<C> out{p, base + C::kStages * C::kStageBytes + consumer * 32768u,
                                  bars.epilogue + 16 * consumer, consumer, thread, thread / 32, lane};
    LoopState loop{ring_advance({0, 0}, consumer * tile_blocks, C::kStages), -1, 0, 0};
    uint32_t turn = 0;  // tiles this warpgroup has done
    float acc[C::kSlabs][C::kAccumulators];
    for (int tile = blockIdx.x / C::kCluster + consumer * stride; tile < tiles; tile += 2 * stride, ++turn) {
      const TileCoord c = tile_coord(tile, p.tiles_m, p.tiles_n, p.group_m);
      const int row = (c.m * C::kCluster + int(rank)) * C::kBM, column = tile_column<C>(c.n);
      if constexpr (kBackward) {
        if (thread == 0) {
          store_wait_read<0>();  // [E2] the last tile's stores have read both buffers
          out.template fetch<kInputs>(0, row, column);
          out.template fetch<kInputs>(1, row, column + kChunkCols);
        }
      }
      barrier_wait(bars.order + 8 * consumer, (turn & 1u) ^ (consumer == 0 ? 1u : 0u));  // [O1]
      multiply_tile<C>(acc, p, loop, base, bars, 0, lane);
      if (lane == 0) barrier_arrive(bars.order + 8 * (1 - consumer));  // [O2]
      finish_tile<C>(acc, loop, bars, lane);
      loop.at = ring_advance(loop.at, tile_blocks, C::kStages);

      if constexpr (C::kGateUp) {
        // Two stores a tile, or six: their buffers go on in rotation from tile to tile.
        const int base_number = int(turn) * (p.store_pre ? 6 : 2);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          float* const gate = acc[0] + chunk * 32;
          const float* const up = acc[0] + 64 + chunk * 32;
          const int at = column + chunk * kChunkCols, number = base_number + chunk * (p.store_pre ? 3 : 1);
          if (p.store_pre) {
            out.store(&p.out[1], gate, number, row, at);
            out.store(&p.out[2], up, number + 1, row, at);
          }
#pragma unroll
          for (int i = 0; i < 32; ++i) gate[i] = act_forward(gate[i], p.act_a, p.act_b) * up[i];
          out.store(&p.out[0], gate, number + (p.store_pre ? 2 : 0), row, at);
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int slab = j / kChunks, chunk = j % kChunks;
        const int at_row = row + slab * 64, at = column + chunk * kChunkCols;
        const float* const part = acc[slab] + chunk * 32;
        if constexpr (kBackward) {
          barrier_wait(out.barriers + 8 * (j & 1), (turn + uint32_t(j / 2)) & 1u);  // [E3] kParts/2 uses a tile, odd
          out.template backward<kInputs>(part, j);
          fence_async_proxy();
          out.sync();
          if (thread == 0) {
            if (at_row < p.rows && at < p.cols) {
#pragma unroll
              for (int i = 0; i < kInputs; ++i) {
                if (kInputs == 1 || (p.wanted >> i & 1)) tma_store(&p.out[i], out.buffers + (j & 1) * 16384 + i * 8192, at, at_row);
              }
            }
            store_commit();
            if (j + 2 < kParts) {
              store_wait_read<0>();  // [E4] then its buffer may be refilled
              out.template fetch<kInputs>(j + 2, row + (j + 2) / kChunks * 64, column + (j + 2) % kChunks * kChunkCols);
            }
          }
        } else {
          float y[32];
          add_bias<C::kType>(y, part, p.bias, at, p.cols, lane);
          if constexpr (kEpilogue == Epilogue::kAct) {
            if (p.store_pre) out.store(&p.out[1], y, 2 * j, at_row, at);
#pragma unroll
            for (int i = 0; i < 32; ++i) y[i] = act_forward(y[i], p.act_a, p.act_b);
          }
          out.store(&p.out[0], y, kEpilogue == Epilogue::kAct && p.store_pre ? 2 * j + 1 : j, at_row, at);
        }
      }
    }
    if (thread == 0) store_wait_all();
  }
  if constexpr (C::kCluster > 1) cluster_sync();  // as in segk_coop.cuh
}

}  // namespace npt
