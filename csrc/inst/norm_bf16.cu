#include "norm.inc"

void npt::add_norm_bf16(std::vector<LowRankKernel>& list) { add_all_norms<Dtype::kBf16>(list); }
