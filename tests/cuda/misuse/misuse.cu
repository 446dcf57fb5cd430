// One small kernel for each rule that the emulator enforces, broken on purpose; tests/cuda/test_emulator.py names the errors.
// Written in asm as csrc/ is, so the translator is under test too.
#include "misuse.h"

#include <cstring>

#define DEVICE __device__ __forceinline__

DEVICE void init(uint32_t bar, uint32_t count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
DEVICE void init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar)); }
DEVICE void arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
      "r"(rank));
}
DEVICE void arrive_relaxed(uint32_t bar) { asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" ::"r"(bar)); }
DEVICE void arrive_for_cluster(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
      "r"(rank));
}
DEVICE void expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes));
}
DEVICE void wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(bar),
      "r"(parity));
}
DEVICE void wait_relaxed(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bar),
      "r"(parity));
}
DEVICE void wait_for_cluster(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bar),
      "r"(parity));
}
DEVICE void fence_block() { asm volatile("fence.acq_rel.cta;"); }
DEVICE void fence_cluster() { asm volatile("fence.acq_rel.cluster;"); }
DEVICE void load(uint32_t to, const CUtensorMap& map, uint32_t bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(bar), "r"(x), "r"(y));
}
DEVICE void store(const CUtensorMap& map, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(reinterpret_cast<uint64_t>(&map)),
               "r"(from), "r"(0), "r"(0));
}
DEVICE void commit() { asm volatile("cp.async.bulk.commit_group;"); }
DEVICE void write(uint32_t at) { asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(1.0f), "f"(2.0f)); }
DEVICE float read_of(uint32_t at, uint32_t rank) {
  float x, y;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %2, %3;\nld.shared::cluster.v2.f32 {%0, %1}, [there];\n}"
      : "=f"(x), "=f"(y)
      : "r"(at), "r"(rank));
  return x + y;
}
DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;"); }
DEVICE void barrier(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads)); }
DEVICE uint32_t rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void cluster_meet() { asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;"); }
DEVICE void cluster_meet_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;"); }
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;"); }
DEVICE void wgmma_finish() { asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"); }
// K-major, 128-byte swizzle, 1024 bytes from one group of 8 rows to the next.
DEVICE uint64_t descriptor(uint32_t at) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at >> 4); }
DEVICE void multiply_8(float* d, uint32_t a, uint32_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(descriptor(a)), "l"(descriptor(b)));
}
DEVICE void multiply_16(float* d, uint32_t a, uint32_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
               : "l"(descriptor(a)), "l"(descriptor(b)));
}

