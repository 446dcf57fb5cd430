#include "activation.h"

#include "loops.h"
#include "team.h"

namespace npt::cpu {
namespace {

// Elements below which another thread costs more than it does, and where a thread's part may begin.
constexpr int64_t PER_THREAD = 1 << 14, GROUP = 64;

struct Work {
  Dtype dtype;
  Act act;
  const void *dinter, *gate, *up;
  void *first, *second;  // inter; or dgate, dup
  int64_t n;
};

template <class T>
const T* from(const void* p, int64_t i) { return p == nullptr ? nullptr : static_cast<const T*>(p) + i; }
template <class T>
T* to(void* p, int64_t i) { return p == nullptr ? nullptr : static_cast<T*>(p) + i; }

template <class T, class Forward, class Backward>
void share(const Work& w, Forward forward, Backward backward, Span s) {
  const T *gate = from<T>(w.gate, s.from), *up = from<T>(w.up, s.from);
  if (w.dinter == nullptr)
    forward(w.act, to<T>(w.first, s.from), gate, up, s.count);
  else
    backward(w.act, from<T>(w.dinter, s.from), gate, up, to<T>(w.first, s.from), to<T>(w.second, s.from), s.count);
}

void run(Work work, int threads) {
  const int64_t useful = 1 + work.n / PER_THREAD;
  in_parallel(
      [](void* data, int index, int parts) {
        const Work& w = *static_cast<Work*>(data);
        const Span span = part_of(w.n, GROUP, index, parts);
        if (w.dtype == Dtype::F32)
          share<float>(w, loops().activate_f32, loops().differentiate_f32, span);
        else
          share<uint16_t>(w, loops().activate_bf16, loops().differentiate_bf16, span);
      },
      &work, threads < useful ? threads : static_cast<int>(useful));
}

}  // namespace

void activate(Dtype dtype, Act act, const void* gate, const void* up, void* inter, int64_t n, int threads) {
  run({dtype, act, nullptr, gate, up, inter, nullptr, n}, threads);
}

void activate_backward(Dtype dtype, Act act, const void* dinter, const void* gate, const void* up, void* dgate, void* dup, int64_t n,
                       int threads) {
  run({dtype, act, dinter, gate, up, dgate, dup, n}, threads);
}

}  // namespace npt::cpu
