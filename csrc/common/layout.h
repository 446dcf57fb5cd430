// Index arithmetic that kernels, launcher and tests share: shared-memory addresses, descriptors, rasterisation.
//
// Host and device, no CUDA headers: tests/cuda/test_layout.py compiles this file with g++ and compares every function
// with an independent NumPy emulation, because nothing here has run on a GPU yet. A number that a kernel computes
// inline instead of through this file is a number that no test sees.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define NPT_HD __host__ __device__ __forceinline__ constexpr
#else
#define NPT_HD inline constexpr
#endif

namespace npt {

enum class Dtype : int { kBf16 = 0, kF16 = 1 };

constexpr int kBlockK = 64;            // elements of K per stage: 128 bytes of a 16-bit type, one swizzle row
constexpr int kRowBytes = 128;         // bytes of one swizzled row
constexpr int kChunkCols = 64;         // columns of one TMA box along a contiguous dimension
constexpr int kMaxSegments = 4;
// x coordinate of a box that lies wholly left of every tensor: TMA reads nothing and writes zeros. Small and negative, because
// TMA computes byte positions in 31 bits: with INT32_MAX / 2 (times 2 bytes, plus the box) every such load died with
// cudaErrorIllegalInstruction (H200, driver 580, 2026-11-26).
constexpr int kOutsideColumn = -2 * kChunkCols;
// Widest matrix whose last box, up to 512 columns beyond the edge, still ends below byte 2^31 of its row.
constexpr int64_t kMaxColumns = (int64_t(1) << 30) - 1024;
constexpr int kMaxDynamicSmem = 232448;  // sm_90: 227 KiB a block

// ------------------------------------------------------------------------------------------------ segments
// MAIN reads weights in the layout of the instance; the LOW kinds read w_b_up / w_a_up [R, N], which is N-contiguous
// ("MN-major"). In a gate-up tile LOW_FIRST feeds only the gate half of the accumulators, at half the price (m64n128), and
// LOW_SECOND only the up half: at full price, its gate columns zero-filled by TMA, because an m64n128 on the upper 64 of 128
// accumulators makes ptxas copy them and serialise the pipeline (C7511).
enum SegmentKind : int { kMain = 0, kLow = 1, kLowSecond = 2, kLowFirst = 3 };

NPT_HD int div_up(int a, int b) { return (a + b - 1) / b; }
NPT_HD int64_t div_up64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ swizzle
// TMA's 128-byte swizzle XORs address bits 4..6 with bits 7..9. Buffers start at multiples of 1024, so row and 16-byte
// column of a 128-byte-wide tile are those bits.
NPT_HD uint32_t swizzle128(uint32_t byte_offset) { return byte_offset ^ ((byte_offset >> 3) & 0x70u); }

// Byte offset of (row, 8-column group) in a swizzled tile of 64 16-bit columns.
NPT_HD uint32_t tile_offset(int row, int group) {
  return uint32_t(row) * kRowBytes + ((uint32_t(group) ^ (uint32_t(row) & 7u)) << 4);
}

// ------------------------------------------------------------------------------------------------ wgmma fragments
// m64nNk16 accumulator: element i of lane l of warp w (0..3 in the warpgroup).
NPT_HD int fragment_row(int warp, int lane, int i) { return 16 * warp + lane / 4 + 8 * ((i >> 1) & 1); }
NPT_HD int fragment_col(int lane, int i) { return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1); }

// Address that a lane gives to stmatrix.x4 / ldmatrix.x4 for 16 columns (pair p of 8-column groups, 0..3) of its warp's
// 16 rows. Matrix m = lane/8 holds rows 8·(m&1).. and columns 8·(m>>1).., which is the order of four consecutive packed
// accumulator pairs: (d0,d1), (d2,d3), (d4,d5), (d6,d7).
NPT_HD uint32_t matrix_offset(int warp, int lane, int p) {
  return tile_offset(16 * warp + (lane & 7) + ((lane >> 3) & 1) * 8, 2 * p + (lane >> 4));
}

