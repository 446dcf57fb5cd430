// The loops' bodies, for one instruction set: included by loops.cpp once for each, in a namespace of its own, with LANES and the
// target set. Vectors are written as such (GCC's and Clang's vector types): left to the compiler, a clamp became a branch and an
// activation took six times as long in AVX2, twice in AVX-512 (g++ 12). Simd reductions are the only sums whose order it may choose.

// The next four rows while these are added: rows are short, and a hardware prefetcher has to find each anew (a quarter of the time
// in bfloat16, a tenth in float32; in add_rows it costs as much).
NPT_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(static_cast<const char*>(from) + k);
}

// Four rows at a time: four independent sums, and x is loaded once for them.
template <class W>
void dot_rows(float* y, const W* m, int64_t pitch, const float* x, int64_t n, int64_t rows) {
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
void add_rows(float* y, const W* m, int64_t pitch, const float* x, int64_t n, int64_t cols) {
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


template <class T>
using Vector __attribute__((vector_size(LANES * sizeof(T)))) = T;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Bits = Vector<uint32_t>;
using Halves = Vector<uint16_t>;
// As it may lie in memory. By memcpy AVX2 went through the stack, in halves, and waited for itself: six times the time.
template <class T>
using Stored __attribute__((aligned(sizeof(T)), may_alias)) = Vector<T>;

NPT_INLINE Floats load(const float* from) { return *reinterpret_cast<const Stored<float>*>(from); }
NPT_INLINE Floats load(const uint16_t* from) {
  const Halves h = *reinterpret_cast<const Stored<uint16_t>*>(from);
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}
NPT_INLINE void store(float* to, Floats v) { *reinterpret_cast<Stored<float>*>(to) = v; }
NPT_INLINE void store(uint16_t* to, Floats v) {  // as narrow()
  const Bits bits = (Bits)v, high = bits >> 16, rounded = (bits + 0x7fff + (high & 1)) >> 16;
  const Halves h = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? high | 0x40 : rounded, Halves);
  *reinterpret_cast<Stored<uint16_t>*>(to) = h;
}

// e^x by 2^n e^r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7: relative error below 2 eps of float32. NaN stays NaN.
NPT_INLINE Floats exponential(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x;
  x = x > 88.f ? Floats{} + 88.f : x;
  const Floats n = (x * 1.44269504088896341f + 12582912.f) - 12582912.f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// The value and, where it is asked for, the derivative, which has the same exponential in it.
template <Act act, bool derive>
NPT_INLINE Floats value(Floats x, Floats* slope) {
  if (act == Act::SILU || act == Act::QUICK_GELU || act == Act::GELU_TANH) {
    // x s(t), t = k x or, as x (1 + tanh t') / 2 = x s(2t'), without cancellation where tanh nears -1
    constexpr float k = act == Act::SILU ? 1.f : act == Act::QUICK_GELU ? 1.702f : 1.5957691216057308f, cube = .044715f;
    const bool cubic = act == Act::GELU_TANH;
    const Floats square = x * x, t = cubic ? k * (x + cube * x * square) : k * x;
    // Beyond 88 e^-t is not exact and s is 0 or 1: times a large x, what is left of it would be a number.
    const Floats e = exponential(-t), one = Floats{} + 1.f;
    if (derive) {
      const Floats s = t < -88.f ? Floats{} : one / (one + e), inner = cubic ? k * x * (1.f + 3 * cube * square) : k * x;
      *slope = ((t > 88.f) | (t < -88.f)) ? s : s * (1.f + inner * (e * s));  // 1 - s is e s
      return x * s;
    }
    return t < -88.f ? x * 0.f : x / (one + e);
  }
  if (act == Act::GELU) {
    Floats y;
    for (int i = 0; i < LANES; ++i) {
      const float s = .5f * (1.f + std::erf(x[i] * .70710678118654752f));
      y[i] = x[i] * s;
      if (derive) (*slope)[i] = s + x[i] * .39894228040143268f * std::exp(-.5f * x[i] * x[i]);
    }
    return y;
  }
  const Floats positive = x < 0.f ? Floats{} : x;  // NaN stays NaN
  if (act == Act::RELU2) {
    if (derive) *slope = 2 * positive;
    return positive * positive;
  }
  if (derive) *slope = x <= 0.f ? Floats{} : Floats{} + 1.f;
  return positive;
}

template <Act act>
NPT_INLINE Floats times(Floats d, Floats slope) {
  if (act == Act::RELU) return slope == 0.f ? Floats{} : d;  // 0 also of an infinite d, as torch
  return d * slope;
}

// LANES numbers of an activation and of its gradients; pointers that are not read or written are null.
template <Act act, class T>
NPT_INLINE void activate_lanes(T* y, const T* gate, const T* up) {
  const Floats v = value<act, false>(load(gate), nullptr);
  store(y, up == nullptr ? v : v * load(up));
}
template <Act act, class T>
NPT_INLINE void differentiate_lanes(const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  const Floats d = load(dy), du = up == nullptr ? d : d * load(up);
  Floats slope;
  const Floats v = value<act, true>(load(gate), &slope);
  if (dgate != nullptr) store(dgate, times<act>(du, slope));
  if (dup != nullptr) store(dup, d * v);
}

// The last numbers, fewer than LANES: the same instructions on a copy, so that a number's bits do not depend on where it lies.
template <class T>
struct Tail {
  T lanes[LANES] = {};
  int64_t n;
  const T* take(const T* from) {
    if (from == nullptr) return nullptr;
    std::memcpy(lanes, from, n * sizeof(T));
    return lanes;
  }
  void give(T* to) {
    if (to != nullptr) std::memcpy(to, lanes, n * sizeof(T));
  }
};

template <Act act, class T>
NPT_INLINE void activate_as(T* y, const T* gate, const T* up, int64_t n) {
  int64_t i = 0;
  if (up == nullptr)
    for (; i + LANES <= n; i += LANES) activate_lanes<act, T>(y + i, gate + i, nullptr);
  else
    for (; i + LANES <= n; i += LANES) activate_lanes<act>(y + i, gate + i, up + i);
  if (i == n) return;
  Tail<T> g{{}, n - i}, u{{}, n - i}, out{{}, n - i};
  activate_lanes<act>(out.lanes, g.take(gate + i), u.take(up == nullptr ? nullptr : up + i));
  out.give(y + i);
}

template <Act act, class T>
NPT_INLINE void differentiate_as(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  int64_t i = 0;
  T* const none = nullptr;
  if (up == nullptr)
    for (; i + LANES <= n; i += LANES) differentiate_lanes<act, T>(dy + i, gate + i, nullptr, dgate + i, none);
  else if (dup == nullptr)
    for (; i + LANES <= n; i += LANES) differentiate_lanes<act>(dy + i, gate + i, up + i, dgate + i, none);
  else if (dgate == nullptr)
    for (; i + LANES <= n; i += LANES) differentiate_lanes<act>(dy + i, gate + i, up + i, none, dup + i);
  else
    for (; i + LANES <= n; i += LANES) differentiate_lanes<act>(dy + i, gate + i, up + i, dgate + i, dup + i);
  if (i == n) return;
  Tail<T> d{{}, n - i}, g{{}, n - i}, u{{}, n - i}, first{{}, n - i}, second{{}, n - i};
  differentiate_lanes<act>(d.take(dy + i), g.take(gate + i), u.take(up == nullptr ? nullptr : up + i), first.lanes, second.lanes);
  first.give(dgate == nullptr ? nullptr : dgate + i);
  second.give(dup == nullptr ? nullptr : dup + i);
}

#define NPT_BY_ACT(CALL, ...)                                          \
  switch (act) {                                                       \
    case Act::SILU: return CALL<Act::SILU>(__VA_ARGS__);               \
    case Act::GELU: return CALL<Act::GELU>(__VA_ARGS__);               \
    case Act::GELU_TANH: return CALL<Act::GELU_TANH>(__VA_ARGS__);     \
    case Act::RELU: return CALL<Act::RELU>(__VA_ARGS__);               \
    case Act::RELU2: return CALL<Act::RELU2>(__VA_ARGS__);             \
    case Act::QUICK_GELU: return CALL<Act::QUICK_GELU>(__VA_ARGS__);   \
  }
template <class T>
void activate(Act act, T* y, const T* gate, const T* up, int64_t n) {
  NPT_BY_ACT(activate_as, y, gate, up, n)
}
template <class T>
void differentiate(Act act, const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  NPT_BY_ACT(differentiate_as, dy, gate, up, dgate, dup, n)
}
#undef NPT_BY_ACT

const Loops table = {
    dot_rows<float>, dot_rows<uint16_t>, add_rows<float>, add_rows<uint16_t>, activate<float>, activate<uint16_t>,
    differentiate<float>, differentiate<uint16_t>, NAME,
};
