#include "skinny.inc"

void npt::add_skinny_bf16(std::vector<SkinnyKernel>& list) { add_all_skinny<Dtype::kBf16>(list); }
