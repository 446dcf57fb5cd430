#include "decode.inc"

void npt::add_decode_bf16(std::vector<Kernel>& list) { add_all_decode<Dtype::kBf16>(list); }
