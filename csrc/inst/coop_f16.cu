#include "coop.inc"

void npt::add_coop_f16(std::vector<Kernel>& list) { add_all_coop<Dtype::kF16>(list); }
