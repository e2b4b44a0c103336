#include "memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <new>

#include "fiber.h"

namespace emulator {
namespace {

constexpr std::size_t kGranule = 2, kPageBytes = 4096, kCellsPerPage = kPageBytes / kGranule;
constexpr std::size_t kMostBlocks = 256, kDynamicOffset = 1024, kRedZone = 64;
constexpr std::uint16_t kCrowd = 0xffff;

struct Cell {
    std::uint32_t written_at = 0, read_at = 0;  // epochs; 0: never. A crowd's number, where there are many readers
    std::uint16_t writer = 0, reader = 0;       // components
    std::uint8_t allowed = 0, initialised = 0;  // a bit a byte
    bool async = false;                         // the last write was
    enum : std::uint8_t { plain, atomic, barrier } kind = plain;
};
static_assert(sizeof(Cell) == 16, "cells are many");

// Readers of one cell that nothing orders, and the last epoch of each: a list, or all components where they are many.
struct Crowd {
    static constexpr std::size_t kFew = 16;
    std::vector<std::pair<std::size_t, std::uint32_t>> few;
    std::vector<std::uint32_t> many;

    void add(std::size_t component, std::uint32_t epoch) {
        if (!many.empty()) {
            many[component] = epoch;
            return;
        }
        for (auto& [known, last] : few)
            if (known == component) {
                last = epoch;
                return;
            }
        few.emplace_back(component, epoch);
        if (few.size() <= kFew) return;
        many.assign(machine.clock_size, 0);
        for (const auto& [known, last] : few) many[known] = last;
        few.clear();
    }
    template <class Test>
    std::size_t find(const Test& test) const {  // a component; as many as there are: none
        for (const auto& [component, epoch] : few)
            if (test(component, epoch)) return component;
        for (std::size_t i = 0; i < many.size(); ++i)
            if (many[i] && test(i, many[i])) return i;
        return machine.clock_size;
    }
    void clear() {
        few.clear();
        many.clear();
    }
};
std::vector<Crowd> crowds;
std::vector<std::uint32_t> free_crowds;

std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages;  // of global memory, by address / kPageBytes
std::vector<std::unique_ptr<Cell[]>> free_pages;
struct {
    std::uintptr_t page = 0;
    Cell* cells = nullptr;
} recent[256];

char* shared_memory() {
    static char* const memory = [] {
        void* const at = mmap(nullptr, kMostBlocks * kMostSharedBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        return static_cast<char*>(at);
    }();
    return memory;
}
std::vector<std::vector<Cell>> shared_cells;  // by block

Cell* page_of(std::uintptr_t address, bool create) {
    const std::uintptr_t page = address / kPageBytes;
    auto& entry = recent[page % 256];
    if (entry.page == page && entry.cells) return entry.cells;
    std::unique_ptr<Cell[]>* cells = nullptr;
    if (const auto found = pages.find(page); found != pages.end()) {
        cells = &found->second;
    } else {
        if (!create) return nullptr;
        cells = &pages[page];
        if (free_pages.empty()) {
            cells->reset(new Cell[kCellsPerPage]);
        } else {
            *cells = std::move(free_pages.back());
            free_pages.pop_back();
            std::fill_n(cells->get(), kCellsPerPage, Cell{});
        }
    }
    entry = {page, cells->get()};
    return entry.cells;
}

// Calls visit(cell, bits of its bytes) for each cell of the bytes; cell is null where nothing is known.
template <class Visit>
void each_cell(const Block* block, std::uintptr_t address, std::size_t bytes, bool create, const Visit& visit) {
    const std::uintptr_t end = address + bytes;
    for (std::uintptr_t at = address; at < end;) {
        const std::uintptr_t granule = at / kGranule * kGranule, next = std::min(granule + kGranule, end);
        const auto bits = static_cast<std::uint8_t>(next - at == 2 ? 3 : at == granule ? 1 : 2);
        Cell* cell = nullptr;
        if (block) {
            std::vector<Cell>& cells = shared_cells[block->number];
            const std::size_t index = (at - reinterpret_cast<std::uintptr_t>(block->shared)) / kGranule;
            if (index < cells.size()) cell = &cells[index];
        } else if (Cell* const page = page_of(at, create)) {
            cell = page + at % kPageBytes / kGranule;
        }
        visit(cell, bits);
        at = next;
    }
}

void allow(const Block* block, std::uintptr_t address, std::size_t bytes, bool initialised) {
    each_cell(block, address, bytes, true, [&](Cell* cell, std::uint8_t bits) {
        cell->allowed |= bits;
        if (initialised) cell->initialised |= bits;
    });
}

bool knows(const Actor& actor, std::size_t component, std::uint32_t epoch) {
    if (component == std::size_t(actor.thread.component)) return true;
    return actor.thread.knows[component].seen >= epoch;
}
bool is_shown(const Actor& actor, std::size_t component, std::uint32_t epoch) {
    if (component == std::size_t(actor.thread.component)) return actor.thread.shown >= epoch;
    return actor.thread.knows[component].shown >= epoch;
}

[[noreturn]] void blame(const Block* block, std::uintptr_t address, std::size_t bytes, const std::string& what,
                        const std::string& why) {
    std::string where = std::to_string(bytes) + " bytes of ";
    if (block)
        where += "block " + std::to_string(block->number) + "'s shared memory at " +
                 std::to_string(address - reinterpret_cast<std::uintptr_t>(block->shared));
    else
        where += "global memory";
    fault(what + " " + where + why);
}

// What is wrong with an access of one cell; null where nothing is.
const char* read_fault(const Actor& actor, const Cell& cell, std::uint8_t bits, std::size_t* other) {
    if ((cell.initialised & bits) != bits) return " that nobody has initialised";
    *other = cell.writer;
    if (!cell.written_at) return nullptr;
    if (!knows(actor, cell.writer, cell.written_at)) return " without any order after the write of ";
    if (actor.async && !cell.async && !is_shown(actor, cell.writer, cell.written_at))
        return " by the async proxy without a fence.proxy.async after the write of ";
    return nullptr;
}

const char* write_fault(const Actor& actor, const Cell& cell, std::size_t* other) {
    *other = cell.writer;
    if (cell.written_at) {
        if (!knows(actor, cell.writer, cell.written_at)) return " without any order after the write of ";
        if (actor.async && !cell.async && !is_shown(actor, cell.writer, cell.written_at))
            return " by the async proxy without a fence.proxy.async after the write of ";
    }
    if (cell.reader == kCrowd) {
        const std::size_t found = crowds[cell.read_at].find(
            [&](std::size_t component, std::uint32_t epoch) { return !knows(actor, component, epoch); });
        if (found < machine.clock_size) {
            *other = found;
            return " without any order after the read of ";
        }
    } else if (cell.read_at && !knows(actor, cell.reader, cell.read_at)) {
        *other = cell.reader;
        return " without any order after the read of ";
    }
    return nullptr;
}

void note_read(const Actor& actor, Cell& cell) {
    if (cell.reader == kCrowd) {
        crowds[cell.read_at].add(actor.component, actor.epoch);
        return;
    }
    if (!cell.read_at || cell.reader == actor.component || knows(actor, cell.reader, cell.read_at)) {
        cell.reader = static_cast<std::uint16_t>(actor.component);
        cell.read_at = actor.epoch;
        return;
    }
    if (free_crowds.empty()) {
        free_crowds.push_back(static_cast<std::uint32_t>(crowds.size()));
        crowds.emplace_back();
    }
    const std::uint32_t number = free_crowds.back();
    free_crowds.pop_back();
    crowds[number].clear();
    crowds[number].add(cell.reader, cell.read_at);
    crowds[number].add(actor.component, actor.epoch);
    cell.reader = kCrowd;
    cell.read_at = number;
}

void note_write(const Actor& actor, Cell& cell, std::uint8_t bits) {
    if (cell.reader == kCrowd) free_crowds.push_back(cell.read_at);
    cell.reader = 0;
    cell.read_at = 0;
    cell.writer = static_cast<std::uint16_t>(actor.component);
    cell.written_at = actor.epoch;
    cell.async = actor.async;
    cell.kind = Cell::plain;
    cell.initialised |= bits;
}

std::vector<Constant> expected;  // what the launch must fill

// Calls visit(address, bytes) for each contiguous part of an array.
template <class Visit>
void each_run(std::uintptr_t address, std::int64_t item, int dimensions, const std::int64_t* sizes,
              const std::int64_t* strides, const Visit& visit) {
    if (dimensions == 0) return visit(address, static_cast<std::size_t>(item));
    if (dimensions == 1 && (strides[0] == 1 || sizes[0] == 1))
        return visit(address, static_cast<std::size_t>(sizes[0] * item));
    const std::int64_t count = strides[0] == 0 ? std::min<std::int64_t>(sizes[0], 1) : sizes[0];
    for (std::int64_t i = 0; i < count; ++i)
        each_run(address + static_cast<std::uintptr_t>(i * strides[0] * item), item, dimensions - 1, sizes + 1,
                 strides + 1, visit);
}

bool is_constant(std::uintptr_t address, std::size_t bytes) {
    for (const Constant& constant : machine.constants) {
        const auto begin = reinterpret_cast<std::uintptr_t>(constant.at);
        if (address >= begin && address + bytes <= begin + constant.bytes) return true;
    }
    return false;
}

// The source line of an instruction, which addr2line knows where it is installed.
std::string line_of(const void* instruction) {
    Dl_info info;
    if (!dladdr(instruction, &info)) return "";
    char command[512], line[256] = "";
    std::snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", info.dli_fname,
                  std::size_t(static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase)) - 1);
    if (FILE* const output = popen(command, "r")) {
        if (std::fgets(line, sizeof line, output)) line[std::strcspn(line, "\n")] = 0;
        pclose(output);
    }
    return line;
}

}  // namespace

