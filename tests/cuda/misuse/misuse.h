// What the kernels of misuse.cu are told, and the rules that they break.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <string_view>

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
    // races
    {"no barrier", 64, 1},
    {"lanes of a warp", 32, 1},
    {"relaxed arrival", 64, 1},
    {"relaxed wait", 64, 1},
    {"no wait for a load", 64, 1},
    {"proxy fence after the barrier", 64, 1},
    {"written before wgmma is waited for", 160, 1},
    {"written before a store is waited for", 64, 1},
    {"barrier used before a meeting", 64, 1},
    {"init fence after the meeting", 32, 2},
    {"cluster met without release", 32, 2},
    {"fence of one block", 32, 2},
    {"remote arrival of scope cta", 32, 2},
    {"remote wait of scope cta", 32, 2},
    {"peer reads, no release", 32, 2},
    // what looks like these and is in order
    {"ordered: barrier of a warp", 32, 1},
    {"ordered: relaxed with fences", 64, 1},
    {"ordered: init fence and relaxed meeting", 32, 2},
    {"ordered: fence of the cluster", 32, 2},
    {"ordered: remote arrival of scope cluster", 32, 2},
};

constexpr int kFirstRace = 23;
static_assert(std::string_view(kRules[kFirstRace].name) == "no barrier");

const void* misuse_kernel();
const void* slow_reader_kernel();
const void* writer_kernel();
