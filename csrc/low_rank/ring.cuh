// The ring of the low-rank kernels: one producer thread, two consumer warpgroups that all read every stage, no cluster traffic.
// Protocol: [P1]..[P7] of gemm/mainloop.cuh with a cluster of one, as tools/protocol_model.py says.
#pragma once
#include "../common/ptx.cuh"
#include "../common/wgmma.inc"
#include "low_rank_params.h"

namespace npt {

constexpr int kLowRankThreads = 288;  // two consumer warpgroups, then the producer warp

template <int kStages>
struct LowRankRing {
  uint32_t base, stage_bytes, full, empty;
  RingPosition at{0, 0};

  NPT_DEVICE LowRankRing(uint32_t base_, uint32_t stage_bytes_, uint32_t barriers)
      : base(base_), stage_bytes(stage_bytes_), full(barriers), empty(barriers + 8 * kStages) {}
  NPT_DEVICE void init() const {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);  // every consumer warp
    }
  }
  NPT_DEVICE uint32_t stage() const { return base + at.stage * stage_bytes; }
  // Producer: wait until the stage is free; returns its full barrier, which expects `bytes`.
  NPT_DEVICE uint32_t reserve(uint32_t bytes) const {
    barrier_wait(empty + 8 * at.stage, at.phase ^ 1u);
    barrier_expect(full + 8 * at.stage, bytes);
    return full + 8 * at.stage;
  }
  NPT_DEVICE void wait() const { barrier_wait(full + 8 * at.stage, at.phase); }
  NPT_DEVICE void release(int stage, int lane) const {
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  }
  NPT_DEVICE void advance() { at = ring_advance(at, 1, kStages); }
};

}  // namespace npt
