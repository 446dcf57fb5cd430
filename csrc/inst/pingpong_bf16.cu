#include "pingpong.inc"

void npt::add_pingpong_bf16(std::vector<Kernel>& list) {
  add_pingpong_layouts<128, 5, Epilogue::kStore, Dtype::kBf16>(list);
  add_pingpong_layouts<128, 5, Epilogue::kAct, Dtype::kBf16>(list);
  add_pingpong_gate_up<1, Dtype::kBf16>(list);
  add_pingpong_gate_up<2, Dtype::kBf16>(list);
}
