// The MLP's activation and its gradients, each in one pass over memory: torch takes two, and four with twice the exponentials.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace npt::cpu {

// inter = act(gate) * up, or act(gate) where up is null; n elements each. inter may be gate or up.
void activate(Dtype dtype, Act act, const void* gate, const void* up, void* inter, int64_t n, int threads);
// dgate = dinter * up * act'(gate) and dup = dinter * act(gate), those that are not null; where up is null dgate = dinter * act'(gate).
// Either may be written over dinter. Computed in float32 and rounded once; same bits for any number of threads.
void activate_backward(Dtype dtype, Act act, const void* dinter, const void* gate, const void* up, void* dgate, void* dup, int64_t n,
                       int threads);

}  // namespace npt::cpu
