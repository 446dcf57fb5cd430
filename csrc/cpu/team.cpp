#include "team.h"

#include <string>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace npt::cpu {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*barrier)() = nullptr;
  int (*index)() = nullptr;
  int (*count)() = nullptr;
  std::string name;
};

#if defined(__linux__)
// libgomp's interface, which LLVM's and Intel's runtimes have too. Torch's library before another package's.
int consider(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  if (path.find("gomp") == std::string::npos && path.find("iomp5") == std::string::npos && path.find("libomp") == std::string::npos)
    return 0;
  std::string& best = *static_cast<std::string*>(data);
  if (best.empty() || path.find("torch") != std::string::npos) best = path;
  return 0;
}

Runtime find() {
  Runtime found;
  dl_iterate_phdr(consider, &found.name);
  void* library = found.name.empty() ? nullptr : dlopen(found.name.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library != nullptr) {
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.barrier = reinterpret_cast<decltype(found.barrier)>(dlsym(library, "GOMP_barrier"));
    found.index = reinterpret_cast<decltype(found.index)>(dlsym(library, "omp_get_thread_num"));
    found.count = reinterpret_cast<decltype(found.count)>(dlsym(library, "omp_get_num_threads"));
  }
  if (!(found.parallel && found.barrier && found.index && found.count)) found = Runtime{};
  return found;
}

#else
Runtime find() { return {}; }
#endif

const Runtime& runtime() {
  static const Runtime found = find();
  return found;
}

struct Region {
  Part part;
  void* data;
};

}  // namespace

void in_parallel(Part part, void* data, int threads) {
  const Runtime& r = runtime();
  if (threads <= 1 || r.parallel == nullptr) {
    part(data, 0, 1);
    return;
  }
  Region region{part, data};
  r.parallel(
      [](void* given) {
        const Region& own = *static_cast<Region*>(given);
        own.part(own.data, runtime().index(), runtime().count());
      },
      &region, static_cast<unsigned>(threads), 0);
}

void wait(int parts) {
  if (parts > 1) runtime().barrier();
}

const char* team_name() { return runtime().name.c_str(); }

}  // namespace npt::cpu
