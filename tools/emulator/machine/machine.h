// The state of the emulated machine, and what its parts offer each other. One OS thread; every CUDA thread is a fiber.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "happens_before.h"
#undef threadIdx
#undef blockIdx
#undef gridDim
#undef blockDim

namespace emu {

constexpr uint32_t kSharedWindow = 256 * 1024;  // addresses of one block's shared memory
constexpr uint32_t kPoison = 0x7FC0DEADu;       // a NaN: what registers hold while wgmma owns them
constexpr uint32_t kMaxTransaction = (1u << 20) - 1;

struct Block;
struct Cluster;
struct Grid;
struct Warp;
struct Thread;

// ------------------------------------------------------------------------------------------------ asynchronous work
// A tensor map as the emulated driver writes it into the 128 bytes of a CUtensorMap.
struct TensorMap {
  uint64_t magic;
  uint8_t* base;
  uint64_t size[2], pitch;  // elements; bytes from row to row
  uint32_t box[2];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct StoreGroup {  // bulk stores of one commit_group: how many still have to read shared memory, to write global memory
  int reads = 0, writes = 0;
};
struct Load {  // some rows of a TMA load, which arrive together
  Block* block;
  uint32_t to, bar;
  TensorMap map;
  int x, y, first_row, last_row;
};
struct Store {
  Block* block;
  Grid* grid;
  Thread* owner;
  uint32_t from;
  TensorMap map;
  int x, y;
  std::shared_ptr<StoreGroup> group;
  std::vector<uint16_t> data;  // once read
};
struct Accumulators {  // 16 x N of one warp, between the first wgmma on them and the wait that covers the last
  float value[16][256];
  int lanes = 0;
};
struct Wgmma {
  int n, trans_a, trans_b, lanes = 0;
  bool bf16, scale_d;
  uint64_t a, b;
  Accumulators* d;
  std::vector<uint16_t> reads;  // KiB of shared memory

  bool same(const Wgmma& o) const {
    return n == o.n && a == o.a && b == o.b && bf16 == o.bf16 && scale_d == o.scale_d && trans_a == o.trans_a &&
           trans_b == o.trans_b;
  }
};

// ------------------------------------------------------------------------------------------------ the hierarchy
struct InFlight {  // accumulators of this thread that wgmma owns
  Accumulators* d;
  float* registers;
  int n;
  uint64_t last;  // number of the last wgmma on them
};

struct Thread {
  Place place;
  Block* block;
  Warp* warp;
  int lane;
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  bool done = false, blocked = false;
  const char* waits_for = "";
  uint32_t wait_argument[2] = {0, 0};
  // bulk stores
  std::shared_ptr<StoreGroup> open_group;
  std::deque<std::shared_ptr<StoreGroup>> groups;
  // wgmma
  uint64_t issued = 0;
  bool fenced = false;  // a wgmma.fence since registers of wgmma were the program's
  std::deque<uint64_t> group_ends;            // of commit groups not known to be complete
  std::vector<InFlight> in_flight;
  // ordinary shared-memory writes (16-byte units) that no proxy fence of this thread covers yet
  std::vector<uint32_t> unfenced;
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
  hb::Own order;
};

struct Warp {
  Block* block;
  int index;
  std::vector<Thread*> threads;
  uint32_t runnable = 0;  // lanes
  bool listed = false;    // in run_list
  double priority = 0;
  // the warp-wide instruction whose lanes are gathering
  int gathering = 0, gathered = 0;
  uint32_t in[32][5], out[32][4];
  std::vector<Thread*> waiting;
  // wgmma: operations first..first+size; those below `executed` have run
  std::deque<Wgmma> operations;
  uint64_t first = 0, executed = 0;
  std::vector<Thread*> wgmma_waiting;
  uint32_t wgmma_slot = 0;
  std::vector<uint32_t> checked;  // per KiB: the version that this warp was found to come after
};

struct MBarrier {
  uint32_t count, pending;
  int64_t bytes;
  uint64_t phase;
  bool fenced;  // by fence.mbarrier_init: peers and the async proxy may use it
  Thread* owner;
  std::vector<Thread*> waiting;
  hb::Meeting meeting;
  uint32_t slot, inited, init_fenced;  // its own slot; times of the owner
};
struct NamedBarrier {
  uint32_t expected = 0;
  std::vector<Thread*> arrived;
};
struct DecodedB;  // a B operand as floats (wgmma.cpp)

struct Block {
  Cluster* cluster;
  Grid* grid;
  int rank;
  uint3 index;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  int live;
  bool triggered = false;
  // Shared memory, and what is under way in it: per 16 bytes, except wgmma's reads and the version, per KiB.
  std::vector<uint8_t> shared;
  uint32_t shared_begin = 0, shared_end = 0;
  std::vector<uint16_t> loading, storing, unfenced;
  std::vector<uint8_t> is_barrier;
  std::vector<uint16_t> wgmma_reading;
  std::vector<uint32_t> version;
  hb::Shadow shadow;
  int pending_loads = 0, pending_store_reads = 0;
  std::map<uint32_t, MBarrier> barriers;
  NamedBarrier named[16];
  std::unordered_map<const void*, std::vector<uint8_t>> statics;
  std::vector<std::vector<Wgmma>> warpgroup_log;  // what each warpgroup has issued: its four warps must agree
  std::vector<DecodedB> decoded;
  std::map<int, int> registers;  // warp → setmaxnreg

