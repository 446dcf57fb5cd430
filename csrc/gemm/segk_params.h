// What a segmented-K GEMM kernel is told: Y[M, N] = Σ_s A_s[M, K_s] · B_s[N, K_s]ᵀ, then an epilogue.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "../common/layout.h"

namespace npt {

enum class Epilogue : int {
  kStore = 0,      // out0 = Y + bias
  kAct = 1,        // out0 = act(Y + bias); out1 = Y + bias if store_pre                   (plain MLP)
  kGateUp = 2,       // gate, up from one B stage; out0 = act(gate) · up; out1, out2 = gate, up if store_pre
  kActBwd = 3,     // Y = d act(pre); in0 = pre; out0 = Y · act'(pre)
  kGateUpBwd = 4,    // Y = d inter; in0 = gate, in1 = up; out0 = d gate, out1 = d up
};

// One term of the sum. Boxes: a {64 of K, BM rows}; K-major b {64 of K, BN/2 rows}; MN-major b {64 columns, 64/cluster of K}.
// Decode: a {64 of K, 8..64 tokens}; b {64 of K, 64 rows} or {64 columns, 64 of K}.
struct Segment {
  CUtensorMap a;
  CUtensorMap b[2];  // second: the up half of a gate-up tile (MAIN, LOW); elsewhere a copy of the first
};

// Passed by value as __grid_constant__, so a captured CUDA graph keeps it; the maps are read by TMA from there.
struct SegkParams {
  Segment segment[kMaxSegments];
  CUtensorMap in[2];
  CUtensorMap out[3];
  void* out_ptr[3];     // decode stores without TMA: element (row, col) at out_ptr + row·out_ld + col
  int64_t out_ld[3];    // in elements
  const void* bias;      // kStore, kAct
  int32_t segment_blocks[kMaxSegments];  // k-blocks of 64, ceil(K_s / 64)
  int32_t segment_kind[kMaxSegments];    // SegmentKind, ascending
  // k-blocks as consumers loop over them. GEMM: low includes LOW_SECOND and second is 0; decode keeps them apart.
  int32_t main_blocks, low_blocks, second_blocks, first_blocks;
  int32_t num_segments;
  int32_t rows, cols;                    // M and N of the outputs (gate-up: N = f)
  int32_t tiles_m, tiles_n, group_m;     // tiles_m counts clusters of tiles
  int32_t store_pre;
  int32_t wanted;                        // backward: bit i set if out[i] is to be stored
  int32_t dependent_from;                // decode: first segment whose activations the kernel before writes; -1: plain launch
  float act_a, act_b;                    // act(v) = v · sigmoid(v · (act_a + act_b · v²))
};

}  // namespace npt
