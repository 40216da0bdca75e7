#include "parallel.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace omni {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
// The runtime is loaded by torch with local visibility, so it is found by walking the loaded objects, not by dlsym
// alone.
int find_openmp(dl_phdr_info* info, std::size_t, void* out) {
  const char* path = info->dlpi_name;
  const char* slash = path ? std::strrchr(path, '/') : nullptr;
  const char* file = slash ? slash + 1 : path;
  if (!file ||
      (std::strncmp(file, "libgomp", 7) && std::strncmp(file, "libomp", 6) && std::strncmp(file, "libiomp5", 8)))
    return 0;
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  *static_cast<void**>(out) = dlsym(handle, "GOMP_parallel");
  return *static_cast<void**>(out) != nullptr;
}
#endif

GompParallel gomp_parallel() {
  static const GompParallel found = [] {
    void* symbol = nullptr;
#if defined(__linux__)
    dl_iterate_phdr(&find_openmp, &symbol);
#endif
    return reinterpret_cast<GompParallel>(symbol);
  }();
  return found;
}

struct Loop {
  std::int64_t count, grain;
  const std::function<void(std::int64_t, std::int64_t)>* body;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first body that threw
};

void work(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  try {
    while (!loop.failed) {
      const std::int64_t begin = loop.next.fetch_add(loop.grain);
      if (begin >= loop.count) return;
      (*loop.body)(begin, begin + loop.grain < loop.count ? begin + loop.grain : loop.count);
    }
  } catch (...) {  // out of memory: one that left a thread would end the process
    if (!loop.failed.exchange(true)) loop.error = std::current_exception();
  }
}

void run(Loop& loop, int threads) {
  if (threads <= 1) return work(&loop);
  if (const GompParallel parallel = gomp_parallel()) return parallel(&work, &loop, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> pool;
  try {
    for (int i = 1; i < threads; ++i) pool.emplace_back(&work, &loop);
  } catch (const std::system_error&) {  // fewer threads do the same work
  }
  work(&loop);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

const char* thread_runtime() { return gomp_parallel() ? "openmp" : "std::thread"; }

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  Loop loop;
  loop.count = count;
  loop.grain = grain;
  loop.body = &body;
  const std::int64_t ranges = (count + grain - 1) / grain;
  run(loop, ranges < threads ? static_cast<int>(ranges) : threads);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace omni
