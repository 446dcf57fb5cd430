// wgmma.mma_async: both operands in shared memory, fp32 accumulators that the tensor core owns until a wait.
//
// Each warp's quarter runs by itself, when the schedule says, in the order of issue. From issue to the wait that covers it the
// accumulators hold a NaN. B operands are decoded to floats once and kept while the shared memory that they come from is unchanged.
#include <immintrin.h>

#include <algorithm>
#include <bitset>
#include <cstring>

#include "machine.h"

namespace emu {

struct DecodedB {
  Wgmma of{};
  uint64_t version = ~0ull;
  float value[16][256];
};
Block::Block() = default;
Block::~Block() = default;

namespace {

// ------------------------------------------------------------------------------------------------ operands in shared memory
struct Descriptor {  // PTX ISA, "Matrix Descriptor Format"; bytes
  uint32_t start, leading, stride;
  int swizzle_bits;  // 3, 2, 1: rows of 128, 64, 32 bytes; 0: none
};

Descriptor decode(uint64_t d) {
  constexpr uint64_t kField = 0x3FFF, kKnown = kField | kField << 16 | kField << 32 | 7ull << 49 | 3ull << 62;
  if (d & ~kKnown) report("wgmma: descriptor 0x%llx has bits without a meaning", static_cast<unsigned long long>(d));
  if (d >> 49 & 7) report("wgmma: descriptor 0x%llx has a base offset, which is not emulated", static_cast<unsigned long long>(d));
  const int mode = int(d >> 62);
  return {uint32_t(d & kField) << 4, uint32_t(d >> 16 & kField) << 4, uint32_t(d >> 32 & kField) << 4, mode == 0 ? 0 : 4 - mode};
}

// Address of element (mn, k) of 16-bit operands. PTX ISA, "Canonical Layouts", with T = 8 elements to 16 bytes.
uint32_t address_of(const Descriptor& d, bool mn_major, int mn, int k) {
  const int units = 1 << d.swizzle_bits;  // of 16 bytes in a swizzled row
  const auto at = [](int n) { return uint32_t(n); };
  uint32_t offset;
  if (mn_major && d.swizzle_bits == 0) {
    offset = at(mn % 8) * 2 + at(mn / 8) * d.stride + at(k % 8) * 16 + at(k / 8) * d.leading;
  } else if (mn_major) {
    offset = at(mn % (8 * units)) * 2 + at(mn / (8 * units)) * d.leading + at(k % 8) * at(16 * units) + at(k / 8) * d.stride;
  } else if (d.swizzle_bits == 0) {
    offset = at(mn % 8) * 16 + at(mn / 8) * d.stride + at(k % 8) * 2 + at(k / 8) * d.leading;
  } else {
    offset = at(mn % 8) * at(16 * units) + at(mn / 8) * d.stride + at(k) * 2;
  }
  return swizzle(d.swizzle_bits, d.start + offset);
}

// Eight elements that are neighbours along the major dimension.
void read_eight(Block* block, uint32_t at, bool bf16, float* out) {
  if (at % 16 || at < block->shared_begin || at + 16 > block->shared_end) {
    return report("wgmma reads shared memory at 0x%x, outside the block's [0x%x, 0x%x)", at, block->shared_begin, block->shared_end);
  }
  if (block->loading[at / 16]) report("wgmma reads 0x%x, which a TMA load in flight will write", at);
  if (block->unfenced[at / 16]) report("wgmma reads 0x%x: ordinary writes there are not followed by fence.proxy.async", at);
  if (block->is_barrier[at / 16]) report("wgmma reads an mbarrier at 0x%x", at);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&block->shared[at]));
  const __m256 value = bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)) : _mm256_cvtph_ps(raw);
  _mm256_storeu_ps(out, value);
}

void note_reads(const Descriptor& d, bool mn_major, int from, int count, std::bitset<kSharedWindow / 1024>& kib) {
  for (int mn = from; mn < from + count; mn += 8) {
    for (int k = 0; k < 16; k += 8) kib.set(address_of(d, mn_major, mn, k) / 1024 % (kSharedWindow / 1024));
  }
}

void read_a(Block* block, const Wgmma& op, int quarter, float (*a)[16]) {
  const Descriptor d = decode(op.a);
  float eight[8];
  for (int r = 0; r < 16; r += op.trans_a ? 8 : 1) {
    for (int k = 0; k < 16; k += op.trans_a ? 1 : 8) {
      read_eight(block, address_of(d, op.trans_a != 0, 16 * quarter + r, k), op.bf16, eight);
      for (int i = 0; i < 8; ++i) (op.trans_a ? a[r + i][k] : a[r][k + i]) = eight[i];
    }
  }
}

