// Blocks and clusters come and go; a grid's dependents; setmaxnreg.
#include <algorithm>

#include "machine.h"

namespace emu {
namespace {

std::unique_ptr<Block> new_block(Grid* grid, Cluster* cluster, int rank, int number) {
  auto block = std::make_unique<Block>();
  const int threads = int(grid->threads.x);
  block->cluster = cluster;
  block->grid = grid;
  block->rank = rank;
  block->index = {unsigned(number) % grid->size.x, unsigned(number) / grid->size.x % grid->size.y,
                  unsigned(number) / grid->size.x / grid->size.y};
  block->live = threads;
  if (grid->dynamic_smem > 0) {
    block->shared.assign(kSharedWindow, 0xFF);  // NaN in every 16-bit type
    for (auto* units : {&block->loading, &block->storing, &block->unfenced}) units->assign(kSharedWindow / 16, 0);
    block->is_barrier.assign(kSharedWindow / 16, 0);
    block->wgmma_reading.assign(kSharedWindow / 1024, 0);
    block->version.assign(kSharedWindow / 1024, 0);
    block->shared_begin = 1024 + uint32_t(schedule.shared_shift);
    block->shared_end = block->shared_begin + uint32_t(grid->dynamic_smem);
  }
  if (grid->dynamic_smem > 0) hb::prepare(block.get());
  block->warpgroup_log.resize(size_t(threads + 127) / 128);
  for (int i = 0; i < threads / 32; ++i) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get();
    warp->index = i;
    warp->priority = random_unit();
    block->warps.push_back(std::move(warp));
  }
  for (int i = 0; i < threads; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->place = {{unsigned(i), 0, 0}, block->index, grid->size, grid->threads};
    thread->block = block.get();
    thread->warp = block->warps[size_t(i / 32)].get();
    thread->lane = i % 32;
    thread->warp->threads.push_back(thread.get());
    prepare_fiber(thread.get());
    make_runnable(thread.get());
    ++stats.threads;
    block->threads.push_back(std::move(thread));
  }
  return block;
}

void trigger(Block* block) {
  if (block->triggered) return;
  block->triggered = true;
  --block->grid->untriggered;
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) EMU_FAIL("setmaxnreg %d: not a multiple of 8 from 24 to 256", count);
  Block* const block = current->block;
  block->registers[current->warp->index] = count;
  int sum = 0;
  for (const auto& [warp, registers] : block->registers) sum += registers * 32;
  if (sum > 65536) EMU_FAIL("setmaxnreg %d: the block's warps would have %d registers, the SM has 65536", count, sum);
}

}  // namespace

void start_cluster(Grid* grid, int index) {
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = grid;
  for (int rank = 0; rank < grid->cluster_size; ++rank) {
    cluster->blocks.push_back(new_block(grid, cluster.get(), rank, index * grid->cluster_size + rank));
    cluster->live += cluster->blocks.back()->live;
  }
  grid->active.push_back(std::move(cluster));
}

void thread_exit(Thread* thread) {
  Block* const block = thread->block;
  if (!thread->in_flight.empty() || thread->issued != thread->warp->first) report("a thread leaves with wgmma in flight");
  if (thread->open_group) report("a thread leaves with bulk stores that were not committed");
  if (thread->cluster_arrived) report("a thread leaves between barrier.cluster.arrive and barrier.cluster.wait");
  thread->done = true;
  Cluster* const cluster = block->cluster;
  --cluster->live;
  check_cluster_barrier(cluster);
  if (--block->live > 0) return;
  if (block->pending_loads) report("block rank %d leaves while TMA loads into it are in flight", block->rank);
  if (block->pending_store_reads) report("block rank %d leaves while TMA stores still read its shared memory", block->rank);
  for (const NamedBarrier& barrier : block->named) {
    if (!barrier.arrived.empty()) report("block rank %d leaves while threads wait at a named barrier", block->rank);
  }
  trigger(block);  // leaving counts as griddepcontrol.launch_dependents
  --block->grid->unfinished;
  finish_grid(block->grid);
}

void finish_grid(Grid* grid) {
  if (grid->unfinished > 0 || grid->pending_writes > 0 || grid->done) return;
  grid->done = true;
  wake(grid->dependents);
}

// Frees clusters that have ended and whose shared memory nothing reads any more.
void collect(Grid* grid) {
  const auto gone = [](const std::unique_ptr<Cluster>& cluster) {
    if (cluster->live > 0) return false;
    for (const auto& block : cluster->blocks) {
      if (block->pending_loads || block->pending_store_reads) return false;
    }
    for (Store& store : store_writes) {
      if (store.block != nullptr && store.block->cluster == cluster.get()) store.owner = nullptr, store.block = nullptr;
    }
    const auto of_cluster = [&](const Warp* warp) { return warp->block->cluster == cluster.get(); };
    run_list.erase(std::remove_if(run_list.begin(), run_list.end(), of_cluster), run_list.end());
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) release_stack(thread.get());
    }
    return true;
  };
  auto& active = grid->active;
  active.erase(std::remove_if(active.begin(), active.end(), gone), active.end());
}

namespace ptx {

void setmaxnreg_inc_sync_aligned_u32(int registers) { set_registers(registers); }
void setmaxnreg_dec_sync_aligned_u32(int registers) { set_registers(registers); }

// PTX: a grid may start when all blocks before have issued this or ended. One thread's counts for its block.
void griddepcontrol_launch_dependents() { trigger(current->block); }

void griddepcontrol_wait() {
  Grid* const grid = current->block->grid;
  while (grid->overlaps && grid->before != nullptr && !grid->before->done) {
    grid->before->dependents.push_back(current);
    block_on("griddepcontrol.wait");
  }
}

uint32_t special_cluster_ctarank() { return uint32_t(current->block->rank); }
uint32_t special_cluster_nctarank() { return uint32_t(current->block->cluster->blocks.size()); }

}  // namespace ptx
}  // namespace emu
