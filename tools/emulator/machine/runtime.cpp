// CUDA's host side as csrc/host.cpp and tma_host.h call it, and what tests call through ctypes.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

constexpr int kMaxSharedOfBlock = 232448, kSharedWithoutAsking = 48 * 1024;
char message[8192];

cudaError_t refuse(cudaError_t code, const std::string& why) {
  std::snprintf(message, sizeof message, "emulator: %s", why.c_str());
  return code;
}

struct KernelFacts {
  size_t parameter_bytes;
  int max_threads;
  int allowed_smem = kSharedWithoutAsking;
};
std::map<const void*, KernelFacts> known;
KernelFacts* asking = nullptr;

KernelFacts& facts_of(const void* kernel) {
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  KernelFacts& facts = known[kernel];
  asking = &facts;
  reinterpret_cast<void (*)(const void*)>(const_cast<void*>(kernel))(nullptr);
  asking = nullptr;
  return facts;
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
                      const cuuint64_t* pitch, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle_mode, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool sixteen_bits = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (rank != 2 || !sixteen_bits || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle_mode != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 != 128) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(base) % 16 || pitch[0] % 16 || pitch[0] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
  if (pitch[0] < size[0] * 2) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i) {
    if (size[i] < 1 || size[i] > 1ull << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(out, 0, sizeof *out);
  const TensorMap map{kMapMagic, static_cast<uint8_t*>(base), {size[0], size[1]}, pitch[0], {box[0], box[1]}};
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

cudaError_t enqueue(std::unique_ptr<Grid> grid) {
  const dim3 size = grid->size;
  const int blocks = int(size.x * size.y * size.z);
  grid->unfinished = grid->untriggered = blocks;
  for (int i = 0; i < blocks / grid->cluster_size; ++i) grid->to_start.push_back(i);
  ++stats.launches;
  draw_schedule(stats.launches);
  grid->before = grids.empty() ? nullptr : grids.back().get();
  grids.push_back(std::move(grid));
  error.clear();
  run(settings.deferred ? random_below(3000) : ~0ull);
  return error.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, error);
}

}  // namespace

bool only_asked(size_t parameter_bytes, int max_threads, int) {
  if (asking == nullptr) return false;
  asking->parameter_bytes = parameter_bytes;
  asking->max_threads = max_threads;
  return true;
}

}  // namespace emu

using namespace emu;

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool ours = !std::strcmp(symbol, "cuTensorMapEncodeTiled");
  *entry = ours ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (found != nullptr) *found = ours ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return message; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// A device's number is its number of SMs: the host asks once for each device and keeps the answer.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount || device < 1) return refuse(cudaErrorInvalidValue, "attribute or device");
  *value = device;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kMaxSharedOfBlock) {
    return refuse(cudaErrorInvalidValue, "cudaFuncSetAttribute to " + std::to_string(value));
  }
  facts_of(kernel).allowed_smem = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const KernelFacts& facts = facts_of(kernel);
  auto grid = std::make_unique<Grid>();
  grid->kernel = reinterpret_cast<void (*)(const void*)>(const_cast<void*>(kernel));
  grid->parameters.resize((facts.parameter_bytes + sizeof(ParameterLine) - 1) / sizeof(ParameterLine));
  std::memcpy(grid->parameters.data(), arguments[0], facts.parameter_bytes);
  grid->size = config->gridDim;
  grid->threads = config->blockDim;
  grid->dynamic_smem = int(config->dynamicSmemBytes);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      grid->cluster_size = int(attribute.val.clusterDim.x);
      if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) return refuse(cudaErrorInvalidValue, "cluster in y or z");
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      grid->overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else {
      return refuse(cudaErrorInvalidValue, "launch attribute " + std::to_string(int(attribute.id)) + " is not known");
    }
  }
  const dim3 size = grid->size, threads = grid->threads;
  const auto bad = [&](const std::string& what) {
    return refuse(cudaErrorInvalidConfiguration, what + " (grid " + std::to_string(size.x) + " x " + std::to_string(size.y) +
                                                     " x " + std::to_string(size.z) + ", " + std::to_string(threads.x) +
                                                     " threads, cluster " + std::to_string(grid->cluster_size) + ")");
  };
  if (size.x < 1 || size.y < 1 || size.z < 1) return bad("the grid is empty");
  if (grid->cluster_size < 1 || grid->cluster_size > 8 || size.x % unsigned(grid->cluster_size)) return bad("the cluster does not fit");
  if (threads.x % 32 || threads.y != 1 || threads.z != 1) return bad("blocks of whole warps in one dimension are emulated");
  if (int(threads.x) > facts.max_threads) return bad("__launch_bounds__ allows " + std::to_string(facts.max_threads) + " threads");
  if (grid->dynamic_smem > facts.allowed_smem) return bad(std::to_string(grid->dynamic_smem) + " bytes of shared memory were not allowed");
  return enqueue(std::move(grid));
}

#define EMU_EXPORT __attribute__((visibility("default")))

// The schedules of the launches that follow. deferred: a launch returns before it has ended, and later ones may overlap with it.
EMU_EXPORT void emu_configure(uint64_t seed, int mode, int deferred) { settings = {seed, Mode(mode), deferred != 0}; }

// Whether races are looked for (as NPT_EMULATE_ORDER says); only while nothing runs.
EMU_EXPORT void emu_order(int on) { hb::on = on != 0; }

// Run everything that was launched to its end; the error, or "".
EMU_EXPORT const char* emu_flush() {
  error.clear();
  run(~0ull);
  std::snprintf(message, sizeof message, "%s", error.c_str());
  return message;
}

EMU_EXPORT void emu_stats(uint64_t* out) { std::memcpy(out, &stats, sizeof stats); }

}  // extern "C"
