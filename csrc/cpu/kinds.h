// What Python names by number (npt_kernels/kernels/native_row.py, native_activation.py).
#pragma once

namespace npt::cpu {

enum class Dtype : int { F32 = 0, BF16 = 1 };
enum class Act : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, QUICK_GELU = 5 };
// What the MLP's input is: given by the caller, or an RMSNorm or LayerNorm of h by the statistics of h + what is heard.
enum class Norm : int { GIVEN = 0, RMS = 1, LAYER = 2 };

}  // namespace npt::cpu
