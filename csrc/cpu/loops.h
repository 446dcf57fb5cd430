// The inner loops, compiled once per instruction set (loops.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "kinds.h"

#define NPT_INLINE inline __attribute__((always_inline))

namespace npt::cpu {

struct Loops {
  // y [rows] += M x, M [rows, n] by rows
  void (*dot_f32)(float* y, const float* m, int64_t pitch, const float* x, int64_t n, int64_t rows);
  void (*dot_bf16)(float* y, const uint16_t* m, int64_t pitch, const float* x, int64_t n, int64_t rows);
  // y [cols] += x M, M [n, cols] by rows
  void (*add_f32)(float* y, const float* m, int64_t pitch, const float* x, int64_t n, int64_t cols);
  void (*add_bf16)(float* y, const uint16_t* m, int64_t pitch, const float* x, int64_t n, int64_t cols);
  // y = act(gate) * up, or act(gate) without up; y may be gate or up
  void (*activate_f32)(Act act, float* y, const float* gate, const float* up, int64_t n);
  void (*activate_bf16)(Act act, uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t n);
  // dgate = dy * act'(gate) * up and dup = dy * act(gate), those that are not null; without up dgate = dy * act'(gate). Each
  // may be written over dy.
  void (*differentiate_f32)(Act act, const float* dy, const float* gate, const float* up, float* dgate, float* dup, int64_t n);
  void (*differentiate_bf16)(Act act, const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate, uint16_t* dup,
                             int64_t n);
  const char* name;
};

// The widest set that this CPU has and torch's own switch allows (ATEN_CPU_CAPABILITY=default, avx2, avx512).
const Loops& loops();

NPT_INLINE float wide(float v) { return v; }
NPT_INLINE float wide(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// To the nearest bfloat16, halves to even; NaN stays NaN.
NPT_INLINE uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

}  // namespace npt::cpu
