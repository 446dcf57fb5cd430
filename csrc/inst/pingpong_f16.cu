#include "pingpong.inc"

void npt::add_pingpong_f16(std::vector<Kernel>& list) {
  add_pingpong_layouts<128, 5, Epilogue::kStore, Dtype::kF16>(list);
  add_pingpong_layouts<128, 5, Epilogue::kAct, Dtype::kF16>(list);
  add_pingpong_gate_up<1, Dtype::kF16>(list);
  add_pingpong_gate_up<2, Dtype::kF16>(list);
}
