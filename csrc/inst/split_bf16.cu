#include "split.inc"

void npt::add_split_bf16(std::vector<Kernel>& list) { add_all_split<Dtype::kBf16>(list); }
