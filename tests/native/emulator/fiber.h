// Fibers: many stacks in one host thread, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr std::size_t kStackBytes = 64 * 1024;

// Switches to `to`, saving the state of this fiber.
void switch_fiber(void** from, void* to);

// A fiber that has not run yet, on the stack of that number; `entry` must not return.
void* new_fiber(std::size_t stack, void (*entry)());

bool is_on_a_stack(std::uintptr_t address);

}  // namespace emulator