const float (*read_b(Block* block, const Wgmma& op))[256] {
  uint64_t version = 0;
  for (uint16_t kib : op.reads) version += block->version[kib];
  if (block->decoded.empty()) block->decoded.resize(8);
  DecodedB& slot = block->decoded[(op.b ^ op.b >> 7 ^ op.b >> 11) & 7];
  const bool known = slot.of.b == op.b && slot.of.n == op.n && slot.of.trans_b == op.trans_b && slot.of.bf16 == op.bf16;
  if (known && slot.version == version) return slot.value;
  slot.of = op;
  slot.version = version;
  const Descriptor d = decode(op.b);
  float eight[8];
  for (int n = 0; n < op.n; n += op.trans_b ? 8 : 1) {
    for (int k = 0; k < 16; k += op.trans_b ? 1 : 8) {
      read_eight(block, address_of(d, op.trans_b != 0, n, k), op.bf16, eight);
      for (int i = 0; i < 8; ++i) (op.trans_b ? slot.value[k][n + i] : slot.value[k + i][n]) = eight[i];
    }
  }
  return slot.value;
}

// ------------------------------------------------------------------------------------------------ order
bool issued_by_all_lanes(const Warp* warp, uint64_t number) {
  if (number < warp->executed) return true;
  const uint64_t i = number - warp->first;
  return i < warp->operations.size() && warp->operations[i].lanes == 32;
}

bool front_is_ready(const Warp* warp) {
  if (!issued_by_all_lanes(warp, warp->executed)) return false;
  if (!schedule.wgmma_needs_group) return true;
  for (int i = 0; i < 4; ++i) {
    if (!issued_by_all_lanes(warp->block->warps[size_t(warp->index / 4 * 4 + i)].get(), warp->executed)) return false;
  }
  return true;
}

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", D: a warp's quarter has rows lane/4 and, for the third and fourth
// of every four registers, lane/4 + 8; columns 8·(i/4) + 2·(lane%4) + i%2.
float& element(Accumulators* d, int lane, int i) {
  return d->value[lane / 4 + (i % 4 >= 2 ? 8 : 0)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
}

// The accumulators `d` if wgmma owns them already. What PTX does not order is an error: only wgmmas of one shape may follow each
// other on the same registers without a wait ("wgmma.fence": "... accumulator register accesses across multiple wgmma.mma_async
// instructions of the same shape").
InFlight* find_in_flight(Thread* thread, float* d, int n) {
  for (InFlight& f : thread->in_flight) {
    if (d == f.registers && n == f.n) return &f;
    if (d < f.registers + f.n / 2 && f.registers < d + n / 2) {
      report("wgmma m64n%d on accumulators of an m64n%d in flight: PTX orders only wgmmas of the same shape on the same registers; "
             "wait for the first (wgmma.wait_group)",
             n, f.n);
      stop();
    }
  }
  return nullptr;
}

// The first lane of a warp that comes to wgmma `number` makes it; the four warps of a warpgroup must give the same operands.
void make_operation(Warp* warp, uint64_t number, Wgmma op) {
  std::bitset<kSharedWindow / 1024> kib;
  note_reads(decode(op.a), op.trans_a != 0, 16 * (warp->index % 4), 16, kib);
  note_reads(decode(op.b), op.trans_b != 0, 0, op.n, kib);
  if (!error.empty()) stop();
  for (size_t i = 0; i < kib.size(); ++i) {
    if (kib[i]) op.reads.push_back(uint16_t(i)), ++warp->block->wgmma_reading[i];
  }
  hb::wgmma_issued(current, op.reads, number);
  std::vector<Wgmma>& log = warp->block->warpgroup_log[size_t(warp->index / 4)];
  if (number >= log.size()) {
    log.push_back(op);
    log.back().reads.clear();
  } else if (!log[size_t(number)].same(op)) {
    EMU_FAIL("wgmma %llu: the warps of a warpgroup give different operands", static_cast<unsigned long long>(number));
  }
  warp->operations.push_back(std::move(op));
}

}  // namespace

void list_if_ready(Warp* warp) {
  if (front_is_ready(warp) && std::find(wgmma_ready.begin(), wgmma_ready.end(), warp) == wgmma_ready.end()) {
    wgmma_ready.push_back(warp);
  }
}

