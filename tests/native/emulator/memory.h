// What is known about every two bytes of memory: whether they may be touched, whether they are initialised, and who
// wrote and read them last, and when. Two accesses, one of them a write, must be ordered.
#pragma once

#include "machine.h"

namespace emulator {

// Who accesses memory: a thread, or an asynchronous copy that it has started, whose end is `epoch` of `component`.
struct Actor {
    const Thread& thread;
    std::size_t component;
    std::uint32_t epoch;
    bool async;
};
inline Actor itself(const Thread& thread) {
    return {thread, static_cast<std::size_t>(thread.component), thread.epoch, false};
}

// In the shared memory of `block`, or in global memory where there is none. `what`: "a bulk load reads", ...
void check(const Actor& actor, const Block* block, std::uintptr_t address, std::size_t bytes, bool write,
           const std::string& what);
void check_atomic(const Thread& thread, const int* at);

// Marks an mbarrier's eight bytes, which only its own instructions may touch from then on.
void mark_barrier(const Thread& thread, const Block& block, std::size_t offset);

void give_shared_memory(Block& block, std::size_t dynamic_bytes);
void check_results();  // all that a launch must fill is filled
void forget_memory();

}  // namespace emulator
