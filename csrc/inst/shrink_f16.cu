#include "shrink.inc"

void npt::add_shrink_f16(std::vector<SkinnyKernel>& list) {
  add_all_shrink<64, Dtype::kF16>(list);
  add_all_shrink<128, Dtype::kF16>(list);
}
