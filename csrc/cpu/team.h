// The threads that torch's own operators run on: a second pool would fight them for the cores.
#pragma once

#include <cstdint>

namespace npt::cpu {

struct Span {
  int64_t from, count;
};
// Part `index` of `parts` of n, in whole groups: where the loops' tails fall does not depend on the number of threads.
inline Span part_of(int64_t n, int64_t group, int index, int parts) {
  const int64_t groups = (n + group - 1) / group;
  const int64_t from = groups * index / parts * group, to = groups * (index + 1) / parts * group;
  return {from < n ? from : n, (to < n ? to : n) - (from < n ? from : n)};
}

using Part = void (*)(void* data, int index, int parts);

// part(data, i, n) for all i < n at once, n at most `threads`; here and alone if there is no OpenMP runtime or threads is 1.
void in_parallel(Part part, void* data, int threads);
// All parts have come here; nothing for a single one.
void wait(int parts);
// The OpenMP runtime whose threads are used: torch's own, found among the loaded libraries; empty: one thread.
const char* team_name();

}  // namespace npt::cpu