  Block();
  ~Block();
};
struct Cluster {
  Grid* grid;
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t phase = 0;
  int arrived = 0, live = 0;
  std::vector<Thread*> waiting;
  std::vector<hb::Slot> slots{1};  // 0 is none
  hb::Meeting meeting;
};
struct alignas(64) ParameterLine {  // tensor maps inside parameters start at multiples of 64
  uint8_t bytes[64];
};
struct Grid {
  void (*kernel)(const void*);
  std::vector<ParameterLine> parameters;
  dim3 size, threads;
  int cluster_size = 1, dynamic_smem = 0;
  bool overlaps = false;  // may start when every block of `before` has triggered or left
  std::vector<int> to_start;  // clusters
  std::vector<std::unique_ptr<Cluster>> active;
  int unfinished = 0, untriggered = 0, pending_writes = 0;
  bool done = false;
  Grid* before = nullptr;
  std::vector<Thread*> dependents;
};

// ------------------------------------------------------------------------------------------------ the running machine
extern std::deque<std::unique_ptr<Grid>> grids;
extern std::vector<Warp*> run_list, wgmma_ready;
extern std::vector<Load> loads;
extern std::vector<Store> store_reads, store_writes;
extern Thread* current;  // null: the scheduler or the host
extern std::string error;

struct Stats {
  uint64_t launches, threads, switches, wgmma, tma_loads, tma_stores, phases, overlapped;
};
extern Stats stats;

// error.cpp: the first error is the one that matters; the launch fails with it.
[[gnu::format(printf, 1, 2)]] void report(const char* format, ...);
[[noreturn]] void stop();  // a fiber that has met an error never comes back
#define EMU_FAIL(...)                     \
  do {                                    \
    ::emu::report(__VA_ARGS__);           \
    if (::emu::current != nullptr) ::emu::stop(); \
    return;                               \
  } while (0)
void report_deadlock();

// fibers.cpp
void prepare_fiber(Thread* thread);
void resume(Thread* thread);  // from the scheduler; returns when it blocks or ends
void release_stack(Thread* thread);
void block_on(const char* what, uint32_t a = 0, uint32_t b = 0);
void make_runnable(Thread* thread);
void wake(std::vector<Thread*>& list);

// scheduler.cpp
uint32_t random_below(uint32_t n);
double random_unit();
enum Mode { kEarliest = 0, kLatest = 1, kDrawn = 2 };
struct Settings {
  uint64_t seed = 0;
  Mode mode = kDrawn;
  bool deferred = false;
};
extern Settings settings;
struct Schedule {  // drawn once a launch
  double load_rate, read_rate, write_rate, wgmma_rate;
  int warp_policy, max_clusters, shared_shift, kind_order[4];
  bool starve;             // some kinds of events happen only when nothing else can
  bool wgmma_needs_group;  // a wgmma runs only when all four warps have issued it
};
extern Schedule schedule;
void draw_schedule(uint64_t launch);
void run(uint64_t steps);

// blocks.cpp
void start_cluster(Grid* grid, int index);
void thread_exit(Thread* thread);
void finish_grid(Grid* grid);
void collect(Grid* grid);

// barriers.cpp
MBarrier* barrier_at(Block* block, uint32_t address, const char* what);
void complete_bytes(MBarrier& barrier, uint32_t address, uint32_t bytes);
void check_cluster_barrier(Cluster* cluster);

// shared_memory.cpp
Block* block_of(uint32_t address, const char* what);
void check_range(Block* block, uint32_t at, uint32_t bytes, const char* what);
void ordinary_write(uint32_t at, const void* data, uint32_t bytes, const char* what, Thread* writer);
void ordinary_read(Block* block, uint32_t at, void* data, uint32_t bytes, const char* what, Thread* reader);
// CuTe's Swizzle<bits, 4, 3> of a byte address: its bits 7.. XORed into 4..
inline uint32_t swizzle(int bits, uint32_t address) { return address ^ ((address & (((1u << bits) - 1) << 7)) >> 3); }

// warp.cpp: the last of 32 lanes runs `finish`, then all go on.
enum Gathering { kShuffle = 1, kStMatrix, kLdMatrix, kWgmmaWait };
void gather(Gathering kind, void (*finish)(Warp*));

// tma.cpp
constexpr uint64_t kMapMagic = 0x544D415045414D55ull;
void do_load(const Load& load);
void do_store_read(Store store);
void do_store_write(const Store& store);

// wgmma.cpp
void execute_wgmma(Warp* warp);
void list_if_ready(Warp* warp);

}  // namespace emu
