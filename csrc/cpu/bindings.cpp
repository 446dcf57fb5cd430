// npt_kernels._cpu: raw addresses in, checked by npt_kernels/kernels/native_row.py and native_activation.py, which alone call this.
#include <pybind11/pybind11.h>

#include "activation.h"
#include "loops.h"
#include "one_row.h"
#include "team.h"

namespace py = pybind11;
using npt::cpu::Layer;
using npt::cpu::Linear;

namespace {

using Address = std::uintptr_t;
const void* at(Address address) { return reinterpret_cast<const void*>(address); }

Linear linear(const py::tuple& t) {
  return {at(t[0].cast<Address>()), at(t[1].cast<Address>()), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),     t[4].cast<int64_t>(),     t[5].cast<int64_t>()};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.attr("INSTRUCTIONS") = npt::cpu::loops().name;
  m.attr("RUNTIME") = npt::cpu::team_name();
  // Linears are (weight, bias, out, in, elements from row to row, from column to column); addresses of 0: absent.
  py::class_<Layer>(m, "Layer")
      .def(py::init([](int dtype, int component, int act, int norm, bool one_plus, bool matches_change, double eps, int64_t d, int64_t rank,
                       Address norm_weight, Address norm_bias, const py::tuple& bottleneck, const py::tuple& gate,
                       const py::tuple& up, const py::tuple& down, Address gate_value, Address up_value, Address down_value) {
        Layer l;
        l.dtype = static_cast<npt::cpu::Dtype>(dtype);
        l.component = static_cast<npt::cpu::Dtype>(component);
        l.act = static_cast<npt::cpu::Act>(act);
        l.norm = static_cast<npt::cpu::Norm>(norm);
        l.one_plus = one_plus;
        l.matches_change = matches_change;
        l.eps = static_cast<float>(eps);
        l.d = d;
        l.rank = rank;
        l.norm_weight = at(norm_weight);
        l.norm_bias = at(norm_bias);
        l.bottleneck = linear(bottleneck);
        l.gate = linear(gate);
        l.up = linear(up);
        l.down = linear(down);
        l.gate_value = at(gate_value);
        l.up_value = at(up_value);
        l.down_value = at(down_value);
        return l;
      }))
      .def("run", [](const Layer& layer, Address h, Address heard, Address u, Address scale, Address out,
                     int threads) {
        py::gil_scoped_release released;
        npt::cpu::run(layer, at(h), at(heard), at(u), at(scale), reinterpret_cast<void*>(out), threads);
      });
  m.def("activate", [](int dtype, int act, Address gate, Address up, Address inter, int64_t n, int threads) {
    py::gil_scoped_release released;
    npt::cpu::activate(static_cast<npt::cpu::Dtype>(dtype), static_cast<npt::cpu::Act>(act), at(gate), at(up),
                       reinterpret_cast<void*>(inter), n, threads);
  });
  m.def("activate_backward", [](int dtype, int act, Address dinter, Address gate, Address up, Address dgate, Address dup, int64_t n,
                                int threads) {
    py::gil_scoped_release released;
    npt::cpu::activate_backward(static_cast<npt::cpu::Dtype>(dtype), static_cast<npt::cpu::Act>(act), at(dinter), at(gate), at(up),
                                reinterpret_cast<void*>(dgate), reinterpret_cast<void*>(dup), n, threads);
  });
}
