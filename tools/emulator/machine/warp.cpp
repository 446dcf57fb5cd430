// What the 32 lanes of a warp do together, and conversions between registers.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "machine.h"

namespace emu {

void gather(Gathering kind, void (*finish)(Warp*)) {
  Warp* const warp = current->warp;
  if (warp->gathered == 0) warp->gathering = kind;
  if (warp->gathering != kind) {
    EMU_FAIL("lanes of warp %d are at different warp-wide instructions (%d and %d)", warp->index, warp->gathering, int(kind));
  }
  if (++warp->gathered < 32) {
    warp->waiting.push_back(current);
    return block_on("the other lanes of its warp", uint32_t(kind));
  }
  warp->gathered = 0;
  finish(warp);
  wake(warp->waiting);
}

uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane) {
  if (mask != 0xFFFFFFFFu) {
    report("shuffle with mask 0x%x: the emulator knows whole warps", mask);
    stop();
  }
  Thread* const t = current;
  t->warp->in[t->lane][0] = value;
  t->warp->in[t->lane][1] = uint32_t(source_lane) & 31;
  gather(kShuffle, [](Warp* warp) {
    for (int lane = 0; lane < 32; ++lane) warp->out[lane][0] = warp->in[warp->in[lane][1]][0];
  });
  return t->warp->out[t->lane][0];
}

namespace {

uint16_t to_bf16(float value) {  // nearest even; NaN becomes 0x7FFF
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
uint16_t to_f16(float value) { return std::isnan(value) ? 0x7FFF : uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }

}  // namespace

namespace ptx {

void cvt_rn_bf16x2_f32(uint32_t& out, float high, float low) { out = uint32_t(to_bf16(high)) << 16 | to_bf16(low); }
void cvt_rn_f16x2_f32(uint32_t& out, float high, float low) { out = uint32_t(to_f16(high)) << 16 | to_f16(low); }
void cvt_f32_f16(float& out, uint16_t half) { out = _cvtsh_ss(half); }

// Matrix m: row r at the address of lane 8m + r; lane 4r + q holds its elements 2q and 2q + 1 in register m.
void stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t* const in = current->warp->in[current->lane];
  in[0] = a, in[1] = b, in[2] = c, in[3] = d, in[4] = address;
  gather(kStMatrix, [](Warp* warp) {
    for (int m = 0; m < 4; ++m) {
      for (int r = 0; r < 8; ++r) {
        const uint32_t at = warp->in[8 * m + r][4];
        if (at % 16) EMU_FAIL("stmatrix: row address 0x%x is not a multiple of 16", at);
        for (int q = 0; q < 4; ++q) {
          ordinary_write(at + 4 * uint32_t(q), &warp->in[4 * r + q][m], 4, "stmatrix", warp->threads[size_t(4 * r + q)]);
        }
      }
    }
  });
}

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
  Thread* const t = current;
  t->warp->in[t->lane][4] = address;
  gather(kLdMatrix, [](Warp* warp) {
    for (int m = 0; m < 4; ++m) {
      for (int r = 0; r < 8; ++r) {
        const uint32_t at = warp->in[8 * m + r][4];
        if (at % 16) EMU_FAIL("ldmatrix: row address 0x%x is not a multiple of 16", at);
        for (int q = 0; q < 4; ++q) {
          Thread* const reader = warp->threads[size_t(4 * r + q)];
          ordinary_read(warp->block, at + 4 * uint32_t(q), &warp->out[4 * r + q][m], 4, "ldmatrix", reader);
        }
      }
    }
  });
  const uint32_t* const out = t->warp->out[t->lane];
  a = out[0], b = out[1], c = out[2], d = out[3];
}

}  // namespace ptx
}  // namespace emu
