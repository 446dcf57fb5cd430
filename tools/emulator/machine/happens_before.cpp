// Vector clocks over the emulated machine, as FastTrack has them (Flanagan and Freund, PLDI 2009): an access is kept as an epoch,
// a slot and its time, and is over for a thread whose clock has that time.
#include "happens_before.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emu::hb {

bool on = [] {
  const char* const order = std::getenv("NPT_EMULATE_ORDER");
  return order == nullptr || std::strcmp(order, "0") != 0;
}();

namespace {

// ------------------------------------------------------------------------------------------------ epochs
constexpr int kSlotShift = 32, kWhatShift = 48;  // 32 bits of time, 16 for the slot, 16 for the name of the instruction
std::vector<const char*> names;

uint64_t epoch(uint32_t slot, uint64_t time, const char* what) {
  size_t name = 0;
  while (name < names.size() && names[name] != what) ++name;
  if (name == names.size()) names.push_back(what);
  return uint64_t(name) << kWhatShift | uint64_t(slot) << kSlotShift | time;
}
uint32_t slot_of(uint64_t e) { return uint32_t(e >> kSlotShift) & 0xFFFF; }
uint32_t time_of(uint64_t e) { return uint32_t(e); }

uint32_t new_slot(const Slot& slot) {
  std::vector<Slot>& slots = slot.block->cluster->slots;
  slots.push_back(slot);
  if (slots.size() > 0xFFFF) report("happens-before: a cluster with more than 65,535 slots");
  return uint32_t(slots.size()) - 1;
}
uint64_t now(Thread* t, const char* what) {
  if (t->order.slot == 0) t->order.slot = new_slot({Slot::kThread, t, t->block, 0});
  return epoch(t->order.slot, t->order.now, what);
}

// ------------------------------------------------------------------------------------------------ clocks
void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}
void put(std::vector<uint32_t>& clock, uint32_t slot, uint32_t time) {
  if (slot == 0) return;
  if (clock.size() <= slot) clock.resize(slot + 1);
  clock[slot] = std::max(clock[slot], time);
}
uint32_t at(const std::vector<uint32_t>& clock, uint32_t slot) { return slot < clock.size() ? clock[slot] : 0; }
uint32_t strong(const Thread* t, uint32_t slot) { return t->order.known ? at(t->order.known->strong, slot) : 0; }
uint32_t weak(const Thread* t, uint32_t slot) { return t->order.known ? at(t->order.known->weak, slot) : 0; }

// Threads that met know the same and wait for the same, so most joins have been made before.
Known join(const Known& a, const Known& b, bool with_strong) {
  if (!b || a == b) return a;
  static struct {
    Known a, b, out;
    bool with_strong;
  } cache[64];
  const auto number = [](const Known& k) { return reinterpret_cast<uintptr_t>(k.get()) >> 5; };
  auto& have = cache[(number(a) * 31 + number(b)) % 64];
  if (have.out && have.a == a && have.b == b && have.with_strong == with_strong) return have.out;
  auto sum = std::make_shared<Clock>(a ? *a : Clock{});
  if (with_strong) raise(sum->strong, b->strong);
  raise(sum->weak, b->weak);
  const auto is = [&](const Known& k) { return k && k->strong == sum->strong && k->weak == sum->weak; };
  have = {a, b, is(a) ? a : is(b) ? b : Known(std::move(sum)), with_strong};
  return have.out;
}

void learn(Thread* t, uint32_t slot, uint32_t time) {
  Known& known = t->order.known;
  if (slot == 0 || strong(t, slot) >= time) return;
  static Known from, to;  // the lanes of a warp come one after the other
  static uint32_t last_slot, last_time;
  if (!to || from != known || last_slot != slot || last_time != time) {
    auto more = std::make_shared<Clock>(known ? *known : Clock{});
    put(more->strong, slot, time);
    put(more->weak, slot, time);
    from = known, to = std::move(more), last_slot = slot, last_time = time;
  }
  known = to;
}

// ------------------------------------------------------------------------------------------------ races
struct Later {
  Thread* thread;
  Block* block;
  const char* what;
  bool writes, async;
};

