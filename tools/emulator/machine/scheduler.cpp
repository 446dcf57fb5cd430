// Which warp runs next, and when asynchronous work happens: drawn from a seed, between "at once" and "as late as is legal".
#include <algorithm>
#include <cstdlib>

#include "machine.h"

namespace emu {

std::deque<std::unique_ptr<Grid>> grids;
std::vector<Warp*> run_list, wgmma_ready;
std::vector<Load> loads;
std::vector<Store> store_reads, store_writes;
Settings settings = [] {
  const char* const seed = std::getenv("NPT_EMULATE_SEED");
  Settings s;
  s.seed = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 0);
  return s;
}();
Schedule schedule;
Stats stats;

// ------------------------------------------------------------------------------------------------ random numbers
namespace {
uint64_t random_state = 1;

uint64_t random64() {  // splitmix64
  uint64_t z = (random_state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
}  // namespace

uint32_t random_below(uint32_t n) { return uint32_t((random64() >> 32) * n >> 32); }
double random_unit() { return double(random64() >> 11) * 0x1p-53; }

void draw_schedule(uint64_t launch) {
  // One launch at a time depends on the seed alone, so a failure is repeated by its seed; overlapping ones differ from each other.
  random_state = settings.seed * 0x9E3779B97F4A7C15ull + (settings.deferred ? launch * 0xD1342543DE82EF95ull : 0) + 12345;
  static constexpr double kRates[] = {0, 0.02, 0.3, 1};
  double* const rates[] = {&schedule.load_rate, &schedule.read_rate, &schedule.write_rate, &schedule.wgmma_rate};
  for (double* rate : rates) {
    const double drawn = kRates[random_below(4)];
    *rate = settings.mode == kEarliest ? 1 : settings.mode == kLatest ? 0 : drawn;
  }
  schedule.warp_policy = int(random_below(4));
  schedule.wgmma_needs_group = random_below(2) != 0;
  schedule.starve = random_below(2) != 0 || settings.mode == kLatest;
  for (int i = 0; i < 4; ++i) schedule.kind_order[i] = (i + 3) % 4;  // wgmma, loads, store reads, store writes
  if (settings.mode != kLatest) {
    for (int i = 3; i > 0; --i) std::swap(schedule.kind_order[i], schedule.kind_order[random_below(uint32_t(i + 1))]);
  }
  const int shift = int(random_below(64)) * 16;  // where a block's shared memory starts: CUDA promises 16 bytes only
  schedule.shared_shift = random_below(2) ? 0 : shift;
  // Few clusters at a time: they are independent, and state is large. Overlapping grids need them all.
  schedule.max_clusters = settings.deferred ? 1 << 20 : 1 + int(random_below(4) == 0);
}

// ------------------------------------------------------------------------------------------------ events
namespace {

template <class E>
E take(std::vector<E>& from) {
  const size_t i = random_below(uint32_t(from.size()));
  E event = std::move(from[i]);
  if (i + 1 < from.size()) from[i] = std::move(from.back());
  from.pop_back();
  return event;
}

enum EventKind { kLoad, kStoreRead, kStoreWrite, kWgmma };

void do_event(int kind) {
  switch (kind) {
    case kLoad: return do_load(take(loads));
    case kStoreRead: return do_store_read(take(store_reads));
    case kStoreWrite: return do_store_write(take(store_writes));
    default:
      Warp* const warp = take(wgmma_ready);
      execute_wgmma(warp);
      list_if_ready(warp);
  }
}

void draw_events() {
  const size_t waiting[] = {loads.size(), store_reads.size(), store_writes.size(), wgmma_ready.size()};
  const double rates[] = {schedule.load_rate, schedule.read_rate, schedule.write_rate, schedule.wgmma_rate};
  for (int kind = 0; kind < 4; ++kind) {
    if (waiting[kind] > 0 && (rates[kind] >= 1 || random_unit() < rates[kind])) do_event(kind);
  }
}

// When no thread can run, something asynchronous has to happen. False: nothing is under way.
bool force_event() {
  const size_t waiting[] = {loads.size(), store_reads.size(), store_writes.size(), wgmma_ready.size()};
  int possible[4], count = 0;
  for (int kind : schedule.kind_order) {
    if (waiting[kind] > 0) possible[count++] = kind;
  }
  if (count == 0) return false;
  do_event(schedule.starve ? possible[0] : possible[random_below(uint32_t(count))]);
  return true;
}

// ------------------------------------------------------------------------------------------------ warps
size_t pick_warp() {
  const uint32_t n = uint32_t(run_list.size());
  switch (n == 1 ? 1 : schedule.warp_policy) {
    case 1: return 0;
    case 2: {  // some warps are slow
      size_t best = random_below(n);
      for (int i = 0; i < 4; ++i) {
        const size_t other = random_below(n);
        if (run_list[other]->priority > run_list[best]->priority) best = other;
      }
      return best;
    }
    case 3: return n - 1;  // who was woken last
    default: return random_below(n);
  }
}

void run_warp(Warp* warp) {
  const uint32_t lanes = warp->runnable;
  const int start = random_below(4) == 0 ? int(random_below(32)) : 0;
  for (int i = 0; i < 32 && error.empty(); ++i) {
    const int lane = (i + start) & 31;
    if (!(lanes >> lane & 1)) continue;
    warp->runnable &= ~(1u << lane);
    resume(warp->threads[size_t(lane)]);
  }
  if (warp->runnable == 0) {
    *std::find(run_list.begin(), run_list.end(), warp) = run_list.back();
    run_list.pop_back();
    warp->listed = false;
  }
}

// ------------------------------------------------------------------------------------------------ grids
void start_what_may() {
  for (const auto& p : grids) {
    Grid* const grid = p.get();
    if (grid->done) continue;
    collect(grid);
    const Grid* const before = grid->before;
    if (before != nullptr && !before->done && !(grid->overlaps && before->untriggered == 0)) return;
    while (!grid->to_start.empty() && int(grid->active.size()) < schedule.max_clusters) {
      if (before != nullptr && !before->done) ++stats.overlapped;
      std::swap(grid->to_start[random_below(uint32_t(grid->to_start.size()))], grid->to_start.back());
      const int index = grid->to_start.back();
      grid->to_start.pop_back();
      start_cluster(grid, index);
    }
  }
  while (!grids.empty() && grids.front()->done && grids.front()->active.empty()) {
    if (grids.size() > 1 && grids[1]->before == grids.front().get()) grids[1]->before = nullptr;
    grids.pop_front();
  }
}

bool all_done() {
  return std::all_of(grids.begin(), grids.end(), [](const auto& grid) { return grid->done; });
}

void abandon() {  // after an error
  run_list.clear();
  wgmma_ready.clear();
  loads.clear();
  store_reads.clear();
  store_writes.clear();
  for (const auto& grid : grids) {
    for (const auto& cluster : grid->active) {
      for (const auto& block : cluster->blocks) {
        for (const auto& thread : block->threads) release_stack(thread.get());
      }
    }
  }
  grids.clear();
}

}  // namespace

void run(uint64_t steps) {
  for (uint64_t step = 0; error.empty() && step < steps; ++step) {
    if (step % 16 == 0 || run_list.empty()) {
      start_what_may();
      if (all_done()) break;
    }
    draw_events();
    if (!error.empty()) break;
    if (!run_list.empty()) {
      run_warp(run_list[pick_warp()]);
      continue;
    }
    if (force_event()) continue;
    start_what_may();
    if (all_done()) break;
    if (run_list.empty()) report_deadlock();
  }
  if (!error.empty()) return abandon();
  for (const auto& grid : grids) collect(grid.get());
  start_what_may();
}

}  // namespace emu
