// mbarriers with phases and transaction bytes, cluster barriers, named barriers.
#include "machine.h"

namespace emu {
namespace {

void check_phase(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  ++stats.phases;
  barrier.pending = barrier.count;
  wake(barrier.waiting);
}

void arrive(MBarrier& barrier, uint32_t address) {
  if (barrier.pending == 0) {
    EMU_FAIL("mbarrier at 0x%x: one arrival more than the %u it expects in phase %llu", address, barrier.count,
             static_cast<unsigned long long>(barrier.phase));
  }
  --barrier.pending;
  check_phase(barrier);
}

}  // namespace

MBarrier* barrier_at(Block* block, uint32_t address, const char* what) {
  const auto found = block->barriers.find(address);
  if (found == block->barriers.end()) {
    report("%s: no initialised mbarrier at 0x%x of block rank %d", what, address, block->rank);
  } else if (block->live == 0) {
    report("%s: block rank %d, which owns the mbarrier at 0x%x, has left", what, block->rank, address);
  } else {
    return &found->second;
  }
  if (current != nullptr) stop();
  return nullptr;
}

// complete_tx of the async proxy.
void complete_bytes(MBarrier& barrier, uint32_t address, uint32_t bytes) {
  barrier.bytes -= bytes;
  if (barrier.bytes < -int64_t(kMaxTransaction)) EMU_FAIL("mbarrier at 0x%x: transaction count below -(2^20 - 1)", address);
  check_phase(barrier);
}

// Threads that have exited count as arrived.
void check_cluster_barrier(Cluster* cluster) {
  if (cluster->arrived == 0 || cluster->arrived < cluster->live) return;
  cluster->arrived = 0;
  ++cluster->phase;
  wake(cluster->waiting);
}

namespace ptx {

void mbarrier_init_shared__cta_b64(uint32_t bar, uint32_t count) {
  Block* const block = current->block;
  check_range(block, bar, 8, "mbarrier.init");
  if (bar % 8) EMU_FAIL("mbarrier.init: 0x%x is not a multiple of 8", bar);
  if (count < 1 || count > kMaxTransaction) EMU_FAIL("mbarrier.init: count %u is outside [1, 2^20 - 1]", count);
  if (block->barriers.count(bar)) EMU_FAIL("mbarrier.init: 0x%x holds an mbarrier already", bar);
  block->barriers[bar] = MBarrier{count, count, 0, 0, false, current, {}};
  block->is_barrier[bar / 16] = 1;
}

void fence_mbarrier_init_release_cluster() {
  for (auto& [address, barrier] : current->block->barriers) {
    if (barrier.owner == current) barrier.fenced = true;
  }
}

void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t bar, uint32_t bytes) {
  MBarrier* const barrier = barrier_at(current->block, bar, "mbarrier.arrive.expect_tx");
  barrier->bytes += bytes;
  if (barrier->bytes > int64_t(kMaxTransaction)) EMU_FAIL("mbarrier at 0x%x: transaction count above 2^20 - 1", bar);
  arrive(*barrier, bar);
}

void mbarrier_arrive_shared__cta_b64(uint32_t bar) { arrive(*barrier_at(current->block, bar, "mbarrier.arrive"), bar); }

void mbarrier_arrive_shared__cluster_b64(uint32_t bar) {
  Block* const block = block_of(bar, "mbarrier.arrive.shared::cluster");
  MBarrier* const barrier = barrier_at(block, bar & 0xFFFFFF, "mbarrier.arrive.shared::cluster");
  if (block != current->block && !barrier->fenced) EMU_FAIL("arrival at a peer's mbarrier without fence.mbarrier_init");
  arrive(*barrier, bar & 0xFFFFFF);
}

void mbarrier_try_wait_parity_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity) {
  if (parity > 1) EMU_FAIL("mbarrier.try_wait.parity: parity %u", parity);
  MBarrier* const barrier = barrier_at(current->block, bar, "mbarrier.try_wait");
  done = ((barrier->phase ^ parity) & 1) != 0;
  if (done) return;
  barrier->waiting.push_back(current);
  block_on("mbarrier", bar, parity);
  done = ((barrier->phase ^ parity) & 1) != 0;  // by the time this thread runs it may have moved on twice
}

void barrier_cluster_arrive() {
  Cluster* const cluster = current->block->cluster;
  if (current->cluster_arrived) EMU_FAIL("barrier.cluster.arrive twice without a wait");
  current->cluster_arrived = true;
  current->cluster_phase = cluster->phase;
  ++cluster->arrived;
  check_cluster_barrier(cluster);
}

void barrier_cluster_wait() {
  Cluster* const cluster = current->block->cluster;
  if (!current->cluster_arrived) EMU_FAIL("barrier.cluster.wait without an arrival");
  while (cluster->phase == current->cluster_phase) {
    cluster->waiting.push_back(current);
    block_on("barrier.cluster");
  }
  current->cluster_arrived = false;
}

// Whole warps, as many as the first arrival said.
void bar_sync(uint32_t id, uint32_t threads) {
  Block* const block = current->block;
  if (id > 15) EMU_FAIL("bar.sync: barrier %u is none of 0..15", id);
  if (threads == 0 || threads % 32 || threads > block->threads.size()) EMU_FAIL("bar.sync %u: %u threads", id, threads);
  NamedBarrier& barrier = block->named[id];
  if (barrier.arrived.empty()) barrier.expected = threads;
  if (barrier.expected != threads) EMU_FAIL("bar.sync %u with %u threads where others expect %u", id, threads, barrier.expected);
  barrier.arrived.push_back(current);
  if (barrier.arrived.size() < threads) return block_on("bar.sync", id, threads);
  std::map<Warp*, int> lanes;
  for (Thread* thread : barrier.arrived) ++lanes[thread->warp];
  for (const auto& [warp, count] : lanes) {
    if (count != 32) EMU_FAIL("bar.sync %u, %u: warp %d came with %d lanes", id, threads, warp->index, count);
  }
  barrier.arrived.pop_back();  // this thread goes on at once
  wake(barrier.arrived);
}

}  // namespace ptx
}  // namespace emu
