#include "decode.inc"

void npt::add_decode_f16(std::vector<Kernel>& list) { add_all_decode<Dtype::kF16>(list); }
