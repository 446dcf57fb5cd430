#include "low_rank.inc"

void npt::add_low_rank_f16(std::vector<LowRankKernel>& list) { add_all_low_rank<Dtype::kF16>(list); }
