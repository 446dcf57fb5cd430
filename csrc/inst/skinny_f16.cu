#include "skinny.inc"

void npt::add_skinny_f16(std::vector<SkinnyKernel>& list) { add_all_skinny<Dtype::kF16>(list); }
