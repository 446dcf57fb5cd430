// Host interface of the skinny kernels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../host.h"
#include "skinny_params.h"

namespace npt {

enum class SkinnyFamily : int { kShrink = 0, kPair = 1, kRuleForward = 2, kRuleBackward = 3, kReduce = 4 };

// One compiled kernel. `variant`: shrink 10·KeyKind + computes z; rules the vector width; backward 10·shares + vector width.
struct SkinnyKernel {
  const void* function;
  SkinnyFamily family;
  Dtype dtype;
  int tile, variant, threads, smem;
};

struct ShrinkSpec {
  Dtype dtype;
  MatrixArg a, u, w_down, key;  // w_down row-major [d_a, R]; key [R, d_u] or [d_u, R] row-major, or [1, d_u]
  int key_kind;                 // KeyKind
  MatrixArg z, p, c;
  bool compute_z;
  const void* key_scale;
  int64_t rows, d_a, d_u, rank;
  int rule, width, tile, parts;
  float scale;
  int device;
  void* stream;
};

struct PairSpec {
  Dtype dtype;
  MatrixArg dy, c, b;
  float *dc, *db;
  int64_t rows, cols, rank;
  int ranges;
  int device;
  void* stream;
};

struct RuleSpec {
  bool backward;
  Dtype dtype;
  RuleParams params;
  int vec;
  int device;
  void* stream;
};

struct ReduceSpec {
  Dtype dtype;
  ReduceParams params;
  int device;
  void* stream;
};

const std::vector<SkinnyKernel>& skinny_kernels();
// Each checks first and raises std::invalid_argument with the bad value; kDryRun stops before the launch.
LaunchPlan launch_shrink(const ShrinkSpec& spec);
LaunchPlan launch_pair(const PairSpec& spec);
LaunchPlan launch_rule(const RuleSpec& spec);
LaunchPlan launch_reduce(const ReduceSpec& spec);

void add_shrink_bf16(std::vector<SkinnyKernel>&);
void add_shrink_f16(std::vector<SkinnyKernel>&);
void add_skinny_bf16(std::vector<SkinnyKernel>&);
void add_skinny_f16(std::vector<SkinnyKernel>&);

}  // namespace npt
