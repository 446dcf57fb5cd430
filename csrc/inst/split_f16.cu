#include "split.inc"

void npt::add_split_f16(std::vector<Kernel>& list) { add_all_split<Dtype::kF16>(list); }
