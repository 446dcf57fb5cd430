// From a low-rank spec to a launch: checks, instance, tensor maps, grid.
#include <algorithm>

#include "low_rank_dispatch.h"

namespace npt {
namespace {

const LowRankKernel& find(LowRankFamily family, Dtype dtype, int tile, int variant) {
  for (const LowRankKernel& k : low_rank_kernels()) {
    if (k.family == family && k.dtype == dtype && k.tile == tile && k.variant == variant) return k;
  }
  fail("no low-rank instance for family " + text(int(family)) + ", dtype " + text(int(dtype)) + ", tile " + text(tile) +
       ", variant " + text(variant));
}

void check_size(const char* name, int64_t value, int64_t multiple) {
  if (value < 1 || value > INT32_MAX - 65536) fail(std::string(name) + " = " + text(value) + " is outside [1, 2^31 - 65537]");
  if (value % multiple != 0) fail(std::string(name) + " = " + text(value) + " must be a multiple of " + text(multiple));
}

// Rows that the kernels access two elements at a time.
void check_rows(const char* name, const MatrixArg& m, int64_t width) {
  if (m.ptr == nullptr) return;
  if (m.ld < width) fail(std::string(name) + " has row pitch " + text(m.ld) + " below its width " + text(width));
  if (reinterpret_cast<uintptr_t>(m.ptr) % 4 != 0 || (width > 1 && m.ld % 2 != 0)) {
    fail(std::string(name) + " must start at a multiple of 4 bytes and have an even row pitch, got pitch " + text(m.ld));
  }
}

}  // namespace

const std::vector<LowRankKernel>& low_rank_kernels() {
  static const std::vector<LowRankKernel> all = [] {
    std::vector<LowRankKernel> list;
    add_coefficients_bf16(list);
    add_coefficients_f16(list);
    add_low_rank_bf16(list);
    add_low_rank_f16(list);
    add_norm_bf16(list);
    add_norm_f16(list);
    return list;
  }();
  return all;
}

LaunchPlan launch_coefficients(const CoefficientsSpec& s) {
  check_size("T", s.rows, 1);
  check_size("R", s.rank, 8);
  const bool key = s.key_kind != 0, vector = s.key_kind == 3;
  if (s.compute_z) check_size("d_a", s.d_a, 8);
  if (key) check_size("d_u", s.d_u, 8);
  if (s.parts != 1 && s.parts != 2 && s.parts != 4 && s.parts != 8) fail("parts = " + text(s.parts) + " must be 1, 2, 4 or 8");
  if (s.rule < 0 || s.rule > 3) fail("rule = " + text(s.rule) + " is unknown");
  const bool wants_vector = s.rule == int(RuleId::kAnchored), wants_none = s.rule == int(RuleId::kSelfKey);
  if (vector != wants_vector || key == wants_none) fail("rule " + text(s.rule) + " does not go with key kind " + text(s.key_kind));
  if (!s.compute_z && s.c.ptr != nullptr && s.z.ptr == nullptr) fail("c needs z, which is neither computed nor given");
  if (s.rule == int(RuleId::kRank1) && s.c.ptr != nullptr) {
    if (s.width < 1 || s.rank % s.width != 0) fail("a term of width " + text(s.width) + " does not divide R = " + text(s.rank));
    if (s.rank > s.tile && s.tile % s.width != 0) {
      fail("a term of width " + text(s.width) + " crosses the tiles of " + text(s.tile) + " ranks that R = " + text(s.rank) + " needs");
    }
  }
  check_rows("z", s.z, s.rank);
  check_rows("p", s.p, vector ? 1 : s.rank);
  check_rows("c", s.c, s.rank);
  const LowRankKernel& kernel = find(LowRankFamily::kCoefficients, s.dtype, s.tile, 10 * s.key_kind + int(s.compute_z));
  use_device(s.device);
  TensorMapCache& cache = maps(s.device);
  CoefficientsParams p{};
  if (s.compute_z) {
    p.a = cache.get({s.a.ptr, s.d_a, s.rows, s.a.ld, kChunkCols, 128, s.dtype}, "a");
    p.w_z = cache.get({s.w_down.ptr, s.rank, s.d_a, s.w_down.ld, kChunkCols, kBlockK, s.dtype}, "w_down");
    p.blocks_a = div_up(int(s.d_a), kBlockK);
  }
  if (key) {
    p.u = cache.get({s.u.ptr, s.d_u, s.rows, s.u.ld, kChunkCols, 128, s.dtype}, "u");
    p.w_p = cache.get(s.key_kind == 2 ? MapKey{s.key.ptr, s.rank, s.d_u, s.key.ld, kChunkCols, kBlockK, s.dtype}
                                      : MapKey{s.key.ptr, s.d_u, vector ? 1 : s.rank, s.key.ld, kChunkCols, vector ? 8 : s.tile, s.dtype},
                      "w_a_up");
    p.blocks_u = div_up(int(s.d_u), kBlockK);
  }
  p.z = s.z;
  p.p = s.p;
  p.c = s.c;
  p.key_scale = s.key_scale;
  p.rows = int(s.rows);
  p.rank = int(s.rank);
  p.rule = s.rule;
  p.width = s.width;
  p.scale = s.scale;
  return launch_kernel(kernel.function,
                       {div_up(p.rows, 128) * s.parts, div_up(p.rank, s.tile), 1, kernel.threads, s.parts, kernel.smem, false}, &p,
                       s.device, s.stream);
}

LaunchPlan launch_value_grads(const ValueGradsSpec& s) {
  check_size("T", s.rows, 1);
  check_size("N", s.cols, 8);
  check_size("R", s.rank, 8);
  ValueGradsParams p{};
  p.tiles = div_up(int(s.rows), 64);
  if (s.ranges < 1 || s.ranges > p.tiles || s.ranges > 65535) {
    fail("ranges = " + text(s.ranges) + " is outside [1, " + text(p.tiles) + "], the tiles of 64 tokens");
  }
  if (s.dc == nullptr || s.db == nullptr) fail("dc and db are needed");
  const LowRankKernel& kernel = find(LowRankFamily::kValueGrads, s.dtype, 64, 0);
  use_device(s.device);
  TensorMapCache& cache = maps(s.device);
  p.dy = cache.get({s.dy.ptr, s.cols, s.rows, s.dy.ld, kChunkCols, 64, s.dtype}, "dy");
  p.c = cache.get({s.c.ptr, s.rank, s.rows, s.c.ld, kChunkCols, 64, s.dtype}, "c");
  p.b = cache.get({s.b.ptr, s.cols, s.rank, s.b.ld, kChunkCols, 64, s.dtype}, "w_b_up");
  p.dc = s.dc;
  p.db = s.db;
  p.rows = int(s.rows);
  p.cols = int(s.cols);
  p.rank = int(s.rank);
  return launch_kernel(kernel.function,
                       {div_up(p.cols, 512), s.ranges, div_up(p.rank, 64), kernel.threads, 1, kernel.smem, false}, &p, s.device,
                       s.stream);
}

LaunchPlan launch_rule(const RuleSpec& s) {
  const RuleParams& p = s.params;
  check_size("T", p.rows, 1);
  check_size("R", p.rank, 1);
  if (p.terms < 1 || p.terms * int64_t(p.width) != p.rank) {
    fail(text(p.terms) + " terms of width " + text(p.width) + " are not R = " + text(p.rank));
  }
  if (p.rule < 0 || p.rule > 3) fail("rule = " + text(p.rule) + " is unknown");
  if (p.rule != int(RuleId::kRank1) && p.terms != 1) fail("only rank1 has terms, got " + text(p.terms));
  const bool shares = p.shares != nullptr;
  if (shares && p.parts < 1) fail("parts = " + text(p.parts) + " must be positive");
  if (shares && p.width > 1024) fail("shares are added for terms of up to 1024 columns, got " + text(p.width));
  if (s.vec == 2) {
    if (p.width % 2 != 0) fail("two elements at a time need terms of even width, got " + text(p.width));
    for (const MatrixArg& m : {p.z, p.c, p.dc, p.dz}) check_rows("a tensor of the rule", m, p.rank);
    const int columns = p.rule == int(RuleId::kAnchored) ? 1 : p.rank;
    for (const MatrixArg& m : {p.p, p.dp}) check_rows("a tensor of the rule", m, columns);
  }
  const int variant = s.backward ? 10 * int(shares) + s.vec : s.vec;
  const LowRankFamily family = s.backward ? LowRankFamily::kRuleBackward : LowRankFamily::kRuleForward;
  const LowRankKernel& kernel = find(family, s.dtype, 0, variant);
  use_device(s.device);
  const int64_t warps = int64_t(p.rows) * p.terms, blocks = (warps + kernel.threads / 32 - 1) / (kernel.threads / 32);
  if (blocks > INT32_MAX) fail("too many rows and terms: " + text(warps));
  RuleParams copy = p;
  return launch_kernel(kernel.function, {int(blocks), 1, 1, kernel.threads, 1, kernel.smem, false}, &copy, s.device, s.stream);
}

LaunchPlan launch_reduce(const ReduceSpec& s) {
  if (s.params.size < 4 || s.params.size % 4 != 0) fail("size = " + text(s.params.size) + " must be a multiple of 4");
  if (s.params.parts < 1) fail("parts = " + text(s.params.parts) + " must be positive");
  if (reinterpret_cast<uintptr_t>(s.params.source) % 16 != 0 || reinterpret_cast<uintptr_t>(s.params.out) % 8 != 0) {
    fail("shares must start at a multiple of 16 bytes and their sum at one of 8");
  }
  const LowRankKernel& kernel = find(LowRankFamily::kReduce, s.dtype, 0, 0);
  const int64_t blocks = (s.params.size / 4 + kernel.threads - 1) / kernel.threads;
  if (blocks > INT32_MAX) fail("size = " + text(s.params.size) + " is too large");
  use_device(s.device);
  ReduceParams copy = s.params;
  return launch_kernel(kernel.function, {int(blocks), 1, 1, kernel.threads, 1, kernel.smem, false}, &copy, s.device, s.stream);
}

LaunchPlan launch_norm(const NormSpec& s) {
  NormParams p = s.params;
  check_size("T", p.rows, 1);
  check_size("d", p.width, 1);
  constexpr int kWidest = 4 * kNormThreads * kNormElements;
  if (p.width > kWidest) fail("d = " + text(p.width) + " is more than the " + text(kWidest) + " that a block holds");
  if (p.h.ptr == nullptr || p.a.ptr == nullptr) fail("h and a are needed");
  if (s.backward ? p.dh.ptr == nullptr && p.da.ptr == nullptr : p.u.ptr == nullptr || p.key_scale == nullptr) {
    fail(s.backward ? "dh or da is needed" : "u and key_scale are needed");
  }
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  p.vector = aligned(p.weight) && aligned(p.bias);
  for (const MatrixArg& m : {p.h, p.a, p.du, p.u, p.dh, p.da}) {
    if (m.ptr == nullptr) continue;
    if (p.rows > 1 && m.ld < p.width) fail("a row pitch of " + text(m.ld) + " is below d = " + text(p.width));
    if (!aligned(m.ptr) || (p.rows > 1 && m.ld % kNormElements != 0)) p.vector = 0;
  }
  const int accesses = div_up(p.width, kNormElements);
  const LowRankFamily family = s.backward ? LowRankFamily::kNormBackward : LowRankFamily::kNormForward;
  const LowRankKernel& kernel = find(family, s.dtype, 0, accesses <= kNormThreads ? 1 : 4);
  const int threads = std::min(kernel.threads, div_up(accesses, 32) * 32);
  use_device(s.device);
  return launch_kernel(kernel.function, {p.rows, 1, 1, threads, 1, kernel.smem, false}, &p, s.device, s.stream);
}

}  // namespace npt
