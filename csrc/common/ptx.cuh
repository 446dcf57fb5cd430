// Thin wrappers of the PTX that the kernels use. One instruction each; nothing decides anything here.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "layout.h"

#define NPT_DEVICE __device__ __forceinline__

namespace npt {

NPT_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ------------------------------------------------------------------------------------------------ mbarrier
NPT_DEVICE void barrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised barriers visible to the async proxy and to the cluster.
NPT_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

NPT_DEVICE void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
NPT_DEVICE void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrive at the barrier of the same offset in block `cta` of the cluster. The plain form on purpose: spelling out
// .release.cluster makes ptxas emit MEMBAR.ALL.GPU in the k loop (seen in SASS; tools/check_cuda.py asserts its absence).
// What is handed over are shared-memory reads that wgmma has finished, so no memory ordering beyond that is needed.
NPT_DEVICE void barrier_arrive_cluster(uint32_t bar, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
      "r"(cta)
      : "memory");
}
// Returns when the phase of that parity has completed.
NPT_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// ------------------------------------------------------------------------------------------------ blocks and clusters
NPT_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Index of this thread's warpgroup. Through a shuffle, so that ptxas knows it to be the same in the whole warp and keeps ring
// positions and descriptors in uniform registers.
NPT_DEVICE int warpgroup() { return __shfl_sync(0xFFFFFFFFu, int(threadIdx.x / 128), 0); }
// Not .aligned: the producer's single thread arrives from a divergent branch.
NPT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
NPT_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Two floats at the same shared-memory offset of block `cta` of the cluster.
NPT_DEVICE float2 load_cluster(uint32_t address, uint32_t cta) {
  float2 value;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [remote];\n}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(address), "r"(cta)
      : "memory");
  return value;
}
NPT_DEVICE void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
NPT_DEVICE void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
NPT_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
NPT_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ------------------------------------------------------------------------------------------------ dependent launches
// The next kernel of the stream may start (if it was launched to overlap); without such a launch neither does anything.
NPT_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Until the kernel before this one in the stream has ended and its writes are visible.
NPT_DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------ TMA
NPT_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}
// Box at (x, y), x the contiguous coordinate. Elements outside the tensor arrive as zeros and still count as bytes.
NPT_DEVICE void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(x), "r"(y)
      : "memory");
}
// The same box to the same offset of every block in `mask`, counted on the same barrier offset of each.
NPT_DEVICE void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "h"(mask), "r"(x), "r"(y)
      : "memory");
}
// As tma_load with an L2 policy; decode streams every weight once and must not evict the activations.
NPT_DEVICE void tma_load_hint(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(x), "r"(y), "l"(policy)
      : "memory");
}
NPT_DEVICE uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
NPT_DEVICE void tma_store(const CUtensorMap* map, uint32_t src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(src), "r"(x), "r"(y)
               : "memory");
}
NPT_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's stores still read shared memory.
template <int kPending>
NPT_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
NPT_DEVICE void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders this thread's ordinary shared-memory writes before later accesses of the async proxy (TMA, wgmma).
NPT_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------ wgmma
NPT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NPT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
NPT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Two 16-bit elements of read-only global memory. Volatile so that it stays below wgmma's wait: hoisted into the K loop, an
// epilogue's bias loads took the registers that the wgmma pipeline needs (C7511).
NPT_DEVICE uint32_t load_pair(const void* base, int pair) {
  uint32_t value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(static_cast<const uint32_t*>(base) + pair) : "memory");
  return value;
}

// ------------------------------------------------------------------------------------------------ registers ↔ tiles
// Accumulators of 64 rows → rows of partial sums.
template <int kCols>
NPT_DEVICE void put_partials(uint32_t base, const float* acc, int row0, int column0, int width, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < kCols / 2; i += 2) {
    const int row = row0 + fragment_row(warp, lane, i), column = column0 + fragment_col(lane, i);
    store_shared(base + partial_offset(row, column, width), acc[i], acc[i + 1]);
  }
}

template <Dtype kType>
NPT_DEVICE uint32_t pack(float lo, float hi) {
  uint32_t packed;
  if constexpr (kType == Dtype::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  }
  return packed;
}
template <Dtype kType>
NPT_DEVICE void unpack(uint32_t packed, float& lo, float& hi) {
  if constexpr (kType == Dtype::kBf16) {
    lo = __uint_as_float(packed << 16);
    hi = __uint_as_float(packed & 0xFFFF0000u);
  } else {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(lo), "=f"(hi)
        : "r"(packed));
  }
}
NPT_DEVICE void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
NPT_DEVICE void ldmatrix_x4(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

}  // namespace npt
