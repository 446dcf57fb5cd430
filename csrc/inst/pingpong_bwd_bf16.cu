#include "pingpong.inc"

void npt::add_pingpong_bwd_bf16(std::vector<Kernel>& list) {
  add_pingpong_layouts<192, 4, Epilogue::kActBwd, Dtype::kBf16>(list);
  add_pingpong_layouts<192, 4, Epilogue::kGateUpBwd, Dtype::kBf16>(list);
}
