#include "coefficients.inc"

void npt::add_coefficients_bf16(std::vector<LowRankKernel>& list) {
  add_all_coefficients<64, Dtype::kBf16>(list);
  add_all_coefficients<128, Dtype::kBf16>(list);
}
