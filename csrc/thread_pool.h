// A few threads for row kernels: needs no second OpenMP runtime next to PyTorch's, and is safe to use after fork.
#pragma once

#include <cstdint>
#include <functional>

namespace epo {

// Calls task(i) for every i in [0, count) on up to `threads` threads, including the caller's; returns when all are
// done. Tasks are handed out in order, one at a time, to the next free thread. task must not throw.
//
// Threads are started on first use and then sleep between calls. A call that finds them busy with another caller's work
// runs alone. After fork() the child starts threads of its own.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task);

}  // namespace epo
