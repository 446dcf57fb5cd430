// The inner loops, once per instruction set. Bodies are inlined into functions with a target attribute; simd reductions are the
// only sums whose order the compiler may choose.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "one_row.h"

#define NPT_INLINE inline __attribute__((always_inline))

namespace npt::cpu {

struct Loops {
  // y [rows] += M x, M [rows, n] by rows
  void (*dot_f32)(float* y, const float* m, int64_t pitch, const float* x, int64_t n, int64_t rows);
  void (*dot_bf16)(float* y, const uint16_t* m, int64_t pitch, const float* x, int64_t n, int64_t rows);
  // y [cols] += x M, M [n, cols] by rows
  void (*add_f32)(float* y, const float* m, int64_t pitch, const float* x, int64_t n, int64_t cols);
  void (*add_bf16)(float* y, const uint16_t* m, int64_t pitch, const float* x, int64_t n, int64_t cols);
  // y = act(gate) * up, or act(gate) without up
  void (*activate)(Act act, float* y, const float* gate, const float* up, int64_t n);
  const char* name;
};

NPT_INLINE float wide(float v) { return v; }
NPT_INLINE float wide(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// The next four rows while these are added: rows are short, and a hardware prefetcher has to find each anew (a quarter of the time
// in bfloat16, a tenth in float32; in add_rows it costs as much).
NPT_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(static_cast<const char*>(from) + k);
}

// Four rows at a time: four independent sums, and x is loaded once for them.
template <class W>
NPT_INLINE void dot_rows(float* y, const W* m, int64_t pitch, const float* x, int64_t n, int64_t rows) {
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) {
    const W *a = m + j * pitch, *b = a + pitch, *c = b + pitch, *d = c + pitch;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    if (pitch == n && j + 8 <= rows) prefetch(d + pitch, 4 * pitch * sizeof(W));
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < n; ++i) {
      const float v = x[i];
      s0 += wide(a[i]) * v;
      s1 += wide(b[i]) * v;
      s2 += wide(c[i]) * v;
      s3 += wide(d[i]) * v;
    }
    y[j] += s0, y[j + 1] += s1, y[j + 2] += s2, y[j + 3] += s3;
  }
  for (; j < rows; ++j) {
    const W* a = m + j * pitch;
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) s += wide(a[i]) * x[i];
    y[j] += s;
  }
}

// Four rows of M for one load and store of y, which stays in the first cache.
constexpr int64_t COLUMNS = 2048;
template <class W>
NPT_INLINE void add_rows(float* y, const W* m, int64_t pitch, const float* x, int64_t n, int64_t cols) {
  for (int64_t from = 0; from < cols; from += COLUMNS) {
    const int64_t count = cols - from < COLUMNS ? cols - from : COLUMNS;
    float* out = y + from;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      const W *a = m + i * pitch + from, *b = a + pitch, *c = b + pitch, *d = c + pitch;
      const float x0 = x[i], x1 = x[i + 1], x2 = x[i + 2], x3 = x[i + 3];
#pragma omp simd
      for (int64_t k = 0; k < count; ++k)
        out[k] += x0 * wide(a[k]) + x1 * wide(b[k]) + x2 * wide(c[k]) + x3 * wide(d[k]);
    }
    for (; i < n; ++i) {
      const W* a = m + i * pitch + from;
      const float v = x[i];
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) out[k] += v * wide(a[k]);
    }
  }
}

// e^x by 2^n e^r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7: relative error below 2 eps of float32. NaN stays NaN.
NPT_INLINE float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float n = (x * 1.44269504088896341f + 12582912.f) - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
NPT_INLINE float sigmoid_times(float x, float inner) { return x / (1.f + exponential(-inner)); }

template <Act act>
NPT_INLINE float value(float x) {
  if (act == Act::SILU) return sigmoid_times(x, x);
  if (act == Act::QUICK_GELU) return sigmoid_times(x, 1.702f * x);
  // x (1 + tanh t) / 2 = x sigmoid(2t): no cancellation where tanh nears -1
  if (act == Act::GELU_TANH) return sigmoid_times(x, 1.5957691216057308f * (x + .044715f * x * x * x));
  if (act == Act::GELU) return .5f * x * (1.f + std::erf(x * .70710678118654752f));
  const float positive = x < 0.f ? 0.f : x;
  return act == Act::RELU2 ? positive * positive : positive;
}
template <Act act>
NPT_INLINE void activate_as(float* y, const float* gate, const float* up, int64_t n) {
  if (up == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = value<act>(gate[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = value<act>(gate[i]) * up[i];
  }
}
NPT_INLINE void activate_all(Act act, float* y, const float* gate, const float* up, int64_t n) {
  switch (act) {
    case Act::SILU: return activate_as<Act::SILU>(y, gate, up, n);
    case Act::GELU: return activate_as<Act::GELU>(y, gate, up, n);
    case Act::GELU_TANH: return activate_as<Act::GELU_TANH>(y, gate, up, n);
    case Act::RELU: return activate_as<Act::RELU>(y, gate, up, n);
    case Act::RELU2: return activate_as<Act::RELU2>(y, gate, up, n);
    case Act::QUICK_GELU: return activate_as<Act::QUICK_GELU>(y, gate, up, n);
  }
}

#define NPT_LOOPS(NAME, TARGET)                                                                                             \
  namespace NAME {                                                                                                          \
  TARGET void dot_f32(float* y, const float* m, int64_t p, const float* x, int64_t n, int64_t r) { dot_rows(y, m, p, x, n, r); }      \
  TARGET void dot_bf16(float* y, const uint16_t* m, int64_t p, const float* x, int64_t n, int64_t r) { dot_rows(y, m, p, x, n, r); } \
  TARGET void add_f32(float* y, const float* m, int64_t p, const float* x, int64_t n, int64_t c) { add_rows(y, m, p, x, n, c); }      \
  TARGET void add_bf16(float* y, const uint16_t* m, int64_t p, const float* x, int64_t n, int64_t c) { add_rows(y, m, p, x, n, c); } \
  TARGET void activate(Act a, float* y, const float* g, const float* u, int64_t n) { activate_all(a, y, g, u, n); }         \
  const Loops loops = {dot_f32, dot_bf16, add_f32, add_bf16, activate, #NAME};                                              \
  }

}  // namespace npt::cpu
