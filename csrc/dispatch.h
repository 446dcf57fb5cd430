// Host interface between the bindings, the launcher and the instance translation units.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/layout.h"
#include "gemm/segk_params.h"
#include "host.h"

namespace npt {

enum class Family : int { kCoop = 0, kPingPong = 1, kDecode = 2, kSplit = 3 };

// One compiled kernel.
struct Kernel {
  const void* function;
  Family family;
  Epilogue epilogue;
  Dtype dtype;
  bool mn_major;
  int block_m, block_n, cluster, stages, threads, smem;  // decode: block_m tokens, block_n weight rows
};

struct SegmentSpec {
  int kind;
  const void* a;  // [rows, k]
  int64_t lda, k;
  const void* b0;  // [cols, k] K-major or [k, cols] MN-major
  const void* b1;  // second operand of a gate-up tile, or null
  int64_t ldb0, ldb1;
};

struct MatrixSpec {
  void* ptr;
  int64_t ld;
};

struct LaunchSpec {
  Family family;
  Epilogue epilogue;
  Dtype dtype;
  bool mn_major;
  int cluster, block_m;
  int64_t rows, cols;
  std::vector<SegmentSpec> segments;
  std::vector<MatrixSpec> in, out;
  const void* bias;  // kStore and kAct only
  float act_a, act_b;
  bool store_pre;
  int group_m;
  int split;           // kDecode, kSplit: parts of a tile's K (1, 2, 4 or 8), each a block or a multicast group of them
  int dependent_from;  // decode: see SegkParams; -1 for a plain launch
  int device;          // kDryRun: no launch
  void* stream;
};

const std::vector<Kernel>& kernels();
const Kernel& find_kernel(Family family, Epilogue epilogue, Dtype dtype, bool mn_major, int cluster, int block_m);
// Everything that can be checked and computed without a device; raises std::invalid_argument with the bad value.
void check_launch(const LaunchSpec& spec, const Kernel& kernel);
LaunchPlan launch(const LaunchSpec& spec);
size_t tensor_map_count();

// Instances, one function a translation unit (inst/*.cu).
void add_coop_bf16(std::vector<Kernel>&);
void add_coop_f16(std::vector<Kernel>&);
void add_pingpong_bf16(std::vector<Kernel>&);
void add_pingpong_f16(std::vector<Kernel>&);
void add_pingpong_bwd_bf16(std::vector<Kernel>&);
void add_pingpong_bwd_f16(std::vector<Kernel>&);
void add_decode_bf16(std::vector<Kernel>&);
void add_decode_f16(std::vector<Kernel>&);
void add_split_bf16(std::vector<Kernel>&);
void add_split_f16(std::vector<Kernel>&);

}  // namespace npt
