// Python module npt_kernels._cuda: addresses, sizes and a stream as integers, so no torch headers. Callers:
// npt_kernels/kernels/cuda/launch.py, which checks tensors first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "low_rank_dispatch.h"

namespace py = pybind11;

namespace {

void* pointer(uint64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

using Segment = std::array<int64_t, 8>;           // kind, a, lda, k, b0, ldb0, b1, ldb1
using Matrix = std::pair<uint64_t, int64_t>;      // address, row pitch in elements

npt::MatrixArg matrix(const Matrix& m) { return {pointer(m.first), m.second}; }

py::dict described(const npt::LaunchPlan& plan) {
  return py::dict(py::arg("grid") = py::make_tuple(plan.grid_x, plan.grid_y, plan.grid_z), py::arg("threads") = plan.threads,
                  py::arg("cluster") = plan.cluster, py::arg("smem") = plan.smem, py::arg("overlap") = plan.overlap);
}

npt::LaunchSpec make_spec(int family, int epilogue, int dtype, bool mn_major, int cluster, int block_m, int64_t rows,
                          int64_t cols, const std::vector<Segment>& segments, const std::vector<Matrix>& in,
                          const std::vector<Matrix>& out, uint64_t bias, float act_a, float act_b,
                          bool store_pre, int group_m, int split, int dependent_from, int device, uint64_t stream) {
  npt::LaunchSpec spec{};
  spec.family = static_cast<npt::Family>(family);
  spec.epilogue = static_cast<npt::Epilogue>(epilogue);
  spec.dtype = static_cast<npt::Dtype>(dtype);
  spec.mn_major = mn_major;
  spec.cluster = cluster;
  spec.block_m = block_m;
  spec.rows = rows;
  spec.cols = cols;
  for (const Segment& s : segments) {
    spec.segments.push_back({int(s[0]), pointer(uint64_t(s[1])), s[2], s[3], pointer(uint64_t(s[4])), pointer(uint64_t(s[6])),
                             s[5], s[7]});
  }
  for (const Matrix& m : in) spec.in.push_back({pointer(m.first), m.second});
  for (const Matrix& m : out) spec.out.push_back({pointer(m.first), m.second});
  spec.bias = pointer(bias);
  spec.act_a = act_a;
  spec.act_b = act_b;
  spec.store_pre = store_pre;
  spec.group_m = group_m;
  spec.split = split;
  spec.dependent_from = dependent_from;
  spec.device = device;
  spec.stream = pointer(stream);
  return spec;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Hopper kernels of npt_kernels (csrc/). Unverified on hardware; see csrc/README.md.";
#define NPT_SPEC_ARGUMENTS                                                                                              \
  py::arg("family"), py::arg("epilogue"), py::arg("dtype"), py::arg("mn_major"), py::arg("cluster"), py::arg("block_m"), \
      py::arg("rows"), py::arg("cols"), py::arg("segments"), py::arg("inputs"), py::arg("outputs"), py::arg("bias"),     \
      py::arg("act_a"), py::arg("act_b"), py::arg("store_pre"), py::arg("group_m"), py::arg("split"), \
      py::arg("dependent_from"), py::arg("device"), py::arg("stream")
  m.attr("DRY_RUN") = npt::kDryRun;
  m.def(
      "launch",
      [](int family, int epilogue, int dtype, bool mn_major, int cluster, int block_m, int64_t rows, int64_t cols,
         const std::vector<Segment>& segments, const std::vector<Matrix>& in, const std::vector<Matrix>& out, uint64_t bias,
         float act_a, float act_b, bool store_pre, int group_m, int split, int dependent_from, int device, uint64_t stream) {
        return described(npt::launch(make_spec(family, epilogue, dtype, mn_major, cluster, block_m, rows, cols, segments, in,
                                               out, bias, act_a, act_b, store_pre, group_m, split, dependent_from, device,
                                               stream)));
      },
      NPT_SPEC_ARGUMENTS,
      "Check, encode tensor maps and launch on `stream` (asynchronous); device DRY_RUN: no driver and no launch.");
  m.def(
      "coefficients",
      [](int dtype, int rule, int width, float scale, const Matrix& a, const Matrix& u, const Matrix& w_down, const Matrix& key,
         int key_kind, const Matrix& z, const Matrix& p, const Matrix& c, bool compute_z, uint64_t key_scale, int64_t rows,
         int64_t d_a, int64_t d_u, int64_t rank, int tile, int parts, int device, uint64_t stream) {
        return described(npt::launch_coefficients({static_cast<npt::Dtype>(dtype), matrix(a), matrix(u), matrix(w_down),
                                                   matrix(key), key_kind, matrix(z), matrix(p), matrix(c), compute_z,
                                                   pointer(key_scale), rows, d_a, d_u, rank, rule, width, tile, parts, scale,
                                                   device, pointer(stream)}));
      },
      py::arg("dtype"), py::arg("rule"), py::arg("width"), py::arg("scale"), py::arg("a"), py::arg("u"), py::arg("w_down"),
      py::arg("key"), py::arg("key_kind"), py::arg("z"), py::arg("p"), py::arg("c"), py::arg("compute_z"), py::arg("key_scale"),
      py::arg("rows"), py::arg("d_a"), py::arg("d_u"), py::arg("rank"), py::arg("tile"), py::arg("parts"), py::arg("device"),
      py::arg("stream"), "z, p and c of a rule from one reading of a and u.");
  m.def(
      "value_grads",
      [](int dtype, const Matrix& dy, const Matrix& c, const Matrix& b, uint64_t dc, uint64_t db, int64_t rows, int64_t cols,
         int64_t rank, int ranges, int device, uint64_t stream) {
        return described(npt::launch_value_grads({static_cast<npt::Dtype>(dtype), matrix(dy), matrix(c), matrix(b),
                                                  static_cast<float*>(pointer(dc)), static_cast<float*>(pointer(db)), rows, cols,
                                                  rank, ranges, device, pointer(stream)}));
      },
      py::arg("dtype"), py::arg("dy"), py::arg("c"), py::arg("b"), py::arg("dc"), py::arg("db"), py::arg("rows"), py::arg("cols"),
      py::arg("rank"), py::arg("ranges"), py::arg("device"), py::arg("stream"),
      "Shares of dc = dy @ w_b_up^T and d w_b_up = c^T @ dy from one reading of dy.");
  m.def(
      "rule",
      [](bool backward, int dtype, int rule, int terms, int width, float scale, const Matrix& z, const Matrix& p, const Matrix& c,
         const Matrix& dc, const Matrix& dz, const Matrix& dp, uint64_t shares, int parts, uint64_t key_scale, int64_t rows,
         int64_t rank, int vec, int device, uint64_t stream) {
        const npt::RuleParams params{matrix(z), matrix(p), matrix(c), matrix(dc), matrix(dz), matrix(dp),
                                     static_cast<const float*>(pointer(shares)), pointer(key_scale), int(rows), int(rank), terms,
                                     width, parts, rule, scale};
        return described(npt::launch_rule({backward, static_cast<npt::Dtype>(dtype), params, vec, device, pointer(stream)}));
      },
      py::arg("backward"), py::arg("dtype"), py::arg("rule"), py::arg("terms"), py::arg("width"), py::arg("scale"), py::arg("z"),
      py::arg("p"), py::arg("c"), py::arg("dc"), py::arg("dz"), py::arg("dp"), py::arg("shares"), py::arg("parts"),
      py::arg("key_scale"), py::arg("rows"), py::arg("rank"), py::arg("vec"), py::arg("device"), py::arg("stream"),
      "A rule alone: c, or dz and dp.");
  m.def(
      "reduce",
      [](int dtype, uint64_t source, uint64_t out, int64_t size, int parts, int device, uint64_t stream) {
        return described(npt::launch_reduce({static_cast<npt::Dtype>(dtype),
                                             {static_cast<const float*>(pointer(source)), pointer(out), size, parts},
                                             device, pointer(stream)}));
      },
      py::arg("dtype"), py::arg("source"), py::arg("out"), py::arg("size"), py::arg("parts"), py::arg("device"),
      py::arg("stream"), "Sum of fp32 shares, from the first to the last.");
  m.def(
      "norm",
      [](bool backward, int dtype, bool layer, float eps, const Matrix& h, const Matrix& a, const Matrix& du, const Matrix& u,
         const Matrix& dh, const Matrix& da, uint64_t weight, uint64_t bias, uint64_t key_scale, uint64_t d_key_scale, int64_t rows,
         int64_t width, int device, uint64_t stream) {
        const npt::NormParams params{matrix(h), matrix(a), matrix(du), matrix(u), matrix(dh), matrix(da), pointer(weight),
                                     pointer(bias), pointer(key_scale), pointer(d_key_scale), int(rows), int(width), layer, 0,
                                     eps};
        return described(npt::launch_norm({backward, static_cast<npt::Dtype>(dtype), params, device, pointer(stream)}));
      },
      py::arg("backward"), py::arg("dtype"), py::arg("layer"), py::arg("eps"), py::arg("h"), py::arg("a"), py::arg("du"),
      py::arg("u"), py::arg("dh"), py::arg("da"), py::arg("weight"), py::arg("bias"), py::arg("key_scale"),
      py::arg("d_key_scale"), py::arg("rows"), py::arg("width"), py::arg("device"), py::arg("stream"),
      "u and key_scale of matched_norm, or dh and da.");
  m.def("tensor_map_count", &npt::tensor_map_count, "Tensor maps in the cache.");
  m.def(
      "kernels",
      [] {
        py::list list;
        for (const npt::Kernel& k : npt::kernels()) {
          list.append(py::dict(py::arg("family") = int(k.family), py::arg("epilogue") = int(k.epilogue),
                               py::arg("dtype") = int(k.dtype), py::arg("mn_major") = k.mn_major,
                               py::arg("cluster") = k.cluster, py::arg("block_m") = k.block_m,
                               py::arg("block_n") = k.block_n, py::arg("stages") = k.stages,
                               py::arg("threads") = k.threads, py::arg("smem") = k.smem));
        }
        return list;
      },
      "Every compiled instance of the segmented-K GEMMs.");
  m.def(
      "low_rank_kernels",
      [] {
        py::list list;
        for (const npt::LowRankKernel& k : npt::low_rank_kernels()) {
          list.append(py::dict(py::arg("family") = int(k.family), py::arg("dtype") = int(k.dtype), py::arg("tile") = k.tile,
                               py::arg("variant") = k.variant, py::arg("threads") = k.threads, py::arg("smem") = k.smem));
        }
        return list;
      },
      "Every compiled low-rank instance.");
}
