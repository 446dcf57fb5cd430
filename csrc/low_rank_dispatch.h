// Host interface of the low-rank kernels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "host.h"
#include "low_rank/low_rank_params.h"
#include "norm/norm_params.h"

namespace npt {

enum class LowRankFamily : int {
  kCoefficients = 0, kValueGrads = 1, kRuleForward = 2, kRuleBackward = 3, kReduce = 4, kNormForward = 5, kNormBackward = 6
};

// One compiled kernel. `variant`: coefficients 10·KeyKind + computes z; rules the vector width; backward 10·shares + vector
// width; norms the 16-byte accesses a thread.
struct LowRankKernel {
  const void* function;
  LowRankFamily family;
  Dtype dtype;
  int tile, variant, threads, smem;
};

struct CoefficientsSpec {
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

struct ValueGradsSpec {
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

struct NormSpec {
  bool backward;
  Dtype dtype;
  NormParams params;  // `vector` is the launcher's
  int device;
  void* stream;
};

const std::vector<LowRankKernel>& low_rank_kernels();
// Each checks first and raises std::invalid_argument with the bad value; kDryRun stops before the launch.
LaunchPlan launch_coefficients(const CoefficientsSpec& spec);
LaunchPlan launch_value_grads(const ValueGradsSpec& spec);
LaunchPlan launch_rule(const RuleSpec& spec);
LaunchPlan launch_reduce(const ReduceSpec& spec);
LaunchPlan launch_norm(const NormSpec& spec);

void add_coefficients_bf16(std::vector<LowRankKernel>&);
void add_coefficients_f16(std::vector<LowRankKernel>&);
void add_low_rank_bf16(std::vector<LowRankKernel>&);
void add_low_rank_f16(std::vector<LowRankKernel>&);
void add_norm_bf16(std::vector<LowRankKernel>&);
void add_norm_f16(std::vector<LowRankKernel>&);

}  // namespace npt
