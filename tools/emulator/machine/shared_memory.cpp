// Shared memory by ordinary accesses (the generic proxy): addresses, and what must not be touched while something is under way.
#include <cstring>

#include "machine.h"

namespace emu {

// An address is an offset into the block's window; in the shared::cluster window the top byte is rank + 1.
Block* block_of(uint32_t address, const char* what) {
  const uint32_t top = address >> 24;
  if (top == 0) return current->block;
  const auto& blocks = current->block->cluster->blocks;
  if (top > blocks.size()) {
    report("%s: address 0x%x is outside the cluster", what, address);
    stop();
  }
  return blocks[top - 1].get();
}

void check_range(Block* block, uint32_t at, uint32_t bytes, const char* what) {
  if (at < block->shared_begin || at + bytes > block->shared_end) {
    EMU_FAIL("%s: shared memory [0x%x, 0x%x) is outside the block's [0x%x, 0x%x)", what, at, at + bytes, block->shared_begin,
             block->shared_end);
  }
}

void ordinary_write(uint32_t at, const void* data, uint32_t bytes, const char* what, Thread* writer) {
  Block* const block = writer->block;
  check_range(block, at, bytes, what);
  for (uint32_t unit = at / 16; unit <= (at + bytes - 1) / 16; ++unit) {
    if (block->is_barrier[unit]) EMU_FAIL("%s writes over a barrier at 0x%x", what, unit * 16);
    if (block->loading[unit]) EMU_FAIL("%s writes 0x%x, which a TMA load in flight will write", what, unit * 16);
    if (block->storing[unit]) EMU_FAIL("%s writes 0x%x, which a TMA store still has to read", what, unit * 16);
    if (block->wgmma_reading[unit / 64]) EMU_FAIL("%s writes 0x%x, which a wgmma in flight reads", what, unit * 16);
    ++block->unfenced[unit];
    writer->unfenced.push_back(unit);
    ++block->version[unit / 64];
  }
  hb::write(writer, block, at, bytes, what);
  std::memcpy(&block->shared[at], data, bytes);
}

void ordinary_read(Block* block, uint32_t at, void* data, uint32_t bytes, const char* what, Thread* reader) {
  check_range(block, at, bytes, what);
  if (block->live == 0) EMU_FAIL("%s reads the shared memory of block rank %d, which has left", what, block->rank);
  for (uint32_t unit = at / 16; unit <= (at + bytes - 1) / 16; ++unit) {
    if (block->loading[unit]) EMU_FAIL("%s reads 0x%x, which a TMA load in flight will write", what, unit * 16);
    if (block->is_barrier[unit]) EMU_FAIL("%s reads a barrier at 0x%x", what, unit * 16);
  }
  hb::read(reader, block, at, bytes, what);
  std::memcpy(data, &block->shared[at], bytes);
}

uint8_t* dynamic_smem() { return current->block->shared.data() + current->block->shared_begin; }

void* static_smem_bytes(size_t bytes, const void* key) {
  std::vector<uint8_t>& memory = current->block->statics[key];
  if (memory.empty()) memory.assign(bytes, 0xFF);
  return memory.data();
}

uint64_t shared_address(const void* p) { return uint64_t(static_cast<const uint8_t*>(p) - current->block->shared.data()); }

namespace ptx {

void mapa_shared__cluster_u32(uint32_t& out, uint32_t address, uint32_t rank) {
  if (address >> 24) EMU_FAIL("mapa: 0x%x is not an address of this block", address);
  if (rank >= current->block->cluster->blocks.size()) EMU_FAIL("mapa: rank %u is outside the cluster", rank);
  out = address | (rank + 1) << 24;
}

void ld_shared__cluster_v2_f32(float& x, float& y, uint32_t address) {
  const uint32_t at = address & 0xFFFFFF;
  if (at % 8) EMU_FAIL("ld.shared::cluster.v2: 0x%x is not a multiple of 8", at);
  float both[2];
  ordinary_read(block_of(address, "ld.shared::cluster"), at, both, 8, "ld.shared::cluster", current);
  x = both[0], y = both[1];
}

void st_shared_v2_f32(uint32_t address, float x, float y) {
  if (address % 8) EMU_FAIL("st.shared.v2: 0x%x is not a multiple of 8", address);
  const float both[2] = {x, y};
  ordinary_write(address, both, 8, "st.shared", current);
}

// Per thread: it orders the executing thread's own writes, and a barrier hands that on.
void fence_proxy_async_shared__cta() {
  for (uint32_t unit : current->unfenced) --current->block->unfenced[unit];
  current->unfenced.clear();
  hb::proxy_fence(current);
}

void ld_global_nc_b32(uint32_t& out, uint64_t address) {
  if (address % 4) EMU_FAIL("ld.global.nc.b32: 0x%llx is not a multiple of 4", static_cast<unsigned long long>(address));
  std::memcpy(&out, reinterpret_cast<const void*>(address), 4);
}

}  // namespace ptx
}  // namespace emu