void execute_wgmma(Warp* warp) {
  const Wgmma& op = warp->operations[size_t(warp->executed - warp->first)];
  float a[16][16];
  read_a(warp->block, op, warp->index % 4, a);
  const float(*const b)[256] = read_b(warp->block, op);
  for (int r = 0; r < 16; ++r) {
    float* const d = op.d->value[r];
    if (!op.scale_d) std::memset(d, 0, sizeof(float) * size_t(op.n));
    for (int n = 0; n < op.n; n += 8) {
      __m256 sum = _mm256_loadu_ps(d + n);
      for (int k = 0; k < 16; ++k) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[r][k]), _mm256_loadu_ps(&b[k][n]), sum);
      _mm256_storeu_ps(d + n, sum);
    }
  }
  ++warp->executed;
  ++stats.wgmma;
  wake(warp->wgmma_waiting);
}

namespace ptx {

void wgmma_fence_sync_aligned() { current->fenced = true; }
void wgmma_commit_group_sync_aligned() { current->group_ends.push_back(current->issued); }

void wgmma_mma_async(float* const* d, int n, bool bf16, uint64_t a, uint64_t b, bool scale_d, int scale_a, int scale_b,
                     int trans_a, int trans_b) {
  Thread* const t = current;
  Warp* const warp = t->warp;
  for (int i = 1; i < n / 2; ++i) {
    if (d[i] != d[0] + i) EMU_FAIL("wgmma m64n%d: register %d is out of order", n, i);
  }
  if (scale_a != 1 || scale_b != 1) EMU_FAIL("wgmma: scales %d and %d are not emulated", scale_a, scale_b);
  InFlight* mine = find_in_flight(t, d[0], n);
  const uint64_t number = t->issued;
  if (number < warp->first) EMU_FAIL("wgmma: a lane is behind its warp");
  const Wgmma wanted{n, trans_a, trans_b, 0, bf16, scale_d, a, b, nullptr, {}};
  if (number - warp->first >= warp->operations.size()) {
    Wgmma op = wanted;
    op.d = mine != nullptr ? mine->d : new Accumulators;
    make_operation(warp, number, std::move(op));
  }
  Wgmma& op = warp->operations[size_t(number - warp->first)];
  if (!op.same(wanted)) EMU_FAIL("wgmma %llu: lanes of a warp give different operands", static_cast<unsigned long long>(number));
  if (mine != nullptr && mine->d != op.d) EMU_FAIL("wgmma: lanes of a warp disagree on what is in flight");
  if (mine == nullptr) {
    if (!t->fenced) EMU_FAIL("wgmma on registers that were accessed, without wgmma.fence");
    for (int i = 0; i < n / 2; ++i) {
      element(op.d, t->lane, i) = *d[i];
      std::memcpy(d[i], &kPoison, 4);
    }
    ++op.d->lanes;
    t->in_flight.push_back({op.d, d[0], n, number});
  } else {
    mine->last = number;
  }
  ++t->issued;
  if (++op.lanes == 32) {
    for (int i = 0; i < 4; ++i) list_if_ready(warp->block->warps[size_t(warp->index / 4 * 4 + i)].get());
  }
}

void wgmma_wait_group_sync_aligned(int pending) {
  Thread* const t = current;
  Warp* const warp = t->warp;
  const size_t keep = std::min(size_t(pending), t->group_ends.size());
  const uint64_t until = keep < t->group_ends.size() ? t->group_ends[t->group_ends.size() - keep - 1] : 0;
  gather(kWgmmaWait, [](Warp*) {});
  while (warp->executed < until) {
    warp->wgmma_waiting.push_back(t);
    block_on("wgmma.wait_group", uint32_t(pending), uint32_t(until));
  }
  hb::wgmma_waited(t, until);
  while (!t->group_ends.empty() && t->group_ends.front() <= until) t->group_ends.pop_front();
  for (size_t i = 0; i < t->in_flight.size();) {
    InFlight& f = t->in_flight[i];
    if (f.last >= until) {
      ++i;
      continue;
    }
    for (int e = 0; e < f.n / 2; ++e) f.registers[e] = element(f.d, t->lane, e);
    if (--f.d->lanes == 0) delete f.d;
    t->in_flight.erase(t->in_flight.begin() + long(i));
    t->fenced = false;  // the program may access these registers now
  }
  while (warp->first < until && !warp->operations.empty()) {
    for (uint16_t kib : warp->operations.front().reads) --warp->block->wgmma_reading[kib];
    warp->operations.pop_front();
    ++warp->first;
  }
}

}  // namespace ptx
}  // namespace emu
