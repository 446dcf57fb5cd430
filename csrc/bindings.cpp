// Python module npt_kernels._cuda: addresses, sizes and a stream as integers, so no torch headers. Callers:
// npt_kernels/ops/_cuda/launch.py, which checks tensors first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace py = pybind11;

namespace {

void* pointer(uint64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

using Segment = std::array<int64_t, 8>;           // kind, a, lda, k, b0, ldb0, b1, ldb1
using Matrix = std::pair<uint64_t, int64_t>;      // address, row pitch in elements

npt::LaunchSpec make_spec(int family, int epilogue, int dtype, bool mn_major, int cluster, int block_m, int64_t rows,
                          int64_t cols, const std::vector<Segment>& segments, const std::vector<Matrix>& in,
                          const std::vector<Matrix>& out, uint64_t bias, float act_a, float act_b,
                          bool store_pre, int group_m, int device, uint64_t stream) {
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
      py::arg("act_a"), py::arg("act_b"), py::arg("store_pre"), py::arg("group_m"), py::arg("device"), \
      py::arg("stream")
  m.def(
      "launch",
      [](int family, int epilogue, int dtype, bool mn_major, int cluster, int block_m, int64_t rows, int64_t cols,
         const std::vector<Segment>& segments, const std::vector<Matrix>& in, const std::vector<Matrix>& out, uint64_t bias,
         float act_a, float act_b, bool store_pre, int group_m, int device, uint64_t stream) {
        npt::launch(make_spec(family, epilogue, dtype, mn_major, cluster, block_m, rows, cols, segments, in, out, bias,
                              act_a, act_b, store_pre, group_m, device, stream));
      },
      NPT_SPEC_ARGUMENTS, "Check, encode tensor maps and launch on `stream` (asynchronous).");
  m.def(
      "check",
      [](int family, int epilogue, int dtype, bool mn_major, int cluster, int block_m, int64_t rows, int64_t cols,
         const std::vector<Segment>& segments, const std::vector<Matrix>& in, const std::vector<Matrix>& out, uint64_t bias,
         float act_a, float act_b, bool store_pre, int group_m, int device, uint64_t stream) {
        const npt::LaunchSpec spec = make_spec(family, epilogue, dtype, mn_major, cluster, block_m, rows, cols, segments, in,
                                               out, bias, act_a, act_b, store_pre, group_m, device, stream);
        npt::check_launch(spec, npt::find_kernel(spec.family, spec.epilogue, spec.dtype, spec.mn_major, spec.cluster,
                                                 spec.block_m));
      },
      NPT_SPEC_ARGUMENTS, "The checks of `launch` that need no device.");
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
      "Every compiled instance.");
}
