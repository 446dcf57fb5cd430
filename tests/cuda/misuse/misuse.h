// What the kernels of misuse.cu are told, and the rules that they break.
#pragma once
#include <cuda.h>

#include <cstdint>

struct Params {
  CUtensorMap map;  // [64, 64] elements of 2 bytes
  uint16_t* data;
  uint16_t* out;
  int rule;
};

// Rules, and how many threads and blocks break them.
struct Rule {
  const char* name;
  unsigned threads, cluster;
};
constexpr Rule kRules[] = {
    {"none", 32, 1},
    {"one arrival too many", 32, 1},
    {"barrier never initialised", 32, 1},
    {"nobody arrives", 32, 1},
    {"beyond shared memory", 32, 1},
    {"store without proxy fence", 32, 1},
    {"load on an unfenced barrier", 32, 1},
    {"coordinate beyond 31 bits", 32, 1},
    {"leaves with a load in flight", 32, 1},
    {"reads what a load will write", 32, 1},
    {"writes what a store has to read", 32, 1},
    {"leaves with an open group", 32, 1},
    {"wgmma without fence", 128, 1},
    {"another shape in flight", 128, 1},
    {"warps disagree", 128, 1},
    {"wgmma without proxy fence", 128, 1},
    {"leaves with wgmma in flight", 128, 1},
    {"counts disagree", 128, 1},
    {"lanes apart", 32, 1},
    {"too many registers", 288, 1},
    {"reads a block that has left", 32, 2},
    {"arrives at a block that has left", 32, 2},
    {"accumulators read early", 128, 1},
};

const void* misuse_kernel();
const void* slow_reader_kernel();
const void* writer_kernel();
