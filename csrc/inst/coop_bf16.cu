#include "coop.inc"

void npt::add_coop_bf16(std::vector<Kernel>& list) { add_all_coop<Dtype::kBf16>(list); }
