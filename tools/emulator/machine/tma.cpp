// TMA: loads and stores of two-dimensional boxes of 16-bit elements, 128 bytes wide, 128-byte swizzle; they happen later.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;  // stands for createpolicy's result
constexpr int kBoxColumns = 64, kRowUnits = 8;           // 128 bytes: 64 elements, 8 units of 16 bytes

uint32_t unit_address(uint32_t tile, int row, int unit) { return swizzle(3, tile + uint32_t(row) * 128 + uint32_t(unit) * 16); }

TensorMap read_map(uint64_t address, const char* what) {
  TensorMap map{};
  if (address % 64) {
    report("%s: the tensor map is at 0x%llx, not a multiple of 64", what, static_cast<unsigned long long>(address));
  } else {
    std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
    if (map.magic != kMapMagic) report("%s: there is no tensor map", what);
  }
  if (!error.empty()) stop();
  return map;
}

// Measured on an H200 (2026-11-26, commit 89296b4): a load whose x was INT32_MAX / 2 ended in cudaErrorIllegalInstruction, although
// PTX gives coordinates 32 bits. So a box has to lie within 31 bits of *bytes* from the tensor's origin.
void check_coordinates(const TensorMap& map, int x, int y, const char* what) {
  const int64_t at[2] = {x, y};
  for (int i = 0; i < 2; ++i) {
    const int64_t furthest = std::max(std::abs(at[i]), std::abs(at[i] + int64_t(map.box[i])));
    if (furthest * 2 > INT32_MAX) {
      EMU_FAIL("%s: coordinate %c = %lld; times 2 bytes, with its box of %u, it leaves 31 bits (on an H200: "
               "cudaErrorIllegalInstruction)",
               what, "xy"[i], static_cast<long long>(at[i]), map.box[i]);
    }
  }
}

void issue_load(uint32_t to, uint64_t map_address, int x, int y, uint32_t bar, uint32_t mask) {
  const TensorMap map = read_map(map_address, "TMA load");
  check_coordinates(map, x, y, "TMA load");
  Cluster* const cluster = current->block->cluster;
  const int rows = int(map.box[1]);
  if (to >> 24 || bar >> 24) EMU_FAIL("TMA load: the emulator knows own addresses only");
  if (to % 128) EMU_FAIL("TMA load: destination 0x%x is not a multiple of 128", to);
  if (mask >> cluster->blocks.size()) EMU_FAIL("TMA load: mask 0x%x in a cluster of %zu", mask, cluster->blocks.size());
  ++stats.tma_loads;
  for (const auto& block : cluster->blocks) {
    const int rank = block->rank;
    if (!(mask >> rank & 1)) continue;
    if (block->live == 0) EMU_FAIL("TMA load into block rank %d, which has left", rank);
    check_range(block.get(), to, uint32_t(rows) * 128, "TMA load");
    const MBarrier* const barrier = barrier_at(block.get(), bar, "TMA load");
    if (!barrier->fenced) EMU_FAIL("TMA load on an mbarrier without fence.mbarrier_init");
    hb::use(*barrier, current, bar, true, "TMA load");
    for (int i = 0; i < rows * kRowUnits; ++i) {
      const uint32_t unit = unit_address(to, i / kRowUnits, i % kRowUnits) / 16;
      if (block->loading[unit]) EMU_FAIL("TMA load into 0x%x of rank %d, which another load in flight will write", unit * 16, rank);
      if (block->storing[unit]) EMU_FAIL("TMA load into 0x%x of rank %d, which a TMA store still has to read", unit * 16, rank);
      if (block->wgmma_reading[unit / 64]) {
        EMU_FAIL("TMA load into 0x%x of rank %d, which a wgmma not waited for reads", unit * 16, rank);
      }
      if (block->unfenced[unit]) {
        EMU_FAIL("TMA load into 0x%x of rank %d after ordinary writes without fence.proxy.async", unit * 16, rank);
      }
      if (block->is_barrier[unit]) EMU_FAIL("TMA load over an mbarrier at 0x%x of rank %d", unit * 16, rank);
      ++block->loading[unit];
      ++block->version[unit / 64];
    }
    hb::load_issued(current, block.get(), to, uint32_t(rows) * 128);
    for (int from = 0; from < rows;) {  // whole, or in pieces of some rows
      const int until = random_below(2) ? rows : std::min(rows, from + 8 * int(1 + random_below(4)));
      loads.push_back({block.get(), to, bar, map, x, y, from, until});
      ++block->pending_loads;
      from = until;
    }
  }
}

void wake_if_waiting_for_stores(Thread* thread) {
  if (thread != nullptr && !thread->done && thread->blocked && !std::strcmp(thread->waits_for, "bulk stores")) {
    make_runnable(thread);
  }
}

void wait_for_stores(int pending, bool reads_only) {
  auto& groups = current->groups;
  const auto busy = [&] {
    for (size_t i = 0; i + size_t(pending) < groups.size(); ++i) {
      if ((reads_only ? groups[i]->reads : groups[i]->writes) > 0) return true;
    }
    return false;
  };
  while (busy()) block_on("bulk stores", uint32_t(pending), reads_only);
  while (!groups.empty() && groups.front()->writes == 0) groups.pop_front();
  hb::stores_waited(current, uint32_t(pending));
}

}  // namespace