// ------------------------------------------------------------------------------------------------ wgmma descriptors
// Bits 0-13 address/16, 16-29 leading offset/16, 32-45 stride offset/16, 62-63 swizzle (1: 128 bytes).
NPT_HD uint64_t smem_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return (uint64_t(1) << 62) | (uint64_t(stride_bytes >> 4) << 32) | (uint64_t(leading_bytes >> 4) << 16) |
         uint64_t((address & 0x3FFFFu) >> 4);
}
// K-major: rows of 128 bytes (64 of K), 8-row groups 1024 bytes apart; the leading offset is ignored (1 by convention).
NPT_HD uint64_t descriptor_k_major(uint32_t address) { return smem_descriptor(address, 16, 1024); }
// MN-major: columns of 64 along M/N stored as [64 of K][128 bytes], `chunk_bytes` apart; 8 of K are 1024 bytes.
NPT_HD uint64_t descriptor_mn_major(uint32_t address, uint32_t chunk_bytes) {
  return smem_descriptor(address, chunk_bytes, 1024);
}
// What one k16 step adds to a descriptor: 32 bytes inside the swizzled row, or 16 rows of 128 bytes.
NPT_HD uint64_t descriptor_step(bool mn_major) { return mn_major ? (16u * kRowBytes) >> 4 : 32u >> 4; }
constexpr uint32_t kMnChunkBytes = kBlockK * kRowBytes;  // 8192

// ------------------------------------------------------------------------------------------------ ring
// Bytes that a stage's full barrier expects, both cluster peers' multicasts counted. TMA counts whole boxes, so rows and
// columns outside the tensor (zero filled) are included.
NPT_HD uint32_t stage_bytes(int block_m, int block_n, int kind) {
  return uint32_t(block_m + (kind == kLowFirst ? block_n / 2 : block_n)) * kRowBytes;
}
struct RingPosition {
  int stage;
  uint32_t phase;
};
// k-block number → stage and parity of that use; the ring never restarts, not at a segment and not at a tile.
NPT_HD RingPosition ring_position(uint32_t k_block, int stages) {
  return RingPosition{int(k_block % uint32_t(stages)), (k_block / uint32_t(stages)) & 1u};
}
NPT_HD RingPosition ring_advance(RingPosition p, int by, int stages) {
  const int next = p.stage + by;
  return RingPosition{next % stages, p.phase ^ (uint32_t(next / stages) & 1u)};
}

// ------------------------------------------------------------------------------------------------ tile order
struct TileCoord {
  int m, n;
};
// Tiles in groups of `group` rows, down the rows first: a wave then touches few different weight columns and its token
// rows stay in L2.
NPT_HD TileCoord tile_coord(int tile, int tiles_m, int tiles_n, int group) {
  const int width = group * tiles_n;
  const int first = (tile / width) * group;
  const int rows = tiles_m - first < group ? tiles_m - first : group;
  const int local = tile % width;
  return TileCoord{first + local % rows, local / rows};
}

// ------------------------------------------------------------------------------------------------ split K
// First of the k-blocks that part `part` of `parts` takes; the next part's first ends it. Parts may be empty.
NPT_HD int split_begin(int blocks, int parts, int part) { return int(int64_t(blocks) * part / parts); }

// How many of the k-blocks [begin, begin + count) lie in [first, last).
NPT_HD int overlap_count(int first, int last, int begin, int count) {
  const int from = first > begin ? first : begin, to = last < begin + count ? last : begin + count;
  return to > from ? to - from : 0;
}
// Bytes of the slot of a thread's accumulator pair in a split decode tile: neighbouring threads are neighbours.
NPT_HD uint32_t split_slot(int half, int pair, int pairs, int thread) {
  return uint32_t((half * pairs + pair) * 128 + thread) * 8u;
}

// ------------------------------------------------------------------------------------------------ partial sums in shared memory
// fp32 rows of `width` columns. The pitch is 8 modulo 32 words: the 8-byte stores of a fragment (a half warp writes 4 rows x 8
// columns) then touch every bank once.
NPT_HD int partial_pitch(int width) { return (width + 31) / 32 * 32 + 8; }
NPT_HD uint32_t partial_offset(int row, int column, int width) { return uint32_t(row * partial_pitch(width) + column) * 4u; }

}  // namespace npt
