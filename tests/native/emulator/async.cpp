#include "async.h"

#include <algorithm>

#include "memory.h"

namespace emulator {
namespace {

constexpr std::int64_t kMostBytes = (1 << 20) - 1;  // that an mbarrier counts
constexpr std::uint64_t kMostArrivals = (1 << 20) - 1;

Thread& here() { return *machine.current; }

char* memory_of(SharedPlace at) { return at.block->shared + at.offset; }
std::uintptr_t address_of(SharedPlace at) { return reinterpret_cast<std::uintptr_t>(memory_of(at)); }
std::string text_of(SharedPlace at) {
    return "block " + std::to_string(at.block->number) + "'s shared memory at " + std::to_string(at.offset);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// mbarriers

struct Barrier {
    SharedPlace at;
    unsigned arrivals, pending;  // a phase's, and those left of the current one
    std::int64_t bytes = 0;      // expected and not here yet
    unsigned phase = 0;          // the current one, from 0
    int component;
    std::size_t initialiser;
    std::uint32_t initialised_at;
    bool fenced = false;  // its initialisation, for other blocks and the async proxy
    bool from_afar = false, last_from_afar = false;  // whether another block added to the phase
    Clock gathered, completed;
    struct Waiter {
        Thread* thread;
        unsigned phase;
    };
    std::vector<Waiter> waiters;
    std::vector<int> observed;                 // the last phase that each thread of the block has seen complete
    int last_async = -1, last_observed = -1;  // phases: that a copy counts in, that anyone has seen

    void add_bytes(std::int64_t count) {
        bytes += count;
        if (bytes > kMostBytes || bytes < -kMostBytes)
            fault("the mbarrier in " + text_of(at) + " counts too many bytes");
    }
    void complete_if_done() {
        if (pending != 0 || bytes != 0) return;
        for (const Waiter& waiter : waiters)
            if (waiter.phase < phase) fault(name_of(*waiter.thread) + missed());
        gathered.raise(component, {phase + 1, 0});
        completed = gathered;
        last_from_afar = std::exchange(from_afar, false);
        pending = arrivals;
        for (const Waiter& waiter : waiters) wake(*waiter.thread);
        ++phase;
    }
    std::string missed() const {
        return " may miss a phase: the mbarrier in " + text_of(at) +
               " can complete two phases before it looks, and parity can't tell";
    }
};

namespace {

Barrier& barrier_at(SharedPlace at) {
    const auto found = at.block->barriers.find(at.offset);
    if (found == at.block->barriers.end()) fault("no mbarrier has been initialised in " + text_of(at));
    Barrier& barrier = *found->second;
    const Thread& thread = here();
    const bool own = barrier.initialiser == std::size_t(thread.component);
    if (!own && thread.knows[barrier.initialiser].seen < barrier.initialised_at)
        fault("a use of the mbarrier in " + text_of(at) + " without any order after its initialisation");
    if ((!own && at.block != thread.block) && !barrier.fenced)
        fault("another block uses the mbarrier in " + text_of(at) +
              " without a fence.mbarrier_init after its initialisation");
    return barrier;
}

Barrier& barrier_of_copy(SharedPlace at, SharedPlace to, const char* what) {
    Barrier& barrier = barrier_at(at);
    if (at.block != to.block) fault(std::string(what) + " counts in an mbarrier of another block than it writes to");
    if (!barrier.fenced)
        fault("the async proxy uses the mbarrier in " + text_of(at) + " without a fence after its initialisation");
    barrier.last_async = static_cast<int>(barrier.phase);
    return barrier;
}

}  // namespace

SharedPlace shared_at(std::uint64_t address) {
    const std::uint64_t rank = address >> 24;
    Block& own = *here().block;
    if (rank > own.cluster->blocks.size()) fault("a shared memory address of no block of the cluster");
    Block& block = rank ? *own.cluster->blocks[rank - 1] : own;
    if (block.live == 0)
        fault("an access to the shared memory of block " + std::to_string(block.number) + ", which has exited");
    return {&block, static_cast<std::size_t>(address & 0xffffff)};
}

std::uint64_t map_to_rank(std::uint64_t address, std::uint64_t rank) {
    if (rank >= here().block->cluster->blocks.size()) fault("mapa to a rank that the cluster hasn't got");
    if (address >> 24) fault("mapa of an address that isn't of this block's shared memory");
    return address | (rank + 1) << 24;
}

void init_barrier(SharedPlace at, std::uint64_t arrivals) {
    Thread& thread = here();
    if (at.offset % 8) fault("an mbarrier must be aligned to 8 bytes, it is in " + text_of(at));
    if (arrivals < 1 || arrivals > kMostArrivals) fault("an mbarrier can't expect so many arrivals");
    std::shared_ptr<Barrier>& barrier = at.block->barriers[at.offset];
    if (barrier) fault("the mbarrier in " + text_of(at) + " is initialised twice");
    mark_barrier(thread, *at.block, at.offset);
    barrier = std::make_shared<Barrier>();
    barrier->at = at;
    barrier->arrivals = barrier->pending = static_cast<unsigned>(arrivals);
    barrier->component = new_component("what the mbarrier in " + text_of(at) + " counts");
    barrier->initialiser = static_cast<std::size_t>(thread.component);
    barrier->initialised_at = thread.epoch;
    barrier->gathered = Clock(machine.clock_size);
    barrier->observed.assign(at.block->threads.size(), -1);
}

void fence_barrier_inits() {
    for (auto& [offset, barrier] : here().block->barriers)
        if (barrier->initialiser == std::size_t(here().component)) barrier->fenced = true;
}

void arrive(SharedPlace at, std::uint64_t expected_bytes, bool release) {
    Thread& thread = here();
    Barrier& barrier = barrier_at(at);
    if (barrier.pending == 0) fault("more arrivals at the mbarrier in " + text_of(at) + " than it expects of a phase");
    barrier.add_bytes(static_cast<std::int64_t>(expected_bytes));
    if (at.block != thread.block) barrier.from_afar = true;
    if (release) barrier.gathered.join(publish(thread));
    --barrier.pending;
    barrier.complete_if_done();
}

bool try_wait(SharedPlace at, unsigned parity, bool acquire, bool cluster_scope) {
    Thread& thread = here();
    Barrier& barrier = barrier_at(at);
    if (at.block != thread.block) fault("a wait for an mbarrier of another block");
    int& observed = barrier.observed[thread.in_block];
    const int next = observed + 1, phase = (next & 1) == int(parity) ? next : next + 1, current = int(barrier.phase);
    if (phase > current)
        fault("a wait for the phase before the current one of the mbarrier in " + text_of(at) +
              ", which has been seen already: wrong parity");
    if (phase < current - 1) fault("a wait" + barrier.missed());
    if (phase == current) {
        if (machine.random.chance(10)) return false;
        barrier.waiters.push_back({&thread, unsigned(phase)});
        wait("mbarrier.try_wait");
        const auto self = std::find_if(barrier.waiters.begin(), barrier.waiters.end(),
                                       [&](const Barrier::Waiter& waiter) { return waiter.thread == &thread; });
        *self = barrier.waiters.back();
        barrier.waiters.pop_back();
    }
    observed = phase;
    barrier.last_observed = std::max(barrier.last_observed, phase);
    if (barrier.last_from_afar && !cluster_scope)
        fault("an acquire of scope .cta where another block arrived at the mbarrier in " + text_of(at));
    if (acquire) learn(thread, barrier.completed);
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Operations under way. They are checked when they start, since they may happen at any time from then on.

namespace {

// Bytes on their way, in pieces that land in any order.
struct Pieces {
    struct Piece {
        std::size_t offset, bytes;
    };
    std::vector<Piece> left;

    explicit Pieces(std::size_t bytes) {
        const std::size_t size = std::max<std::size_t>(16, bytes / (1 + machine.random.below(4)) / 16 * 16);
        for (std::size_t at = 0; at < bytes; at += size) left.push_back({at, std::min(size, bytes - at)});
    }
    Piece take() {
        std::swap(left[machine.random.below(left.size())], left.back());
        const Piece piece = left.back();
        left.pop_back();
        return piece;
    }
};

// A copy or message to shared memory, counted by an mbarrier there.
struct Landing {
    SharedPlace to;
    const char* from;
    std::vector<char> early;  // the source as it was at the start; empty: it is read when it lands
    Barrier& barrier;
    unsigned phase;
    Clock carried;  // what the end releases beside the bytes
    bool afar;
    Pieces pieces;

    Landing(SharedPlace to_, const void* from_, std::size_t bytes, Barrier& barrier_, bool read_early)
        : to(to_),
          from(static_cast<const char*>(from_)),
          barrier(barrier_),
          phase(barrier_.phase),
          afar(to_.block != here().block),
          pieces(bytes) {
        if (read_early) early.assign(from, from + bytes);
    }
    // Whether it is over.
    bool step() {
        const Pieces::Piece piece = pieces.take();
        std::memcpy(memory_of(to) + piece.offset, (early.empty() ? from : early.data()) + piece.offset, piece.bytes);
        if (barrier.phase != phase)
            fault("the mbarrier in " + text_of(barrier.at) +
                  " has completed the phase of a copy before all its bytes were there");
        barrier.add_bytes(-static_cast<std::int64_t>(piece.bytes));
        barrier.from_afar |= afar;
        barrier.gathered.join(carried);
        barrier.complete_if_done();
        return pieces.left.empty();
    }
};

std::vector<std::unique_ptr<Landing>> operations;

}  // namespace

void bulk_load(SharedPlace to, std::uint64_t from, std::uint64_t bytes, SharedPlace at) {
    if (bytes == 0 || bytes % 16 || from % 16 || to.offset % 16)
        fault("a bulk load of " + std::to_string(bytes) + " bytes between global memory " + std::to_string(from % 16) +
              " bytes and shared memory " + std::to_string(to.offset % 16) +
              " bytes beyond a multiple of 16: all three must be multiples of 16");
    Barrier& barrier = barrier_of_copy(at, to, "a bulk load");
    const Actor actor{here(), std::size_t(barrier.component), barrier.phase + 1, true};
    check(actor, nullptr, from, bytes, false, "a bulk load reads");
    check(actor, to.block, address_of(to), bytes, true, "a bulk load writes");
    const void* const source = reinterpret_cast<const void*>(from);
    operations.push_back(std::make_unique<Landing>(to, source, bytes, barrier, machine.random.chance(50)));
}

// The memory model orders none of the sender's earlier accesses before the message's arrival. This one does, for the
// reason at the top of csrc/cuda_ring.cuh: it is the one promise beyond the model that the emulator relies on.
void store_async(SharedPlace to, const std::uint32_t (&words)[4], SharedPlace at) {
    Thread& thread = here();
    if (thread.block->cluster->blocks.size() < 2) fault("st.async is undefined in a cluster of one block");
    if (to.offset % 16) fault("st.async of 16 bytes must be aligned to them, it writes to " + text_of(to));
    Barrier& barrier = barrier_of_copy(at, to, "st.async");
    check({thread, std::size_t(barrier.component), barrier.phase + 1, false}, to.block, address_of(to), sizeof words,
          true, "st.async writes");
    auto landing = std::make_unique<Landing>(to, words, sizeof words, barrier, true);
    landing->carried = publish(thread);
    operations.push_back(std::move(landing));
}

void fence_proxy() {
    Thread& thread = here();
    thread.shown = thread.epoch++;
}

bool deliver_something() {
    if (operations.empty()) return false;
    const std::size_t chosen = machine.random.below(operations.size());
    if (operations[chosen]->step()) {
        std::swap(operations[chosen], operations.back());
        operations.pop_back();
    }
    return true;
}

void exit_block(Block& block) {
    for (const auto& [offset, barrier] : block.barriers)
        if (barrier->last_async > barrier->last_observed)
            fault("a block exits while copies that nobody waited for may still land in " + text_of(barrier->at));
}

void forget_async() { operations.clear(); }

}  // namespace emulator