void check(const Actor& actor, const Block* block, std::uintptr_t address, std::size_t bytes, bool write,
           const std::string& what) {
    each_cell(block, address, bytes, false, [&](Cell* cell, std::uint8_t bits) {
        if (!cell || (cell->allowed & bits) != bits)
            blame(block, address, bytes, what, ", which no array and no variable covers");
        if (cell->kind == Cell::barrier) blame(block, address, bytes, what, ", which are an mbarrier's");
        std::size_t other = 0;
        const char* const why = write ? write_fault(actor, *cell, &other) : read_fault(actor, *cell, bits, &other);
        if (why) blame(block, address, bytes, what, why + (cell->written_at || write ? name_of_component(other) : ""));
        if (write)
            note_write(actor, *cell, bits);
        else
            note_read(actor, *cell);
    });
}

void check_atomic(const Thread& thread, const int* at) {
    const Actor actor = itself(thread);
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    each_cell(nullptr, address, sizeof *at, false, [&](Cell* cell, std::uint8_t bits) {
        if (!cell || (cell->allowed & bits) != bits || (cell->initialised & bits) != bits)
            blame(nullptr, address, sizeof *at, "an atomic accesses", " that aren't there or not initialised");
        std::size_t other = 0;
        if (cell->kind != Cell::atomic)
            if (const char* const why = write_fault(actor, *cell, &other))
                blame(nullptr, address, sizeof *at, "an atomic accesses", why + name_of_component(other));
        note_write(actor, *cell, bits);
        cell->kind = Cell::atomic;
    });
}

