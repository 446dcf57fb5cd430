#include "pingpong.inc"

void npt::add_pingpong_bwd_f16(std::vector<Kernel>& list) {
  add_pingpong_layouts<192, 4, Epilogue::kActBwd, Dtype::kF16>(list);
  add_pingpong_layouts<192, 4, Epilogue::kGateUpBwd, Dtype::kF16>(list);
}
