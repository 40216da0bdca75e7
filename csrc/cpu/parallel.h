// One loop over threads, on the OpenMP runtime the process already has (torch's), so that no second pool of threads
// competes with it for the processors.
#pragma once
#include <cstdint>
#include <functional>

namespace omni {

// Calls body(begin, end) over disjoint ranges that cover [0, count), at most `grain` long, on up to `threads` threads.
// Which thread gets which range is not fixed; rows are independent, so results are. What a body throws is thrown here.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

// "openmp" where the process has a GNU-compatible OpenMP runtime (libgomp, libomp, libiomp5), else "std::thread".
const char* thread_runtime();

}  // namespace omni
