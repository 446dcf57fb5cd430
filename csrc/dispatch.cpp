// From a LaunchSpec to a launch: pick the instance, encode or find the tensor maps, fill SegkParams.
#include "dispatch.h"

#include <algorithm>
#include <string>

#include "host.h"

namespace npt {
namespace {

bool is_gate_up(Epilogue e) { return e == Epilogue::kGateUp; }
int num_inputs(Epilogue e) { return e == Epilogue::kGateUpBwd ? 2 : e == Epilogue::kActBwd ? 1 : 0; }
int num_outputs(Epilogue e, bool store_pre) {
  switch (e) {
    case Epilogue::kGateUpBwd: return 2;
    case Epilogue::kAct: return store_pre ? 2 : 1;
    case Epilogue::kGateUp: return store_pre ? 3 : 1;
    default: return 1;
  }
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> list;
    add_coop_bf16(list);
    add_coop_f16(list);
    add_pingpong_bf16(list);
    add_pingpong_f16(list);
    add_pingpong_bwd_bf16(list);
    add_pingpong_bwd_f16(list);
    add_decode_bf16(list);
    add_decode_f16(list);
    add_split_bf16(list);
    add_split_f16(list);
    return list;
  }();
  return all;
}

const Kernel& find_kernel(Family family, Epilogue epilogue, Dtype dtype, bool mn_major, int cluster, int block_m) {
  for (const Kernel& k : kernels()) {
    if (k.family == family && k.epilogue == epilogue && k.dtype == dtype && k.mn_major == mn_major && k.cluster == cluster &&
        k.block_m == block_m) {
      return k;
    }
  }
  fail("no instance for family " + text(int(family)) + ", epilogue " + text(int(epilogue)) + ", dtype " + text(int(dtype)) +
       ", mn_major " + text(mn_major) + ", cluster " + text(cluster) + ", block_m " + text(block_m));
}

void check_launch(const LaunchSpec& spec, const Kernel& kernel) {
  if (spec.rows < 1 || spec.rows > INT32_MAX - 65536) fail("rows = " + text(spec.rows) + " is outside [1, 2^31 - 65537]");
  if (spec.cols < 1 || spec.cols > kMaxColumns) fail("cols = " + text(spec.cols) + " is outside [1, 2^30 - 1024]");
  if (spec.cols % 8 != 0) fail("cols = " + text(spec.cols) + " must be a multiple of 8");
  if (kernel.family == Family::kDecode && spec.rows > kernel.block_m) {
    fail("rows = " + text(spec.rows) + " does not fit the decode instance of " + text(kernel.block_m) + " tokens");
  }
  if (spec.segments.empty() || spec.segments.size() > size_t(kMaxSegments)) {
    fail("got " + text(int64_t(spec.segments.size())) + " segments; 1 to " + text(kMaxSegments) + " are possible");
  }
  int last = kMain;
  for (size_t i = 0; i < spec.segments.size(); ++i) {
    const SegmentSpec& s = spec.segments[i];
    if (s.kind < kMain || s.kind > kLowFirst) fail("segment " + text(int64_t(i)) + " has kind " + text(s.kind));
    if (i == 0 && s.kind != kMain) fail("the first segment must be of kind 0 (it overwrites the accumulators)");
    if (s.kind < last) fail("segments must be ordered by kind; segment " + text(int64_t(i)) + " has kind " + text(s.kind));
    if (s.kind >= kLowSecond && !is_gate_up(spec.epilogue)) fail("half segments exist only in a gate-up tile");
    const bool two = is_gate_up(spec.epilogue) && s.kind < kLowSecond;
    if (two != (s.b1 != nullptr)) {
      fail("segment " + text(int64_t(i)) + (two ? " needs a second operand" : " takes one operand, got two"));
    }
    if (s.k < 1 || s.k > kMaxColumns) fail("segment " + text(int64_t(i)) + " has K = " + text(s.k));
    last = s.kind;
  }
  if (int(spec.in.size()) != num_inputs(spec.epilogue)) fail("got " + text(int64_t(spec.in.size())) + " epilogue inputs");
  if (int(spec.out.size()) != num_outputs(spec.epilogue, spec.store_pre)) {
    fail("got " + text(int64_t(spec.out.size())) + " outputs, need " + text(num_outputs(spec.epilogue, spec.store_pre)));
  }
  for (const MatrixSpec& m : spec.out) {
    if (m.ptr == nullptr && spec.epilogue == Epilogue::kGateUpBwd) continue;  // that gradient is not wanted
    if (m.ptr == nullptr || m.ld < spec.cols) fail("an output has row pitch " + text(m.ld) + " below its width " + text(spec.cols));
  }
  if (spec.bias != nullptr && spec.epilogue != Epilogue::kStore && spec.epilogue != Epilogue::kAct) {
    fail("epilogue " + text(int(spec.epilogue)) + " takes no bias; pass it as a segment ones [T, 8] x [bias; 0]");
  }
  if (reinterpret_cast<uintptr_t>(spec.bias) % 4 != 0) fail("the bias does not start at a multiple of 4 bytes");
  if (spec.split < 1 || spec.split > 8 || (spec.split & (spec.split - 1)) != 0) {
    fail("split = " + text(spec.split) + " must be 1, 2, 4 or 8 (blocks of a portable cluster)");
  }
  if (spec.split * kernel.cluster > 8) {
    fail("split = " + text(spec.split) + " times multicast groups of " + text(kernel.cluster) + " is more than a cluster's 8 blocks");
  }
  if (spec.split > 1 && kernel.family != Family::kDecode && kernel.family != Family::kSplit) {
    fail("only the decode and split kernels split K");
  }
  if (spec.dependent_from >= 0 && kernel.family != Family::kDecode) {
    fail("only the decode kernels overlap with the kernel before");
  }
  int64_t k_blocks = 0;
  for (const SegmentSpec& s : spec.segments) k_blocks += div_up64(s.k, kBlockK);
  if (kernel.family == Family::kSplit && k_blocks < spec.split) {
    fail("split = " + text(spec.split) + " is more than the " + text(k_blocks) + " k-blocks of 64");
  }
  if (spec.dependent_from >= int(spec.segments.size())) fail("dependent_from = " + text(spec.dependent_from) + " names no segment");
  if (spec.group_m < 1) fail("group_m = " + text(spec.group_m) + " must be positive");
}

LaunchPlan launch(const LaunchSpec& spec) {
  const Kernel& kernel = find_kernel(spec.family, spec.epilogue, spec.dtype, spec.mn_major, spec.cluster, spec.block_m);
  check_launch(spec, kernel);
  use_device(spec.device);
  TensorMapCache& cache = maps(spec.device);

  const bool decode = kernel.family == Family::kDecode, gate_up = is_gate_up(spec.epilogue);
  const int b_rows = decode ? 64 : kernel.block_n / 2, b_depth = kBlockK / kernel.cluster;
  SegkParams p{};
  p.num_segments = int(spec.segments.size());
  for (int i = 0; i < p.num_segments; ++i) {
    const SegmentSpec& s = spec.segments[size_t(i)];
    const std::string name = "segment " + text(i);
    p.segment_kind[i] = s.kind;
    p.segment_blocks[i] = int((s.k + kBlockK - 1) / kBlockK);
    (s.kind == kMain                    ? p.main_blocks
     : s.kind == kLowFirst              ? p.first_blocks
     : s.kind == kLowSecond && decode   ? p.second_blocks
                                        : p.low_blocks) += p.segment_blocks[i];
    p.segment[i].a = cache.get({s.a, s.k, spec.rows, s.lda, kChunkCols, kernel.block_m, spec.dtype}, name + "'s activations");
    const bool mn = spec.mn_major || s.kind != kMain;
    const auto weights = [&](const void* ptr, int64_t ld) {
      return cache.get(mn ? MapKey{ptr, spec.cols, s.k, ld, kChunkCols, b_depth, spec.dtype}
                           : MapKey{ptr, s.k, spec.cols, ld, kChunkCols, b_rows, spec.dtype},
                        name + "'s weights");
    };
    p.segment[i].b[0] = weights(s.b0, s.ldb0);
    p.segment[i].b[1] = s.b1 != nullptr ? weights(s.b1, s.ldb1) : p.segment[i].b[0];
  }
  for (size_t i = 0; i < spec.in.size(); ++i) {
    p.in[i] = cache.get({spec.in[i].ptr, spec.cols, spec.rows, spec.in[i].ld, kChunkCols, 64, spec.dtype}, "an epilogue input");
  }
  for (size_t i = 0; i < spec.out.size(); ++i) {
    p.out_ptr[i] = spec.out[i].ptr;
    p.out_ld[i] = spec.out[i].ld;
    if (!decode && spec.out[i].ptr != nullptr) {
      p.wanted |= 1 << i;
      p.out[i] = cache.get({spec.out[i].ptr, spec.cols, spec.rows, spec.out[i].ld, kChunkCols, 64, spec.dtype}, "an output");
    }
  }
  p.bias = spec.bias;
  p.rows = int(spec.rows);
  p.cols = int(spec.cols);
  p.store_pre = spec.store_pre ? 1 : 0;
  p.dependent_from = spec.dependent_from;
  p.act_a = spec.act_a;
  p.act_b = spec.act_b;
  p.group_m = spec.group_m;
  const int columns = decode ? 64 : gate_up ? kernel.block_n / 2 : kernel.block_n;
  p.tiles_n = div_up(p.cols, columns);
  p.tiles_m = decode ? 1 : div_up(p.rows, kernel.block_m * kernel.cluster);
  const int64_t tiles = int64_t(p.tiles_m) * p.tiles_n;
  // group_m · tiles_n and tile + grid must stay in 32 bits.
  if (tiles > INT32_MAX / 8 || int64_t(spec.group_m) * p.tiles_n > INT32_MAX) fail("too many tiles: " + text(tiles));

  // A split tile is one cluster's: its blocks meet once (decode_finish_split, segk_split).
  const int slots = std::max(1, sm_count(spec.device) / kernel.cluster);
  const bool one_tile = spec.split > 1 || kernel.family == Family::kSplit;
  const int blocks = int(one_tile ? tiles : std::min<int64_t>(tiles, slots)) * kernel.cluster * spec.split;
  return launch_kernel(kernel.function,
                       {blocks, 1, 1, kernel.threads, kernel.cluster * spec.split, kernel.smem, spec.dependent_from >= 0},
                       &p, spec.device, spec.stream);
}

size_t tensor_map_count() { return maps(0).size(); }

}  // namespace npt
