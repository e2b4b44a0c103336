// What translated kernels and the headers in include/ call: the emulator's face to the device code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace emulator {

// Where in the sources a thread is.
struct Place {
    const char* file;
    int line;
};
#define EMULATOR_PLACE ::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

struct Index {
    unsigned x, y, z;
    Index(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The emulated GPU; small ones make clusters and full rings cheap.
struct Chip {
    int processors, shared_bytes, major;
};
const Chip& chip();

int take_error();
const char* error_text(int error);

unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
int lane_index();

void sync_warp(unsigned mask, Place place);
void sync_threads(Place place);
void thread_fence(Place place);
unsigned ballot(unsigned mask, bool vote, Place place);
std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int from, Place place);
int atomic_add(int* at, int value, Place place);

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float x);

template <class T>
inline std::uint64_t to_bits(T value) {
    std::uint64_t bits = 0;
    static_assert(sizeof(T) <= sizeof bits);
    __builtin_memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
inline T from_bits(std::uint64_t bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

void* dynamic_shared();
void* shared_place(int variable, std::size_t bytes);
std::size_t shared_offset(const void* at);  // as a shared::cta address

template <class T>
T& shared_variable(int variable) {
    return *static_cast<T*>(shared_place(variable, sizeof(T)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Inline PTX: `site` is a row of the table that translate.py writes.

struct Operand {
    char kind;
    std::uint64_t bits;
    void* target;  // of a result
};
inline Operand result_r(unsigned& target) { return {'r', 0, &target}; }
inline Operand result_f(float& target) { return {'f', 0, &target}; }
inline Operand value_r(std::uint32_t value) { return {'r', value, nullptr}; }
inline Operand value_l(std::uint64_t value) { return {'l', value, nullptr}; }
inline Operand value_f(float value) { return {'f', to_bits(value), nullptr}; }
inline Operand value_n(int value) { return {'n', static_cast<std::uint64_t>(value), nullptr}; }

void ptx(int site, Operand* operands, int count);

// ---------------------------------------------------------------------------------------------------------------------
// Launches

struct Constant {  // memory that every thread may read: the kernel's arguments
    const void* at;
    std::size_t bytes;
};
void run_grid(Index grid, Index block, std::size_t shared_bytes, unsigned cluster,
              std::initializer_list<Constant> constants, void (*run_thread)(const void*), const void* argument);

template <class... Parameters>
auto launch(void (*kernel)(Parameters...), Index grid, Index block, std::size_t shared_bytes, void*,
            unsigned cluster = 1) {
    return [=](const auto&... arguments) {
        const auto thread = [&, kernel = kernel] { kernel(arguments...); };
        run_grid(grid, block, shared_bytes, cluster, {{&thread, sizeof thread}, {&arguments, sizeof arguments}...},
                 [](const void* it) { (*static_cast<decltype(&thread)>(it))(); }, &thread);
    };
}

}  // namespace emulator