void mark_barrier(const Thread& thread, const Block& block, std::size_t offset) {
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(block.shared) + offset;
    check(itself(thread), &block, address, 8, true, "mbarrier.init writes");
    each_cell(&block, address, 8, false, [](Cell* cell, std::uint8_t) { cell->kind = Cell::barrier; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory: dynamic first, then each variable, with gaps that nobody may touch.

void give_shared_memory(Block& block, std::size_t dynamic_bytes) {
    if (std::size_t(block.number) >= kMostBlocks) fault("the emulator has no shared memory for so many blocks");
    block.shared = shared_memory() + block.number * kMostSharedBytes;
    block.shared_end = kDynamicOffset;
    if (shared_cells.size() <= std::size_t(block.number)) shared_cells.resize(block.number + 1);
    shared_cells[block.number].clear();
    if (dynamic_bytes) shared_place(-1 - block.number, dynamic_bytes);
}

void* shared_place(int variable, std::size_t bytes) {
    // A negative number is of the dynamic memory, which a block gets before it runs.
    Block& block = variable < 0 ? machine.blocks[-1 - variable] : *machine.current->block;
    const auto [found, added] = block.variables.try_emplace(variable < 0 ? 0 : variable, block.shared_end);
    char* const at = block.shared + found->second;
    if (!added) return at;
    block.shared_end = (block.shared_end + bytes + kRedZone + 15) / 16 * 16;
    if (block.shared_end > kMostSharedBytes) fault("a block has no room for its shared memory");
    shared_cells[block.number].resize(block.shared_end / kGranule);
    std::memset(at, 0xff, bytes);  // NaN, or -1
    allow(&block, reinterpret_cast<std::uintptr_t>(at), bytes, false);
    return at;
}

void* dynamic_shared() { return machine.current->block->shared + kDynamicOffset; }

std::size_t shared_offset(const void* at) {
    const std::size_t offset = static_cast<std::size_t>(static_cast<const char*>(at) - machine.current->block->shared);
    if (offset >= kMostSharedBytes) fault("__cvta_generic_to_shared of memory that is not this block's shared memory");
    return offset;
}

void forget_memory() {
    for (auto& page : pages) free_pages.push_back(std::move(page.second));
    pages.clear();
    for (auto& entry : recent) entry = {};
    crowds.clear();
    free_crowds.clear();
    expected.clear();
}

void check_results() {
    for (const Constant& result : expected) {
        const auto address = reinterpret_cast<std::uintptr_t>(result.at);
        each_cell(nullptr, address, result.bytes, false, [&](const Cell* cell, std::uint8_t bits) {
            if ((cell->initialised & bits) != bits)
                blame(nullptr, address, result.bytes, "the launch leaves unwritten some of", "");
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Every access that the compiler's thread sanitizer instrumented, just before it is done

namespace {

void access(const void* at, std::size_t bytes, bool write, const void* instruction) {
    if (!machine.current) return;  // the host's
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    if (is_on_a_stack(address)) return;
    const Thread& thread = *machine.current;
    const std::size_t in_shared = address - reinterpret_cast<std::uintptr_t>(shared_memory());
    const Block* block = nullptr;
    if (in_shared < kMostBlocks * kMostSharedBytes) {
        block = thread.block;
        if (in_shared / kMostSharedBytes != std::size_t(block->number))
            fault("a plain access of another block's shared memory at " + line_of(instruction));
    } else if (is_constant(address, bytes)) {
        if (write) fault("a write to the kernel's arguments at " + line_of(instruction));
        return;
    }
    // The text is only made for a fault: most accesses pass a check without it.
    const Actor actor = itself(thread);
    bool suspicious = false;
    each_cell(block, address, bytes, false, [&](Cell* cell, std::uint8_t bits) {
        std::size_t other = 0;
        if (suspicious || !cell || (cell->allowed & bits) != bits || cell->kind == Cell::barrier ||
            (write ? write_fault(actor, *cell, &other) : read_fault(actor, *cell, bits, &other))) {
            suspicious = true;
            return;
        }
        if (write)
            note_write(actor, *cell, bits);
        else
            note_read(actor, *cell);
    });
    if (suspicious) check(actor, block, address, bytes, write, line_of(instruction) + (write ? " writes" : " reads"));
}

}  // namespace

extern "C" {

#define EMULATOR_HOOK(name, bytes, write) \
    void __tsan_##name(void* at) { access(at, bytes, write, __builtin_return_address(0)); }
EMULATOR_HOOK(read1, 1, false)
EMULATOR_HOOK(read2, 2, false)
EMULATOR_HOOK(read4, 4, false)
EMULATOR_HOOK(read8, 8, false)
EMULATOR_HOOK(read16, 16, false)
EMULATOR_HOOK(write1, 1, true)
EMULATOR_HOOK(write2, 2, true)
EMULATOR_HOOK(write4, 4, true)
EMULATOR_HOOK(write8, 8, true)
EMULATOR_HOOK(write16, 16, true)
EMULATOR_HOOK(unaligned_read2, 2, false)
EMULATOR_HOOK(unaligned_read4, 4, false)
EMULATOR_HOOK(unaligned_read8, 8, false)
EMULATOR_HOOK(unaligned_read16, 16, false)
EMULATOR_HOOK(unaligned_write2, 2, true)
EMULATOR_HOOK(unaligned_write4, 4, true)
EMULATOR_HOOK(unaligned_write8, 8, true)
EMULATOR_HOOK(unaligned_write16, 16, true)
#undef EMULATOR_HOOK
void __tsan_read_range(void* at, unsigned long bytes) { access(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, unsigned long bytes) { access(at, bytes, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

// What the compiler's -fsanitize=alignment and bounds find; their data begin with the source line. A vector at an
// address that isn't a multiple of its size is undefined on a GPU.
void __ubsan_handle_type_mismatch_v1(const Place* place, std::uintptr_t address) {
    if (machine.current)
        fault("a misaligned access at " + text_of(*place) + ", " + std::to_string(address % 16) +
              " bytes beyond a multiple of 16");
}
void __ubsan_handle_out_of_bounds(const Place* place, std::uintptr_t index) {
    if (machine.current) fault("index " + std::to_string(index) + " past the end of an array at " + text_of(*place));
}

// An array that the next launch may touch: `sizes` of `item` bytes, at strides of so many items.
__attribute__((visibility("default"))) void emulator_allow(std::uintptr_t address, std::int64_t item, int dimensions,
                                                           const std::int64_t* sizes, const std::int64_t* strides) {
    each_run(address, item, dimensions, sizes, strides,
             [](std::uintptr_t at, std::size_t bytes) { allow(nullptr, at, bytes, true); });
}

// One of them that holds nothing yet, and must be filled by the launch if it is a result.
__attribute__((visibility("default"))) void emulator_expect(std::uintptr_t address, std::int64_t item, int dimensions,
                                                            const std::int64_t* sizes, const std::int64_t* strides,
                                                            int result) {
    each_run(address, item, dimensions, sizes, strides, [&](std::uintptr_t at, std::size_t bytes) {
        each_cell(nullptr, at, bytes, true, [](Cell* cell, std::uint8_t bits) { cell->initialised &= ~bits; });
        if (result) expected.push_back({reinterpret_cast<const void*>(at), bytes});
    });
}
}

}  // namespace emulator
