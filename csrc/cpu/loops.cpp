#include "loops.h"

#include <cmath>
#include <cstdlib>

// All that is defined up to POP may use these instructions.
#if defined(__clang__)
#define NPT_PUSH(ISA) NPT_PRAGMA(clang attribute push(__attribute__((target(ISA))), apply_to = function))
#define NPT_POP _Pragma("clang attribute pop")
#define NPT_WIDE
#else
#define NPT_PUSH(ISA) _Pragma("GCC push_options") NPT_PRAGMA(GCC target(ISA))
#define NPT_POP _Pragma("GCC pop_options")
#define NPT_WIDE ",prefer-vector-width=512"
#endif
#define NPT_PRAGMA(...) _Pragma(#__VA_ARGS__)

namespace npt::cpu {
namespace {

namespace generic {
#define NAME "generic"
#define LANES 4
#include "loop_bodies.h"
#undef LANES
#undef NAME
}  // namespace generic

#if defined(__x86_64__)
NPT_PUSH("avx2,fma")
namespace avx2 {
#define NAME "avx2"
#define LANES 8
#include "loop_bodies.h"
#undef LANES
#undef NAME
}  // namespace avx2
NPT_POP

NPT_PUSH("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl" NPT_WIDE)
namespace avx512 {
#define NAME "avx512"
#define LANES 16
#include "loop_bodies.h"
#undef LANES
#undef NAME
}  // namespace avx512
NPT_POP
#endif

const Loops& widest() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const auto is = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (is("default") || !has_avx2) return generic::table;
  if (!is("avx2") && has_avx512) return avx512::table;
  return avx2::table;
#else
  return generic::table;
#endif
}

}  // namespace

const Loops& loops() {
  static const Loops& found = widest();
  return found;
}

}  // namespace npt::cpu
