// The threads that torch's own operators run on: a second pool would fight them for the cores.
#pragma once

namespace npt::cpu {

using Part = void (*)(void* data, int index, int parts);

// part(data, i, n) for all i < n at once, n at most `threads`; here and alone if there is no OpenMP runtime or threads is 1.
void in_parallel(Part part, void* data, int threads);
// All parts have come here; nothing for a single one.
void wait(int parts);
const char* team_name();

}  // namespace npt::cpu
