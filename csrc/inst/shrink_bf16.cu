#include "shrink.inc"

void npt::add_shrink_bf16(std::vector<SkinnyKernel>& list) {
  add_all_shrink<64, Dtype::kBf16>(list);
  add_all_shrink<128, Dtype::kBf16>(list);
}