// Races, and what looks like them. Two threads, or the first ones of two blocks; the second reads or writes what the first had.
DEVICE void race(const Params& p, uint32_t tile, uint32_t bar) {
  const auto is = [&](const char* name) { return std::strcmp(kRules[p.rule].name, name) == 0; };
  const bool first = threadIdx.x == 0, second = threadIdx.x == 32;
  const uint32_t block = rank(), peer = block ^ 1;
  const auto take = [&](uint32_t from) { p.out[0] = uint16_t(read_of(tile, from)); };
  const auto make_barrier = [&](uint32_t count) {
    if (first) {
      init(bar, count);
      init_fence();
    }
    barrier(0, blockDim.x);
  };
  const auto hand_over = [&](auto signal, auto await) {  // inside of a block
    make_barrier(1);
    if (first) {
      write(tile);
      signal(bar);
    }
    if (second) {
      await(bar, 0);
      take(0);
    }
  };
  const auto hand_to_peer = [&](auto signal, auto await) {  // from block 1 to block 0
    make_barrier(1);
    cluster_meet();
    if (first && block == 1) {
      write(tile);
      signal(bar, 0);
    }
    if (first && block == 0) {
      await(bar, 0);
      take(1);
    }
    cluster_meet();
  };
  const auto linger = [] {
    for (int i = 0; i < 50; ++i) barrier(1, 32);
  };
  const auto load_tile = [&] {
    expect(bar, 8192);
    load(tile, p.map, bar, 0, 0);
  };
  const auto fenced_arrival = [](uint32_t b) {
    fence_block();
    arrive_relaxed(b);
  };
  const auto fenced_wait = [](uint32_t b, uint32_t parity) {
    wait_relaxed(b, parity);
    fence_block();
  };
  if (is("no barrier")) {
    if (first) write(tile);
    if (second) take(0);
  } else if (is("lanes of a warp")) {
    if (first) write(tile);
    __shfl_sync(0xFFFFFFFFu, 0, 0);
    if (threadIdx.x == 1) take(0);
  } else if (is("ordered: barrier of a warp")) {
    if (first) write(tile);
    barrier(1, 32);
    if (threadIdx.x == 1) take(0);
  } else if (is("relaxed arrival")) {
    hand_over(arrive_relaxed, wait);
  } else if (is("ordered: relaxed with fences")) {
    hand_over(fenced_arrival, fenced_wait);
  } else if (is("relaxed wait")) {
    make_barrier(1);
    if (first) load_tile();
    if (second) {
      wait_relaxed(bar, 0);
      take(0);
    }
  } else if (is("no wait for a load")) {
    make_barrier(1);
    if (first) load_tile();
    barrier(0, 64);
    if (second) take(0);
    if (first) wait(bar, 0);
  } else if (is("proxy fence after the barrier")) {
    if (second) write(tile);
    barrier(0, 64);
    if (second) proxy_fence();
    if (!first) return;
    store(p.map, tile);
    commit();
    asm volatile("cp.async.bulk.wait_group 0;");
  } else if (is("written before wgmma is waited for")) {
    float acc[8] = {};
    if (threadIdx.x >= 128) {
      barrier(0, 160);
      linger();
      return write(tile + 8 * (threadIdx.x - 128));
    }
    wgmma_fence();
    multiply_8(acc, tile, tile);
    barrier(0, 160);
    wgmma_finish();
  } else if (is("written before a store is waited for")) {
    if (first) {
      store(p.map, tile);
      commit();
    }
    barrier(0, 64);
    if (second) write(tile);
    if (first) asm volatile("cp.async.bulk.wait_group 0;");
  } else if (is("barrier used before a meeting")) {
    if (first) init(bar, 2);
    if (second) arrive(bar);
  } else if (is("init fence after the meeting")) {
    if (first) init(bar, 1);
    cluster_meet();
    if (first) init_fence();
    linger();
    if (first) arrive_at(bar, peer);
    cluster_meet();
  } else if (is("ordered: init fence and relaxed meeting")) {
    if (first) {
      init(bar, 1);
      init_fence();
    }
    cluster_meet_relaxed();
    if (first) arrive_at(bar, peer);
    cluster_meet();
  } else if (is("cluster met without release") || is("fence of one block") || is("ordered: fence of the cluster")) {
    if (first) write(tile);
    if (is("fence of one block")) fence_block();
    if (is("ordered: fence of the cluster")) fence_cluster();
    cluster_meet_relaxed();
    if (first) take(peer);
    cluster_meet();
  } else if (is("peer reads, no release")) {
    write(tile + 8 * threadIdx.x);
    cluster_meet();
    if (first && block == 0) take(1);
    cluster_meet_relaxed();
    if (first) write(tile);
    cluster_meet();
  } else if (is("remote arrival of scope cta")) {
    hand_to_peer(arrive_at, wait_for_cluster);
  } else if (is("remote wait of scope cta")) {
    hand_to_peer(arrive_for_cluster, wait);
  } else if (is("ordered: remote arrival of scope cluster")) {
    hand_to_peer(arrive_for_cluster, wait_for_cluster);
  }
}