// When the access `e` was over: an ordinary write is there for the async proxy after a fence.proxy.async of its thread. 0: never.
uint32_t end_of(uint64_t e, bool written, const Slot& slot, const Later& later) {
  if (slot.kind != Slot::kThread || !written || !later.async) return time_of(e);
  const auto& fences = slot.thread->order.proxy_fences;
  const auto fence = std::upper_bound(fences.begin(), fences.end(), time_of(e));
  return fence == fences.end() ? 0 : *fence;
}

bool over(uint64_t e, bool written, const Later& later) {
  const uint32_t number = slot_of(e);
  const Slot& slot = later.block->cluster->slots[number];
  const uint32_t end = end_of(e, written, slot, later);
  if (slot.kind == Slot::kThread) return end != 0 && (slot.thread == later.thread || strong(later.thread, number) >= end);
  // What is over and is not read again needs no memory order, only to be over.
  return (later.writes ? weak(later.thread, number) : strong(later.thread, number)) >= end;
}

// Who accessed memory earlier, for error texts.
std::string who(uint64_t e, const Slot& slot) {
  char text[128];
  const unsigned rank = unsigned(slot.block->rank), time = time_of(e);
  const unsigned thread = slot.thread != nullptr ? slot.thread->place.thread.x : 0;
  const auto put = [&](const char* format, auto... values) { std::snprintf(text, sizeof text, format, values...); };
  switch (slot.kind) {
    case Slot::kThread: put("%s of rank %u, thread %u", names[e >> kWhatShift], rank, thread); break;
    case Slot::kStores: put("TMA store of rank %u, thread %u (group %u)", rank, thread, time); break;
    case Slot::kWgmma: put("wgmma %u of rank %u, warp %u", time - 1, rank, thread / 32); break;
    case Slot::kBarrier: put("TMA load of phase %u of the mbarrier at 0x%x of rank %u", time - 1, slot.address, rank); break;
  }
  return text;
}

void race(uint64_t e, bool written, uint32_t address, const Later& later) {
  const uint32_t number = slot_of(e);
  const Slot& slot = later.block->cluster->slots[number];
  const bool there = slot.thread == later.thread || strong(later.thread, number) >= time_of(e);
  const bool seen = weak(later.thread, number) >= time_of(e);
  const char* const why = there  ? "fence.proxy.async comes too late or not at all"
                          : seen ? "what was seen in between is relaxed, or its scope does not reach from one to the other"
                                 : "nothing orders them";
  EMU_FAIL("race: %s of rank %d, thread %u %s 0x%x of rank %d, which %s %s: %s", later.what, later.thread->block->rank,
           later.thread->place.thread.x, later.writes ? "writes" : "reads", address, later.block->rank, who(e, slot).c_str(),
           written ? "wrote" : "read", why);
}

struct Words {
  uint32_t first, last;
};
Words words(const Block* block, uint32_t at, uint32_t bytes) {
  return {(at - block->shared_begin) / 4, (at - block->shared_begin + bytes - 1) / 4};
}

void check(const Later& later, uint32_t at, uint32_t bytes) {
  Block* const block = later.block;
  const Shadow& shadow = block->shadow;
  const Words range = words(block, at, bytes);
  uint64_t wrote = 0, did_read = 0;  // neighbours mostly have the same history
  for (uint32_t i = range.first; i <= range.last; ++i) {
    const uint32_t address = block->shared_begin + 4 * i;
    if (shadow.write[i] != wrote) {
      wrote = shadow.write[i];
      if (wrote != 0 && !over(wrote, true, later)) return race(wrote, true, address, later);
    }
    if (!later.writes) continue;
    if (shadow.read[i] != did_read) {
      did_read = shadow.read[i];
      if (did_read != 0 && !over(did_read, false, later)) return race(did_read, false, address, later);
    }
    if (shadow.more_reads.empty()) continue;
    const auto more = shadow.more_reads.find(i);
    if (more == shadow.more_reads.end()) continue;
    for (uint64_t e : more->second) {
      if (!over(e, false, later)) return race(e, false, address, later);
    }
  }
  if (!later.writes) return;
  const size_t warps = block->warps.size();
  Own& own = later.thread->order;
  for (uint32_t kib = at / 1024; kib <= (at + bytes - 1) / 1024; ++kib) {
    if (own.checked_kib == (uint32_t(block->rank) << 16 | kib) && own.checked_stamp == shadow.wgmma_stamp[kib]) continue;
    for (size_t w = 0; w < warps; ++w) {
      const uint32_t number = shadow.wgmma[kib * warps + w];
      if (number == 0) continue;
      const uint64_t e = epoch(block->warps[w]->wgmma_slot, number, "wgmma");
      if (!over(e, false, later)) return race(e, false, kib * 1024, later);
    }
    own.checked_kib = uint32_t(block->rank) << 16 | kib, own.checked_stamp = shadow.wgmma_stamp[kib];
  }
}

