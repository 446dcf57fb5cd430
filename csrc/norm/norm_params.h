// What the norm kernels are told (npt_kernels/ops/matched_norm/README.md has the formulas).
#pragma once
#include "../low_rank/low_rank_params.h"

namespace npt {

constexpr int kNormThreads = 512;   // at most; a short row takes fewer
constexpr int kNormElements = 8;    // of a 16-byte access

// Rows of h, a and du of any pitch; u, dh and da likewise. A null output is not written, a null du is zero.
struct NormParams {
  MatrixArg h, a, du;
  MatrixArg u, dh, da;
  const void *weight, *bias;  // [width] or null
  void* key_scale;            // forward: [rows]
  const void* d_key_scale;    // backward: [rows] or null
  int32_t rows, width;
  int32_t layer;   // subtract the means (LayerNorm), else RMSNorm
  int32_t vector;  // every row of every tensor starts at a multiple of 16 bytes
  float eps;
};

}  // namespace npt
