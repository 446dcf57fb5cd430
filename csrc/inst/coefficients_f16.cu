#include "coefficients.inc"

void npt::add_coefficients_f16(std::vector<LowRankKernel>& list) {
  add_all_coefficients<64, Dtype::kF16>(list);
  add_all_coefficients<128, Dtype::kF16>(list);
}
