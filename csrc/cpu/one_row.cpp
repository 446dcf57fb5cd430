#include "one_row.h"

#include <cmath>
#include <vector>

#include "loops.h"
#include "team.h"

namespace npt::cpu {
namespace {

// Multiply-adds below which another thread costs more than it does.
constexpr int64_t WORK_PER_THREAD = 1 << 17;

constexpr int64_t ROWS = 4, LINES = 16;

void widen(float* y, const void* from, Dtype dtype, int64_t offset, int64_t n) {
  if (dtype == Dtype::F32) {
    std::memcpy(y, static_cast<const float*>(from) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* v = static_cast<const uint16_t*>(from) + offset;
  for (int64_t i = 0; i < n; ++i) y[i] = wide(v[i]);
}

// y [span] of W x + b, for the outputs of the span.
void product(const Linear& w, Dtype dtype, const float* x, float* y, Span span) {
  if (w.bias != nullptr)
    widen(y, w.bias, dtype, span.from, span.count);
  else
    std::memset(y, 0, span.count * sizeof(float));
  const Loops& l = loops();
  if (dtype == Dtype::F32) {
    const float* m = static_cast<const float*>(w.weight) + span.from * w.row;
    w.col == 1 ? l.dot_f32(y, m, w.row, x, w.in, span.count) : l.add_f32(y, m, w.col, x, w.in, span.count);
  } else {
    const uint16_t* m = static_cast<const uint16_t*>(w.weight) + span.from * w.row;
    w.col == 1 ? l.dot_bf16(y, m, w.row, x, w.in, span.count) : l.add_bf16(y, m, w.col, x, w.in, span.count);
  }
}

// y [span] += z @ value [rank, pitch], for the columns of the span.
void change(const Layer& layer, const void* value, int64_t pitch, const float* z, float* y, Span span) {
  if (value == nullptr) return;
  if (layer.component == Dtype::F32)
    loops().add_f32(y, static_cast<const float*>(value) + span.from, pitch, z, layer.rank, span.count);
  else
    loops().add_bf16(y, static_cast<const uint16_t*>(value) + span.from, pitch, z, layer.rank, span.count);
}

// In double: one pass over a row, and a LayerNorm's variance is a difference.
void norm_row(const Layer& layer, const float* h, const float* heard, float* u, float* scale) {
  const int64_t d = layer.d;
  double sum = 0, squares = 0, own = 0;
  for (int64_t i = 0; i < d; ++i) {
    const double total = static_cast<double>(h[i]) + heard[i];
    sum += total, squares += total * total, own += h[i];
  }
  const bool centred = layer.norm == Norm::LAYER;
  const double mean = centred ? sum / d : 0;
  if (centred) {
    squares = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double total = static_cast<double>(h[i]) + heard[i] - mean;
      squares += total * total;
    }
  }
  const float s = static_cast<float>(1 / std::sqrt(squares / d + layer.eps));
  const float shift = centred ? static_cast<float>(own / d) : 0.f;
  *scale = s;
  for (int64_t i = 0; i < d; ++i) u[i] = (h[i] - shift) * s;
  auto at = [&](const void* v, int64_t i) {
    return layer.dtype == Dtype::F32 ? static_cast<const float*>(v)[i] : wide(static_cast<const uint16_t*>(v)[i]);
  };
  const float more = layer.one_plus ? 1.f : 0.f;
  if (layer.norm_weight != nullptr)
    for (int64_t i = 0; i < d; ++i) u[i] *= more + at(layer.norm_weight, i);
  if (layer.norm_bias != nullptr)
    for (int64_t i = 0; i < d; ++i) u[i] += at(layer.norm_bias, i);
}

struct Work {
  const Layer& layer;
  const void *h, *heard, *u, *scale;
  void* out;
  float *z, *moved, *inter;  // of all threads
};

void share(const Work& w, int index, int parts) {
  const Layer& l = w.layer;
  const int64_t d = l.d, f = l.up.out, d_out = l.down.out, wide_in = l.bottleneck.in;
  thread_local std::vector<float> own;
  own.resize(static_cast<size_t>(2 * d + wide_in + l.rank + 2 * f + d_out));
  float *h = own.data(), *u = h + d, *heard = u + d, *scaled = heard + wide_in, *gate = scaled + l.rank, *up = gate + f,
        *out = up + f;

  widen(heard, w.heard, l.dtype, 0, wide_in);
  Span span = part_of(l.rank, ROWS, index, parts);
  if (l.bottleneck.weight != nullptr)
    product(l.bottleneck, l.component, heard, w.z + span.from, span);
  else
    std::memcpy(w.z + span.from, heard + span.from, span.count * sizeof(float));
  wait(parts);
  const Span outputs = part_of(d_out, LINES, index, parts);
  if (l.matches_change) {
    std::memset(w.moved + outputs.from, 0, outputs.count * sizeof(float));
    change(l, l.down_value, d_out, w.z, w.moved + outputs.from, outputs);
    wait(parts);
  }
  float scale = 1;
  if (l.norm == Norm::GIVEN) {
    widen(u, w.u, l.dtype, 0, d);
    if (w.scale != nullptr) widen(&scale, w.scale, l.dtype, 0, 1);
  } else {
    widen(h, w.h, l.dtype, 0, d);
    norm_row(l, h, l.matches_change ? w.moved : heard, u, &scale);
  }
  for (int64_t r = 0; r < l.rank; ++r) scaled[r] = w.z[r] * scale;

  span = part_of(f, LINES, index, parts);
  product(l.up, l.dtype, u, up, span);
  change(l, l.up_value, f, scaled, up, span);
  if (l.gate.weight != nullptr) {
    product(l.gate, l.dtype, u, gate, span);
    change(l, l.gate_value, f, scaled, gate, span);
    loops().activate_f32(l.act, w.inter + span.from, gate, up, span.count);
  } else {
    loops().activate_f32(l.act, w.inter + span.from, up, nullptr, span.count);
  }
  wait(parts);
  product(l.down, l.dtype, w.inter, out, outputs);
  if (l.matches_change)
    for (int64_t j = 0; j < outputs.count; ++j) out[j] += w.moved[outputs.from + j];
  else
    change(l, l.down_value, d_out, w.z, out, outputs);
  if (l.dtype == Dtype::F32) {
    std::memcpy(static_cast<float*>(w.out) + outputs.from, out, outputs.count * sizeof(float));
  } else {
    uint16_t* y = static_cast<uint16_t*>(w.out) + outputs.from;
    for (int64_t j = 0; j < outputs.count; ++j) y[j] = narrow(out[j]);
  }
}

}  // namespace

void run(const Layer& layer, const void* h, const void* heard, const void* u, const void* scale, void* out, int threads) {
  thread_local std::vector<float> shared;
  const int64_t f = layer.up.out, d_out = layer.down.out;
  shared.resize(static_cast<size_t>(layer.rank + d_out + f));
  Work work{layer, h, heard, u, scale, out, shared.data(), shared.data() + layer.rank, shared.data() + layer.rank + d_out};
  const int64_t multiply_adds = layer.d * f * 3 + layer.rank * (layer.bottleneck.in + 2 * f + d_out);
  const int64_t useful = 1 + multiply_adds / WORK_PER_THREAD;
  in_parallel([](void* data, int index, int parts) { share(*static_cast<Work*>(data), index, parts); }, &work,
              threads < useful ? threads : static_cast<int>(useful));
}

}  // namespace npt::cpu
