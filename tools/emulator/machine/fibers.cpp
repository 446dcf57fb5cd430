// Fibers: every CUDA thread has a stack of its own and runs until it blocks.
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

Place* place = nullptr;
Thread* current = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
std::vector<uint8_t*> free_stacks;
void* scheduler_stack_pointer;

// System V AMD64: the callee keeps rbx, rbp, r12..r15. x87 and SSE control words are not changed by kernels.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer has to know which stack is in use.
const void* scheduler_bottom;
size_t scheduler_size;
void leaving(void** fake, const void* bottom, size_t size) { __sanitizer_start_switch_fiber(fake, bottom, size); }
void arrived_in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size); }
void arrived_in_scheduler(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
void clean(uint8_t* stack) { __asan_unpoison_memory_region(stack + kGuard, kStack - kGuard); }  // frames that never returned
#else
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void leaving(void**, const void*, size_t) {}
void arrived_in_fiber() {}
void arrived_in_scheduler(void*) {}
void clean(uint8_t*) {}
#endif

void to_scheduler() {
  Thread* const t = current;
  ++stats.switches;
  void* fake = nullptr;
  leaving(&fake, scheduler_bottom, scheduler_size);
  emu_switch(&t->stack_pointer, scheduler_stack_pointer);
  arrived_in_fiber();
}

void entry() {
  arrived_in_fiber();
  const Grid* grid = current->block->grid;
  grid->kernel(grid->parameters.data());
  thread_exit(current);
  stop();
}

uint8_t* new_stack() {
  if (!free_stacks.empty()) {
    uint8_t* const stack = free_stacks.back();
    free_stacks.pop_back();
    clean(stack);
    return stack;
  }
  void* const p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) std::abort();
  return static_cast<uint8_t*>(p);
}

}  // namespace

void prepare_fiber(Thread* t) {
  t->stack = new_stack();
  void** top = reinterpret_cast<void**>(t->stack + kStack - 64);
  *--top = nullptr;  // entry's return address; keeps the stack 16-byte aligned as after a call
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that emu_switch pops
  t->stack_pointer = top;
}

void resume(Thread* t) {
  current = t;
  place = &t->place;
  void* fake = nullptr;
  leaving(&fake, t->stack, kStack);
  emu_switch(&scheduler_stack_pointer, t->stack_pointer);
  arrived_in_scheduler(fake);
  current = nullptr;
}

void release_stack(Thread* t) {
  if (t->stack != nullptr) free_stacks.push_back(t->stack);
  t->stack = nullptr;
}

void stop() {
  current->blocked = true;
  for (;;) to_scheduler();
}

void block_on(const char* what, uint32_t a, uint32_t b) {
  current->blocked = true;
  current->waits_for = what;
  current->wait_argument[0] = a;
  current->wait_argument[1] = b;
  to_scheduler();
}

void make_runnable(Thread* t) {
  t->blocked = false;
  t->warp->runnable |= 1u << t->lane;
  if (!t->warp->listed) {
    t->warp->listed = true;
    run_list.push_back(t->warp);
  }
}

void wake(std::vector<Thread*>& list) {
  for (Thread* t : list) make_runnable(t);
  list.clear();
}

}  // namespace emu