// Rows of a box arrive. Outside the tensor: zeros, which count as bytes all the same.
void do_load(const Load& load) {
  Block* const block = load.block;
  if (block->live == 0) EMU_FAIL("a TMA load arrives in block rank %d, which has left", block->rank);
  const TensorMap& map = load.map;
  for (int row = load.first_row; row < load.last_row; ++row) {
    const int64_t y = int64_t(load.y) + row;
    const bool inside = y >= 0 && uint64_t(y) < map.size[1];
    const uint8_t* const line = map.base + (inside ? uint64_t(y) * map.pitch : 0);
    for (int unit = 0; unit < kRowUnits; ++unit) {
      const uint32_t at = unit_address(load.to, row, unit);
      uint16_t elements[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int64_t x = int64_t(load.x) + unit * 8 + i;
        if (inside && x >= 0 && uint64_t(x) < map.size[0]) std::memcpy(&elements[i], line + x * 2, 2);
      }
      std::memcpy(&block->shared[at], elements, 16);
      --block->loading[at / 16];
      ++block->version[at / 1024];
    }
  }
  --block->pending_loads;
  MBarrier* const barrier = barrier_at(block, load.bar, "TMA load");
  if (barrier == nullptr) return;
  const uint32_t bytes = uint32_t(load.last_row - load.first_row) * 128;
  hb::load_arrived(*barrier, block, load.to + uint32_t(load.first_row) * 128, bytes);
  complete_bytes(*barrier, load.bar, bytes);
}

void do_store_read(Store store) {
  Block* const block = store.block;
  const int rows = int(store.map.box[1]);
  store.data.resize(size_t(rows) * kBoxColumns);
  for (int i = 0; i < rows * kRowUnits; ++i) {
    const uint32_t at = unit_address(store.from, i / kRowUnits, i % kRowUnits);
    std::memcpy(&store.data[size_t(i) * 8], &block->shared[at], 16);
    --block->storing[at / 16];
  }
  --store.group->reads;
  --block->pending_store_reads;
  wake_if_waiting_for_stores(store.owner);
  store_writes.push_back(std::move(store));
}

// What lies outside the tensor is not written.
void do_store_write(const Store& store) {
  const TensorMap& map = store.map;
  for (int row = 0; row < int(map.box[1]); ++row) {
    const int64_t y = int64_t(store.y) + row;
    if (y < 0 || uint64_t(y) >= map.size[1]) continue;
    for (int i = 0; i < kBoxColumns; ++i) {
      const int64_t x = int64_t(store.x) + i;
      if (x < 0 || uint64_t(x) >= map.size[0]) continue;
      std::memcpy(map.base + uint64_t(y) * map.pitch + x * 2, &store.data[size_t(row) * kBoxColumns + size_t(i)], 2);
    }
  }
  --store.group->writes;
  --store.grid->pending_writes;
  wake_if_waiting_for_stores(store.owner);
  finish_grid(store.grid);
}

namespace ptx {

void prefetch_tensormap(uint64_t map) { read_map(map, "prefetch.tensormap"); }
void createpolicy_fractional_L2__evict_first_b64(uint64_t& policy, double) { policy = kEvictFirst; }

void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to, uint64_t map, int x, int y,
                                                                                 uint32_t bar) {
  issue_load(to, map, x, y, bar, 1u << current->block->rank);
}
void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes_multicast__cluster(uint32_t to, uint64_t map,
                                                                                                    int x, int y, uint32_t bar,
                                                                                                    uint16_t mask) {
  issue_load(to, map, x, y, bar, mask);
}
void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes_L2__cache_hint(uint32_t to, uint64_t map, int x,
                                                                                                int y, uint32_t bar,
                                                                                                uint64_t policy) {
  if (policy != kEvictFirst) EMU_FAIL("TMA load: 0x%llx is no cache policy", static_cast<unsigned long long>(policy));
  issue_load(to, map, x, y, bar, 1u << current->block->rank);
}

void cp_async_bulk_tensor_2d_global_shared__cta_bulk_group(uint64_t map_address, int x, int y, uint32_t from) {
  const TensorMap map = read_map(map_address, "TMA store");
  check_coordinates(map, x, y, "TMA store");
  Block* const block = current->block;
  if (from % 128) EMU_FAIL("TMA store: source 0x%x is not a multiple of 128", from);
  check_range(block, from, map.box[1] * 128, "TMA store");
  ++stats.tma_stores;
  for (uint32_t unit = from / 16; unit < from / 16 + map.box[1] * kRowUnits; ++unit) {
    if (block->unfenced[unit]) {
      EMU_FAIL("TMA store from 0x%x: ordinary writes there are not followed by fence.proxy.async", unit * 16);
    }
    if (block->loading[unit]) EMU_FAIL("TMA store from 0x%x, which a TMA load in flight will write", unit * 16);
    ++block->storing[unit];
  }
  hb::store_issued(current, from, map.box[1] * 128);
  if (!current->open_group) current->open_group = std::make_shared<StoreGroup>();
  ++current->open_group->reads;
  ++current->open_group->writes;
  ++block->grid->pending_writes;
  ++block->pending_store_reads;
  store_reads.push_back({block, block->grid, current, from, map, x, y, current->open_group, {}});
}

void cp_async_bulk_commit_group() {
  current->groups.push_back(current->open_group ? current->open_group : std::make_shared<StoreGroup>());
  current->open_group.reset();
  hb::stores_committed(current);
}
void cp_async_bulk_wait_group_read(int pending) { wait_for_stores(pending, true); }
void cp_async_bulk_wait_group(int pending) { wait_for_stores(pending, false); }

}  // namespace ptx
}  // namespace emu
