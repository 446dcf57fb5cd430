// One token through the second half of a converted layer, on a CPU: what npt_kernels/model/one_row.py does in some twenty calls
// of torch, in one. Bound by reading the weights; each is read once, by as many threads as torch uses.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace npt::cpu {

// y [out] = W x [in] + b. Element (j, i) of W is at j * row + i * col elements; one of the two is 1.
struct Linear {
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t out = 0, in = 0, row = 0, col = 0;
};

// Frozen weights, norm and vectors in `dtype`; the bottleneck and values in `component`. Nothing is owned.
struct Layer {
  Dtype dtype = Dtype::F32;
  Dtype component = Dtype::F32;
  Act act = Act::SILU;
  Norm norm = Norm::GIVEN;
  bool one_plus = false;       // the norm multiplies with 1 + weight
  bool matches_change = false; // the statistics are of h + m, m the change of the last linear's output; else of h + heard
  float eps = 0;
  int64_t d = 0, rank = 0;
  const void* norm_weight = nullptr;
  const void* norm_bias = nullptr;
  Linear bottleneck;           // z [rank] from what is heard; without weight z is what is heard
  Linear gate, up, down;       // gate.weight null: a plain MLP
  const void* gate_value = nullptr;  // [rank, f], or null
  const void* up_value = nullptr;    // [rank, f], or null
  const void* down_value = nullptr;  // [rank, d_out], or null
};

// out [d_out] from h [d] and heard [bottleneck.in], all in `dtype`; with Norm::GIVEN from u [d] and the key scale [1] (null: 1) in
// place of h. Same bits for any number of threads.
void run(const Layer& layer, const void* h, const void* heard, const void* u, const void* scale, void* out, int threads);

}  // namespace npt::cpu
