// The PTX instructions that the emulator knows: one function each, named as the instruction with . and :: replaced by _ and __.
// translate.py reads this list; an instruction of csrc/ that is not in it is a build error. Semantics and sources: ../README.md.
#pragma once
#include <cstdint>

namespace emu::ptx {

// mbarrier (barriers.cpp)
void mbarrier_init_shared__cta_b64(uint32_t bar, uint32_t count);
void fence_mbarrier_init_release_cluster();
void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t bar, uint32_t bytes);
void mbarrier_arrive_shared__cta_b64(uint32_t bar);
void mbarrier_arrive_shared__cluster_b64(uint32_t bar);
void mbarrier_arrive_relaxed_cta_shared__cta_b64(uint32_t bar);
void mbarrier_arrive_release_cluster_shared__cluster_b64(uint32_t bar);
void mbarrier_try_wait_parity_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity);
void mbarrier_try_wait_parity_relaxed_cta_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity);
void mbarrier_try_wait_parity_acquire_cluster_shared__cta_b64(bool& done, uint32_t bar, uint32_t parity);
void fence_acq_rel_cta();
void fence_acq_rel_cluster();

// Blocks and clusters (barriers.cpp, blocks.cpp)
void barrier_cluster_arrive();
void barrier_cluster_arrive_relaxed();
void barrier_cluster_wait();
void bar_sync(uint32_t id, uint32_t threads);
void setmaxnreg_inc_sync_aligned_u32(int registers);
void setmaxnreg_dec_sync_aligned_u32(int registers);
void griddepcontrol_launch_dependents();
void griddepcontrol_wait();
uint32_t special_cluster_ctarank();
uint32_t special_cluster_nctarank();

// Shared and global memory (shared_memory.cpp)
void mapa_shared__cluster_u32(uint32_t& out, uint32_t address, uint32_t rank);
void ld_shared__cluster_v2_f32(float& x, float& y, uint32_t address);
void st_shared_v2_f32(uint32_t address, float x, float y);
void fence_proxy_async_shared__cta();
void ld_global_nc_b32(uint32_t& out, uint64_t address);

// A warp's registers (warp.cpp)
void cvt_rn_bf16x2_f32(uint32_t& out, float high, float low);
void cvt_rn_f16x2_f32(uint32_t& out, float high, float low);
void cvt_f32_f16(float& out, uint16_t half);
void stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address);

// TMA (tma.cpp)
void prefetch_tensormap(uint64_t map);
void createpolicy_fractional_L2__evict_first_b64(uint64_t& policy, double fraction);
void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to, uint64_t map, int x, int y,
                                                                                 uint32_t bar);
void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes_multicast__cluster(uint32_t to, uint64_t map,
                                                                                                    int x, int y, uint32_t bar,
                                                                                                    uint16_t mask);
void cp_async_bulk_tensor_2d_shared__cluster_global_mbarrier__complete_tx__bytes_L2__cache_hint(uint32_t to, uint64_t map, int x,
                                                                                                int y, uint32_t bar,
                                                                                                uint64_t policy);
void cp_async_bulk_tensor_2d_global_shared__cta_bulk_group(uint64_t map, int x, int y, uint32_t from);
void cp_async_bulk_commit_group();
void cp_async_bulk_wait_group_read(int pending);
void cp_async_bulk_wait_group(int pending);

// wgmma (wgmma.cpp). mma_async stands for m64nNk16 with fp32 accumulators; `d` are the N/2 registers of this thread.
void wgmma_fence_sync_aligned();
void wgmma_commit_group_sync_aligned();
void wgmma_wait_group_sync_aligned(int pending);
void wgmma_mma_async(float* const* d, int n, bool bf16, uint64_t a, uint64_t b, bool scale_d, int scale_a, int scale_b,
                     int trans_a, int trans_b);

}  // namespace emu::ptx
