// Which access happens before which, by vector clocks: a race is reported in every schedule, also where the one that ran hid it.
// What gives an order, and what does not: ../README.md, "Order". NPT_EMULATE_ORDER=0 turns it off.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emu {

struct Block;
struct MBarrier;
struct Thread;
struct Warp;

namespace hb {

extern bool on;  // changed between launches only

// A slot is what has a time of its own: a thread (advanced by its releases), a thread's bulk stores (commit groups), a warp's
// wgmmas, an mbarrier (phases). It gets its number in the cluster when it first touches shared memory, so clocks stay short.
struct Slot {
  enum Kind : uint8_t { kThread, kStores, kWgmma, kBarrier } kind;
  Thread* thread;    // kThread, kStores, and some lane of the warp of kWgmma
  Block* block;
  uint32_t address;  // kBarrier
};
// The times that a thread knows to have passed. strong: release and acquire, with scopes that cover both threads, stand between.
// weak: also what any arrival tells that was seen to have happened: enough for asynchronous work that had been waited for.
struct Clock {
  std::vector<uint32_t> strong, weak;
};
using Known = std::shared_ptr<const Clock>;  // shared by threads that know the same
enum Scope { kCta, kCluster };

struct Moment {
  Known known;
  uint32_t now = 0;
};
struct Own {  // of a thread
  Known known;
  uint32_t slot = 0, now = 1, stores = 0, groups = 0;  // slots, 0: none yet; commit groups so far
  std::vector<uint32_t> proxy_fences;                  // when fence.proxy.async was executed
  Moment fenced[2];                                    // at the last fence.acq_rel of that scope or a wider one
  Known observed[2];                                   // by relaxed waits: acquired by the next fence of that scope
  uint32_t checked_kib = ~0u, checked_stamp = 0;       // where wgmma's reads are known to be over
};
struct Meeting {  // what the arrivals of a phase hand on, by the scope that a waiter acquires with
  Clock next[2];
  Known released[2];  // of the phase that was completed last
  Known last;         // whose knowledge was added last, and how
  int last_how = -1;
};
struct Shadow {  // of a block's shared memory, per 4 bytes: the last write, the reads since; per KiB and warp: the last wgmma
  std::vector<uint64_t> write, read;
  std::unordered_map<uint32_t, std::vector<uint64_t>> more_reads;
  std::vector<uint32_t> wgmma, wgmma_stamp;
};

// Arrivals and waits. `peer`: the barrier is another block's.
void arrive(Meeting& meeting, Thread* thread, bool peer, bool release, Scope scope);
void complete(Meeting& meeting, uint32_t slot, uint64_t phase);  // slot: of the mbarrier, 0 for other barriers
void wait(const Meeting& meeting, Thread* thread, bool acquire, Scope scope);
void fence(Thread* thread, Scope scope);
void proxy_fence(Thread* thread);

// mbarrier.init and who may use the result.
void init(MBarrier& barrier, Thread* thread, uint32_t address);
void init_fence(Thread* thread);
void use(const MBarrier& barrier, Thread* thread, uint32_t address, bool needs_fence, const char* what);

// Accesses to [at, at + bytes) of a block's shared memory.
void prepare(Block* block);
void read(Thread* thread, Block* block, uint32_t at, uint32_t bytes, const char* what);
void write(Thread* thread, Block* block, uint32_t at, uint32_t bytes, const char* what);
void load_issued(Thread* thread, Block* block, uint32_t at, uint32_t bytes);
void load_arrived(const MBarrier& barrier, Block* block, uint32_t at, uint32_t bytes);
void store_issued(Thread* thread, uint32_t at, uint32_t bytes);
void stores_committed(Thread* thread);
void stores_waited(Thread* thread, uint32_t pending);
void wgmma_issued(Thread* thread, const std::vector<uint16_t>& kibs, uint64_t number);
void wgmma_waited(Thread* thread, uint64_t until);

}  // namespace hb
}  // namespace emu