__global__ void __launch_bounds__(288, 1) misuse(const __grid_constant__ Params p) {
  extern __shared__ uint8_t raw[];
  const uint32_t tile = (uint32_t(__cvta_generic_to_shared(raw)) + 1023u) & ~1023u, bar = tile + 8192;
  const bool first = threadIdx.x == 0;
  float acc[8] = {};
  const auto is = [&](const char* name) { return std::strcmp(kRules[p.rule].name, name) == 0; };
  if (p.rule >= kFirstRace) return race(p, tile, bar);
  const auto start_load = [&](int x) {
    init(bar, 1);
    init_fence();
    expect(bar, 8192);
    load(tile, p.map, bar, x, 0);
  };
  if (is("none")) {
    if (!first) return;
    start_load(0);
    wait(bar, 0);
    store(p.map, tile);
    commit();
    asm volatile("cp.async.bulk.wait_group 0;");
  } else if (is("one arrival too many") && first) {
    init(bar, 1);
    expect(bar, 16);
    arrive(bar);
  } else if (is("barrier never initialised") && first) {
    wait(bar, 0);
  } else if (is("nobody arrives") && first) {
    init(bar, 1);
    wait(bar, 0);
  } else if (is("beyond shared memory") && first) {
    write(tile + (1 << 16));
  } else if (is("store without proxy fence") && first) {
    write(tile);
    store(p.map, tile);
  } else if (is("load on an unfenced barrier") && first) {
    init(bar, 1);
    load(tile, p.map, bar, 0, 0);
  } else if (is("coordinate beyond 31 bits") && first) {
    start_load(INT32_MAX / 2);
  } else if (is("leaves with a load in flight") && first) {
    start_load(0);
  } else if (is("reads what a load will write") && first) {
    start_load(0);
    p.out[0] = uint16_t(read_of(tile, 0));
    wait(bar, 0);
  } else if (is("writes what a store has to read") && first) {
    store(p.map, tile);
    commit();
    write(tile);
  } else if (is("leaves with an open group") && first) {
    store(p.map, tile);
    asm volatile("cp.async.bulk.wait_group.read 0;");
  } else if (is("wgmma without fence")) {
    multiply_8(acc, tile, tile);
    wgmma_finish();
  } else if (is("another shape in flight")) {
    wgmma_fence();
    multiply_16(acc, tile, tile);
    wgmma_fence();
    multiply_8(acc, tile, tile);
    wgmma_finish();
  } else if (is("warps disagree")) {
    wgmma_fence();
    multiply_8(acc, tile + (threadIdx.x < 64 ? 0 : 32), tile);
    wgmma_finish();
  } else if (is("wgmma without proxy fence")) {
    write(tile + 8 * threadIdx.x);
    barrier(0, 128);
    wgmma_fence();
    multiply_8(acc, tile, tile);
    wgmma_finish();
  } else if (is("leaves with wgmma in flight")) {
    wgmma_fence();
    multiply_8(acc, tile, tile);
  } else if (is("counts disagree")) {
    barrier(1, threadIdx.x < 64 ? 128 : 64);
  } else if (is("lanes apart")) {
    if (threadIdx.x < 16) {
      acc[0] = __shfl_sync(0xFFFFFFFFu, acc[1], 0);
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %1, %1, %1};" ::"r"(tile), "r"(0));
    }
  } else if (is("too many registers")) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(256));
    barrier(0, 288);
  } else if (is("reads a block that has left") && first) {
    if (rank() == 1) return;
    init(bar, 1);
    for (int i = 0; i < 4; ++i) p.out[0] = uint16_t(read_of(tile, 1));
    wait(bar, 0);
  } else if (is("arrives at a block that has left") && first) {
    init(bar, 8);
    init_fence();
    if (rank() == 1) return;
    arrive_at(bar, 1);
    wait(bar, 0);
  } else if (is("accumulators read early")) {
    wgmma_fence();
    multiply_8(acc, tile, tile);
    uint32_t bits;
    std::memcpy(&bits, &acc[0], 4);
    p.out[threadIdx.x] = uint16_t(bits >> 16);  // bf16
    wgmma_finish();
  }
}

// Two kernels of a stream that overlap: the first reads data late, the second writes it, with or without waiting.
__global__ void __launch_bounds__(32) slow_reader(const __grid_constant__ Params p) {
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < 2000; ++i) barrier(0, 32);
  p.out[threadIdx.x] = p.data[threadIdx.x];
}
__global__ void __launch_bounds__(32) writer(const __grid_constant__ Params p) {
  if (p.rule == 1) asm volatile("griddepcontrol.wait;");
  p.data[threadIdx.x] = 7;
}

const void* misuse_kernel() { return reinterpret_cast<const void*>(&misuse); }
const void* slow_reader_kernel() { return reinterpret_cast<const void*>(&slow_reader); }
const void* writer_kernel() { return reinterpret_cast<const void*>(&writer); }
