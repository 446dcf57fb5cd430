#include "low_rank.inc"

void npt::add_low_rank_bf16(std::vector<LowRankKernel>& list) { add_all_low_rank<Dtype::kBf16>(list); }
