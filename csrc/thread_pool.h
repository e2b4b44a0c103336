// A few threads for row kernels: no OpenMP runtime beside PyTorch's, and safe to fork after.
#pragma once

#include <cstdint>
#include <functional>

namespace epo {

// Calls task(i) for every i in [0, count), on up to `threads` threads, the caller's among them; returns when all are
// done. Tasks go out in order, one at a time, to whoever is free. task must not throw.
//
// Threads are started at first need and then sleep between calls. A call that finds them busy with another caller's
// works alone. After fork() the child starts threads of its own.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task);

}  // namespace epo
