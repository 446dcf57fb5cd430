// mbarriers with phases and transaction bytes, cluster barriers, named barriers.
#include "machine.h"

namespace emu {
namespace {

void check_phase(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  ++stats.phases;
  hb::complete(barrier.meeting, barrier.slot, barrier.phase);
  barrier.pending = barrier.count;
  wake(barrier.waiting);
}

void arrive(MBarrier& barrier, uint32_t address, const char* what, bool release = true, hb::Scope scope = hb::kCta) {
  if (barrier.pending == 0) {
    EMU_FAIL("mbarrier at 0x%x: one arrival more than the %u it expects in phase %llu", address, barrier.count,
             static_cast<unsigned long long>(barrier.phase));
  }
  const bool peer = barrier.owner->block != current->block;
  hb::use(barrier, current, address, peer, what);
  hb::arrive(barrier.meeting, current, peer, release, scope);
  --barrier.pending;
  check_phase(barrier);
}

void arrive_at_peer(uint32_t bar, const char* what, hb::Scope scope) {
  Block* const block = block_of(bar, what);
  MBarrier* const barrier = barrier_at(block, bar & 0xFFFFFF, what);
  if (block != current->block && !barrier->fenced) EMU_FAIL("arrival at a peer's mbarrier without fence.mbarrier_init");
  arrive(*barrier, bar & 0xFFFFFF, what, true, scope);
}

void try_wait(bool& done, uint32_t bar, uint32_t parity, bool acquire, hb::Scope scope) {
  if (parity > 1) EMU_FAIL("mbarrier.try_wait.parity: parity %u", parity);
  MBarrier* const barrier = barrier_at(current->block, bar, "mbarrier.try_wait");
  hb::use(*barrier, current, bar, false, "mbarrier.try_wait");
  done = ((barrier->phase ^ parity) & 1) != 0;
  if (!done) {
    barrier->waiting.push_back(current);
    block_on("mbarrier", bar, parity);
    done = ((barrier->phase ^ parity) & 1) != 0;  // by the time this thread runs it may have moved on twice
  }
  if (done) hb::wait(barrier->meeting, current, acquire, scope);
}

void cluster_arrive(bool release) {
  Cluster* const cluster = current->block->cluster;
  if (current->cluster_arrived) EMU_FAIL("barrier.cluster.arrive twice without a wait");
  current->cluster_arrived = true;
  current->cluster_phase = cluster->phase;
  hb::arrive(cluster->meeting, current, true, release, hb::kCluster);
  ++cluster->arrived;
  check_cluster_barrier(cluster);
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
  hb::complete(cluster->meeting, 0, cluster->phase);
  wake(cluster->waiting);
}

namespace ptx {

void mbarrier_init_shared__cta_b64(uint32_t bar, uint32_t count) {
  Block* const block = current->block;
  check_range(block, bar, 8, "mbarrier.init");
  if (bar % 8) EMU_FAIL("mbarrier.init: 0x%x is not a multiple of 8", bar);
  if (count < 1 || count > kMaxTransaction) EMU_FAIL("mbarrier.init: count %u is outside [1, 2^20 - 1]", count);
  if (block->barriers.count(bar)) EMU_FAIL("mbarrier.init: 0x%x holds an mbarrier already", bar);
  block->barriers[bar] = MBarrier{count, count, 0, 0, false, current, {}, {}, 0, 0, 0};
  hb::init(block->barriers[bar], current, bar);
  block->is_barrier[bar / 16] = 1;
}

void fence_mbarrier_init_release_cluster() {
  for (auto& [address, barrier] : current->block->barriers) {
    if (barrier.owner == current) barrier.fenced = true;
  }
  hb::init_fence(current);
}

void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t bar, uint32_t bytes) {
  MBarrier* const barrier = barrier_at(current->block, bar, "mbarrier.arrive.expect_tx");
  barrier->bytes += bytes;
  if (barrier->bytes > int64_t(kMaxTransaction)) EMU_FAIL("mbarrier at 0x%x: transaction count above 2^20 - 1", bar);
  arrive(*barrier, bar, "mbarrier.arrive.expect_tx");
}

// Without .sem and .scope: .release.cta and .acquire.cta, at a peer's barrier too.
void mbarrier_arrive_shared__cta_b64(uint32_t bar) {
  arrive(*barrier_at(current->block, bar, "mbarrier.arrive"), bar, "mbarrier.arrive");
}
void mbarrier_arrive_relaxed_cta_shared__cta_b64(uint32_t bar) {
  arrive(*barrier_at(current->block, bar, "mbarrier.arrive"), bar, "mbarrier.arrive", false);
}

void mbarrier_arrive_shared__cluster_b64(uint32_t bar) { arrive_at_peer(bar, "mbarrier.arrive.shared::cluster", hb::kCta); }
void mbarrier_arrive_release_cluster_shared__cluster_b64(uint32_t bar) {
  arrive_at_peer(bar, "mbarrier.arrive.shared::cluster", hb::kCluster);
}
void mbarrier_try_wait_parity_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity) {
  try_wait(done, bar, parity, true, hb::kCta);
}
void mbarrier_try_wait_parity_acquire_cluster_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity) {
  try_wait(done, bar, parity, true, hb::kCluster);
}
void mbarrier_try_wait_parity_relaxed_cta_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity) {
  try_wait(done, bar, parity, false, hb::kCta);
}

void fence_acq_rel_cta() { hb::fence(current, hb::kCta); }
void fence_acq_rel_cluster() { hb::fence(current, hb::kCluster); }

void barrier_cluster_arrive() { cluster_arrive(true); }
void barrier_cluster_arrive_relaxed() { cluster_arrive(false); }

void barrier_cluster_wait() {
  Cluster* const cluster = current->block->cluster;
  if (!current->cluster_arrived) EMU_FAIL("barrier.cluster.wait without an arrival");
  while (cluster->phase == current->cluster_phase) {
    cluster->waiting.push_back(current);
    block_on("barrier.cluster");
  }
  current->cluster_arrived = false;
  hb::wait(cluster->meeting, current, true, hb::kCluster);
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
  hb::Meeting meeting;
  for (Thread* thread : barrier.arrived) hb::arrive(meeting, thread, false, true, hb::kCta);
  hb::complete(meeting, 0, 0);
  for (Thread* thread : barrier.arrived) hb::wait(meeting, thread, true, hb::kCta);
  barrier.arrived.pop_back();  // this thread goes on at once
  wake(barrier.arrived);
}

}  // namespace ptx
}  // namespace emu
