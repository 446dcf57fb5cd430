// What both launchers need of the CUDA runtime. Device -1 is a dry run: everything but the driver's encoding and the launch, for
// tests and for timing the host side on a machine without a GPU.
#pragma once
#include <cstdint>
#include <string>

#include "common/tma_host.h"

namespace npt {

constexpr int kDryRun = -1;
constexpr int kDryRunSms = 132;  // an H100 SXM or H200

// How a kernel was (or, dry, would be) launched.
struct LaunchPlan {
  int grid_x, grid_y, grid_z, threads, cluster, smem;
  bool overlap;  // may start while the kernel before still runs
};

[[noreturn]] void fail(const std::string& why);  // std::invalid_argument
void check_cuda(int error, const char* what);    // a cudaError_t
inline std::string text(int64_t value) { return std::to_string(value); }

void use_device(int device);
TensorMapCache& maps(int device);
int sm_count(int device);
// Shared-memory limit once per kernel and device, then the launch. `parameters` points at the kernel's one argument.
LaunchPlan launch_kernel(const void* function, const LaunchPlan& plan, void* parameters, int device, void* stream);

}  // namespace npt
