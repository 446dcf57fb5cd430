// What the low-rank kernels are told: coefficients of a rule, value gradients (dc and d w_b_up), the rules alone, sums of
// partial sums.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "../common/layout.h"

namespace npt {

// Numbered as RULES in npt_kernels/kernels/cuda.
enum class RuleId : int { kRank1 = 0, kDiagonal = 1, kAnchored = 2, kSelfKey = 3 };

// A row-major matrix of 16-bit elements in global memory; null where a kernel does not use it.
struct MatrixArg {
  void* ptr;
  int64_t ld;
};

// z [T, R] = a @ w_down, p = u @ w_a_upᵀ ([T, R], or [T, 1] for a vector key), c [T, R] = rule(key_scale ⊙ z, p).
// Boxes: a, u {64 of K, 128 rows}; w_z {64 columns, 64 of K}; w_p likewise, {64 of K, BR rows} or, a vector, {64 of K, 8 rows}.
struct CoefficientsParams {
  CUtensorMap a, u, w_z, w_p;
  MatrixArg z, p, c;     // z is read where the instance does not compute it; a null one is not written
  const void* key_scale;  // [T] or null
  int32_t blocks_a, blocks_u;  // k-blocks of 64
  int32_t rows, rank;          // T, R
  int32_t rule, width;         // RuleId; columns of one rank-1 term (rank1), else R
  float scale;
};

// dc [T, R] = dy @ w_b_upᵀ in shares over column blocks, d w_b_up [R, N] = cᵀ @ dy in shares over token ranges.
// Boxes: dy and c {64 columns, 64 tokens}; b {64 columns, 64 ranks}.
struct ValueGradsParams {
  CUtensorMap dy, c, b;
  float* dc;  // [column blocks, T, R]
  float* db;  // [token ranges, R, N]
  int32_t rows, cols, rank;
  int32_t tiles;  // of 64 tokens in all; split over gridDim.y ranges
};

// The rules alone. Forward: c from z and p. Backward: dz (of the scaled z) and dp from dc, given as a tensor or as shares.
struct RuleParams {
  MatrixArg z, p, c, dc, dz, dp;
  const float* shares;  // [parts, T, R], or null: then dc is the tensor
  const void* key_scale;
  int32_t rows, rank, terms, width, parts, rule;
  float scale;
};

struct ReduceParams {
  const float* source;  // [parts, size]
  void* out;
  int64_t size;  // a multiple of 4
  int32_t parts;
};

}  // namespace npt