void note_read(const Later& later, uint32_t at, uint32_t bytes, uint64_t e) {
  Shadow& shadow = later.block->shadow;
  const Words range = words(later.block, at, bytes);
  for (uint32_t i = range.first; i <= range.last; ++i) {
    uint64_t& last = shadow.read[i];
    if (last != 0 && slot_of(last) != slot_of(e) && !over(last, false, later)) {  // readers at the same time
      auto& more = shadow.more_reads[i];
      const auto mine = std::find_if(more.begin(), more.end(), [&](uint64_t o) { return slot_of(o) == slot_of(e); });
      if (mine != more.end()) *mine = more.back(), more.pop_back();
      more.push_back(last);
    }
    last = e;
  }
}

void note_write(Block* block, uint32_t at, uint32_t bytes, uint64_t e) {
  Shadow& shadow = block->shadow;
  const Words range = words(block, at, bytes);
  for (uint32_t i = range.first; i <= range.last; ++i) {
    shadow.write[i] = e;
    shadow.read[i] = 0;
    if (!shadow.more_reads.empty()) shadow.more_reads.erase(i);
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ barriers and fences
void arrive(Meeting& meeting, Thread* t, bool peer, bool release, Scope scope) {
  if (!on) return;
  Own& own = t->order;
  const int how = int(peer) | int(release) << 1 | scope << 2;
  const bool again = meeting.last == own.known && meeting.last_how == how && release;
  for (Scope acquires : {kCta, kCluster}) {
    Clock& next = meeting.next[acquires];
    const Moment from = release ? Moment{own.known, own.now} : own.fenced[peer ? kCluster : kCta];
    if (!peer || (scope == kCluster && acquires == kCluster)) {
      if (from.known && !again) raise(next.strong, from.known->strong);
      put(next.strong, own.slot, from.now);
    }
    if (own.known && !again) raise(next.weak, own.known->weak);
    put(next.weak, own.slot, own.now);
  }
  meeting.last = own.known, meeting.last_how = how;
  ++own.now;
}

void complete(Meeting& meeting, uint32_t slot, uint64_t phase) {
  if (!on) return;
  for (Scope acquires : {kCta, kCluster}) {
    Clock& next = meeting.next[acquires];
    put(next.strong, slot, uint32_t(phase));  // complete_tx releases at .cluster
    put(next.weak, slot, uint32_t(phase));
    meeting.released[acquires] = std::make_shared<Clock>(std::move(next));
    next = {};
  }
  meeting.last_how = -1;
}

void wait(const Meeting& meeting, Thread* t, bool acquire, Scope scope) {
  if (!on) return;
  Own& own = t->order;
  own.known = join(own.known, meeting.released[scope], acquire);
  if (acquire) return;
  for (Scope s : {kCta, kCluster}) own.observed[s] = join(own.observed[s], meeting.released[s], true);
}

void fence(Thread* t, Scope scope) {
  if (!on) return;
  Own& own = t->order;
  own.known = join(own.known, own.observed[scope], true);
  for (int s = kCta; s <= scope; ++s) own.fenced[s] = {own.known, own.now};
  ++own.now;
}

void proxy_fence(Thread* t) {
  if (on) t->order.proxy_fences.push_back(++t->order.now);
}

// ------------------------------------------------------------------------------------------------ mbarrier.init
void init(MBarrier& barrier, Thread* t, uint32_t address) {
  if (!on) return;
  barrier.inited = time_of(now(t, "mbarrier.init"));
  barrier.slot = new_slot({Slot::kBarrier, nullptr, t->block, address});
}

void init_fence(Thread* t) {
  if (!on) return;
  ++t->order.now;
  for (auto& [address, barrier] : t->block->barriers) {
    if (barrier.owner == t && barrier.init_fenced == 0) barrier.init_fenced = t->order.now;
  }
}

// The fence hands the initialisation on with any arrival, a relaxed one too: that is what it is for.
void use(const MBarrier& barrier, Thread* t, uint32_t address, bool needs_fence, const char* what) {
  if (!on || t == barrier.owner) return;
  const uint32_t slot = barrier.owner->order.slot;
  if (barrier.init_fenced != 0 && weak(t, slot) >= barrier.init_fenced) return;
  if (!needs_fence && strong(t, slot) >= barrier.inited) return;
  EMU_FAIL("race: %s of rank %d, thread %u uses the mbarrier at 0x%x of rank %d, which mbarrier.init of thread %u made: %s", what,
           t->block->rank, t->place.thread.x, address, barrier.owner->block->rank, barrier.owner->place.thread.x,
           strong(t, slot) >= barrier.inited ? "fence.mbarrier_init comes too late" : "nothing orders them");
}

// ------------------------------------------------------------------------------------------------ accesses
void prepare(Block* block) {
  if (!on) return;
  Shadow& shadow = block->shadow;
  shadow.write.assign((block->shared_end - block->shared_begin + 3) / 4, 0);
  shadow.read = shadow.write;
  shadow.wgmma.assign(kSharedWindow / 1024 * (block->grid->threads.x / 32), 0);
  shadow.wgmma_stamp.assign(kSharedWindow / 1024, 0);
}

void read(Thread* t, Block* block, uint32_t at, uint32_t bytes, const char* what) {
  if (!on) return;
  const Later later{t, block, what, false, false};
  check(later, at, bytes);
  note_read(later, at, bytes, now(t, what));
}

void write(Thread* t, Block* block, uint32_t at, uint32_t bytes, const char* what) {
  if (!on) return;
  check({t, block, what, true, false}, at, bytes);
  note_write(block, at, bytes, now(t, what));
}

void load_issued(Thread* t, Block* block, uint32_t at, uint32_t bytes) {
  if (on) check({t, block, "TMA load", true, true}, at, bytes);
}

void load_arrived(const MBarrier& barrier, Block* block, uint32_t at, uint32_t bytes) {
  if (on) note_write(block, at, bytes, epoch(barrier.slot, barrier.phase + 1, "TMA load"));
}

void store_issued(Thread* t, uint32_t at, uint32_t bytes) {
  if (!on) return;
  Own& own = t->order;
  if (own.stores == 0) own.stores = new_slot({Slot::kStores, t, t->block, 0});
  const Later later{t, t->block, "TMA store", false, true};
  check(later, at, bytes);
  note_read(later, at, bytes, epoch(own.stores, own.groups + 1, "TMA store"));
}

void stores_committed(Thread* t) { ++t->order.groups; }

void stores_waited(Thread* t, uint32_t pending) {
  const Own& own = t->order;
  if (on && own.groups > pending) learn(t, own.stores, own.groups - pending);
}

// By KiB, and for the first lane that comes: what it may read the other lanes may.
void wgmma_issued(Thread* t, const std::vector<uint16_t>& kibs, uint64_t number) {
  if (!on) return;
  Warp* const warp = t->warp;
  Block* const block = t->block;
  if (warp->wgmma_slot == 0) {
    warp->wgmma_slot = new_slot({Slot::kWgmma, t, block, 0});
    warp->checked.assign(kSharedWindow / 1024, ~0u);
  }
  for (const uint16_t kib : kibs) {
    const uint32_t from = std::max(kib * 1024u, block->shared_begin), until = std::min(kib * 1024u + 1024, block->shared_end);
    if (from < until && warp->checked[kib] != block->version[kib]) check({t, block, "wgmma", false, true}, from, until - from);
    warp->checked[kib] = block->version[kib];
    block->shadow.wgmma[kib * block->warps.size() + size_t(warp->index)] = uint32_t(number) + 1;
    ++block->shadow.wgmma_stamp[kib];
  }
}

void wgmma_waited(Thread* t, uint64_t until) {
  if (on) learn(t, t->warp->wgmma_slot, uint32_t(until));
}

}  // namespace emu::hb
