#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <vector>
#endif

namespace emulator {
namespace {

constexpr std::size_t kMostStacks = 1 << 15;

char* stacks() {
    static char* const memory = [] {
        void* const at = mmap(nullptr, kMostStacks * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        return static_cast<char*>(at);
    }();
    return memory;
}

}  // namespace

bool is_on_a_stack(std::uintptr_t address) {
    return address - reinterpret_cast<std::uintptr_t>(stacks()) < kMostStacks * kStackBytes;
}

#if defined(__x86_64__)

// Callee-saved registers on the old stack, the stack pointer exchanged, registers from the new stack.
asm(R"(
.text
.type emulator_switch_fiber, @function
emulator_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void emulator_switch_fiber(void** from, void* to);

void switch_fiber(void** from, void* to) { emulator_switch_fiber(from, to); }

void* new_fiber(std::size_t stack, void (*entry)()) {
    if (stack >= kMostStacks) throw std::bad_alloc();
    void** top = reinterpret_cast<void**>(stacks() + (stack + 1) * kStackBytes);
    *--top = nullptr;  // a return address for entry, which aligns the stack as a call would
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
}

#else

void switch_fiber(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* new_fiber(std::size_t stack, void (*entry)()) {
    if (stack >= kMostStacks) throw std::bad_alloc();
    static std::vector<ucontext_t> contexts(kMostStacks);
    ucontext_t& context = contexts[stack];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks() + stack * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    return &context;
}

#endif

}  // namespace emulator
