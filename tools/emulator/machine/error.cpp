// Errors: the first one with its place, and the list of who waits for what in a deadlock.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emu {

std::string error;

namespace {

[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string waiting_line(const Block& b, const Thread& t) {
  const std::string who = text("block (%u,%u,%u) warp %d: ", b.index.x, b.index.y, b.index.z, t.warp->index);
  const uint32_t first = t.wait_argument[0], second = t.wait_argument[1];
  if (std::strcmp(t.waits_for, "mbarrier") != 0) return who + text("%s %u %u", t.waits_for, first, second);
  const auto found = b.barriers.find(first);
  if (found == b.barriers.end()) return who + "mbarrier";
  const MBarrier& m = found->second;
  return who + text("mbarrier at +0x%x for parity %u; it is in phase %llu with %u of %u arrivals and %lld bytes missing",
                    first - b.shared_begin, second, static_cast<unsigned long long>(m.phase), m.pending, m.count,
                    static_cast<long long>(m.bytes));
}

}  // namespace

void report(const char* format, ...) {
  if (!error.empty()) return;
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  error = buffer;
  if (current == nullptr) return;
  const Place& at = current->place;
  error += text(" [block (%u,%u,%u) rank %d, thread %u]", at.block.x, at.block.y, at.block.z, current->block->rank, at.thread.x);
}

void report_deadlock() {
  std::map<std::string, int> lines;
  std::string states;
  for (const auto& grid : grids) {
    for (const auto& cluster : grid->active) {
      for (const auto& block : cluster->blocks) {
        for (const auto& thread : block->threads) {
          if (!thread->done) ++lines[waiting_line(*block, *thread)];
        }
      }
    }
    states += text("\n  grid of %u x %u: clusters not started %zu, active %zu, blocks unfinished %d, stores to write %d",
                   grid->size.x, grid->size.y, grid->to_start.size(), grid->active.size(), grid->unfinished,
                   grid->pending_writes);
  }
  error = "deadlock:";
  constexpr int kShown = 40;
  int shown = 0;
  for (const auto& [line, threads] : lines) {
    if (++shown > kShown) break;
    error += "\n  " + line + " (" + std::to_string(threads) + " threads)";
  }
  if (int(lines.size()) > kShown) error += "\n  and " + std::to_string(int(lines.size()) - kShown) + " more";
  error += states;
}

}  // namespace emu
