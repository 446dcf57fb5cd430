#include "norm.inc"

void npt::add_norm_f16(std::vector<LowRankKernel>& list) { add_all_norms<Dtype::kF16>(list); }
