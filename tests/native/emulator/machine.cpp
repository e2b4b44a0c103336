// Launches, the scheduler, and everything that threads of a warp, a block or a cluster do together.
#include "machine.h"

#include <algorithm>
#include <cstdio>

#include "async.h"
#include "fiber.h"
#include "memory.h"

namespace emulator {

Machine machine;

namespace {

struct Settings {
    std::uint64_t seed = 0;
    Chip chip{4, 232448, 9};
} settings;

struct {
    int launches = 0;
    int cluster_launches[16] = {};
} counted;

void* scheduler = nullptr;  // its fiber
void (*kernel)(const void*) = nullptr;
const void* kernel_argument = nullptr;
std::string failure;
int error = 0;

struct Fault {};

Thread& here() { return *machine.current; }

}  // namespace

const Chip& chip() { return settings.chip; }
int take_error() { return std::exchange(error, 0); }
const char* error_text(int code) {
    return code == 1 ? failure.c_str() : code == 801 ? "operation not supported" : "invalid configuration argument";
}

unsigned thread_index() { return here().index.x; }
unsigned block_index() { return here().block->index.x; }
unsigned block_size() { return machine.block_size.x; }
unsigned grid_size() { return machine.grid.x; }
int lane_index() { return here().lane; }

// ---------------------------------------------------------------------------------------------------------------------
// Names and faults

std::string text_of(const Place& place) {
    if (!place.file) return "an unknown place";
    const char* const slash = std::strrchr(place.file, '/');
    return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string name_of(const Thread& thread) {
    return "block " + std::to_string(thread.block->number) + " warp " + std::to_string(thread.in_block / kLanes) +
           " lane " + std::to_string(thread.lane);
}

std::string name_of_component(std::size_t component) {
    if (component >= machine.thread_count) return machine.async_components[component - machine.thread_count];
    const std::size_t size = machine.blocks[0].threads.size();
    return name_of(machine.blocks[component / size].threads[component % size]);
}

int new_component(std::string name) {
    const std::size_t component = machine.thread_count + machine.async_components.size();
    if (component >= machine.clock_size)
        fault("the emulator has no room for another mbarrier");
    machine.async_components.push_back(std::move(name));
    return static_cast<int>(component);
}

void fault(const std::string& what) {
    failure = what;
    if (!machine.current) throw Fault{};
    failure += "; " + name_of(here()) + ", last seen at " + text_of(here().place);
    void* abandoned = nullptr;
    here().state = Thread::done;
    switch_fiber(&abandoned, scheduler);
    __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling

void wake(Thread& thread) {
    thread.state = Thread::ready;
    machine.ready.push_back(&thread);
}

void wait(const char* what) {
    Thread& thread = here();
    thread.waits_for = what;
    thread.state = Thread::waiting;
    switch_fiber(&thread.fiber, scheduler);
}

namespace {

[[noreturn]] void run_fiber() {
    kernel(kernel_argument);
    Thread& thread = here();
    Block& block = *thread.block;
    if (--block.live == 0) exit_block(block);
    thread.state = Thread::done;
    void* gone = nullptr;
    switch_fiber(&gone, scheduler);
    __builtin_unreachable();
}

// 0-3 7
std::string ranges(const std::vector<int>& numbers) {
    std::string text;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        text += " " + std::to_string(numbers[i]);
        if (last > i) text += "-" + std::to_string(numbers[last]);
        i = last + 1;
    }
    return text;
}

// Where each fiber waits; lanes of a warp that wait for the same thing share a line.
std::string deadlock() {
    constexpr int kMostLines = 12;
    std::string text = "deadlock:";
    int lines = 0;
    for (const Block& block : machine.blocks)
        for (std::size_t first = 0; first < block.threads.size(); first += kLanes) {
            std::map<std::string, std::vector<int>> waits;
            for (std::size_t i = first; i < first + kLanes; ++i)
                if (const Thread& thread = block.threads[i]; thread.state == Thread::waiting)
                    waits[std::string(thread.waits_for) + " at " + text_of(thread.place)].push_back(thread.lane);
            for (const auto& [place, lanes] : waits)
                if (++lines <= kMostLines)
                    text += "\n  block " + std::to_string(block.number) + " warp " + std::to_string(first / kLanes) +
                            " lanes" + ranges(lanes) + " wait for " + place;
        }
    return lines > kMostLines ? text + "\n  and " + std::to_string(lines - kMostLines) + " more" : text;
}

// Prefers one warp for a while, so that some warps run far ahead of others.
Thread& next_thread() {
    std::vector<Thread*>& ready = machine.ready;
    std::size_t at = machine.random.below(ready.size());
    for (int tries = 0; tries < 3 && ready[at]->warp != machine.favourite; ++tries)
        at = machine.random.below(ready.size());
    if (machine.random.below(64) == 0) machine.favourite = ready[at]->warp;
    Thread& thread = *ready[at];
    ready[at] = ready.back();
    ready.pop_back();
    return thread;
}

void schedule(std::size_t threads) {
    const int eagerness = static_cast<int>(machine.random.below(4));  // of asynchronous work: 0, only when all wait
    std::size_t done = 0;
    while (done < threads) {
        if (machine.ready.empty() || (eagerness && machine.random.below(8) < std::size_t(eagerness))) {
            const bool delivered = deliver_something();
            if (machine.ready.empty() && !delivered) fault(deadlock());
            if (machine.ready.empty()) continue;
        }
        machine.current = &next_thread();
        switch_fiber(&scheduler, machine.current->fiber);
        if (machine.current->state == Thread::done) ++done;
        machine.current = nullptr;
        if (!failure.empty()) throw Fault{};
    }
    while (deliver_something()) {
    }
}

void set_up(Index grid, Index block_size, std::size_t dynamic_bytes, unsigned cluster) {
    machine.grid = grid;
    machine.block_size = block_size;
    machine.dynamic_bytes = dynamic_bytes;
    machine.thread_count = std::size_t(grid.x) * block_size.x;
    machine.clock_size = machine.thread_count + (dynamic_bytes ? grid.x * 160 : 0);
    machine.blocks = std::vector<Block>(grid.x);
    machine.clusters = std::vector<Cluster>(grid.x / cluster);
    const Clock nothing(machine.clock_size);
    for (unsigned b = 0; b < grid.x; ++b) {
        Block& block = machine.blocks[b];
        block.number = static_cast<int>(b);
        block.index = Index(b, 0, 0);
        block.rank = static_cast<int>(b % cluster);
        block.cluster = &machine.clusters[b / cluster];
        block.cluster->blocks.push_back(&block);
        block.cluster->threads += block_size.x;
        block.live = static_cast<int>(block_size.x);
        block.warps.resize((block_size.x + kLanes - 1) / kLanes);
        block.threads.resize(block_size.x);
        give_shared_memory(block, dynamic_bytes);
        for (unsigned t = 0; t < block_size.x; ++t) {
            Thread& thread = block.threads[t];
            thread.block = &block;
            thread.warp = &block.warps[t / kLanes];
            thread.component = static_cast<int>(b * block_size.x + t);
            thread.in_block = static_cast<int>(t);
            thread.lane = static_cast<int>(t % kLanes);
            thread.index = Index(t, 0, 0);
            thread.knows = nothing;
            thread.fiber = new_fiber(thread.component, run_fiber);
            machine.ready.push_back(&thread);
        }
    }
}

void tear_down() {
    machine.current = nullptr;
    machine.favourite = nullptr;
    machine.ready.clear();
    forget_async();
    forget_memory();
    machine.blocks.clear();
    machine.clusters.clear();
    machine.async_components.clear();
    machine.atomics.clear();
    machine.constants.clear();
    machine.joins.clear();
}

}  // namespace

void run_grid(Index grid, Index block, std::size_t shared_bytes, unsigned cluster,
              std::initializer_list<Constant> constants, void (*run_thread)(const void*), const void* argument) {
    failure.clear();
    error = 0;
    ++counted.launches;
    if (shared_bytes) ++counted.cluster_launches[cluster];
    machine.random = Random(settings.seed * 1000003 + static_cast<std::uint64_t>(counted.launches));
    machine.constants.assign(constants.begin(), constants.end());
    kernel = run_thread;
    kernel_argument = argument;
    try {
        if (block.x > 1024 || block.x % kLanes) fault("a block must be of whole warps, at most 1024 threads");
        if (grid.x % cluster) fault("a grid must be of whole clusters");
        if (shared_bytes > std::size_t(settings.chip.shared_bytes)) fault("a block asks for too much shared memory");
        set_up(grid, block, shared_bytes, cluster);
        schedule(machine.thread_count);
        check_results();
    } catch (const Fault&) {
        error = 1;
    }
    tear_down();
}

// ---------------------------------------------------------------------------------------------------------------------
// Clocks

void learn(Thread& thread, const Clock& clock) { thread.knows = machine.joins.of(thread.knows, clock); }

Clock publish(Thread& thread) {
    Clock all = thread.knows;
    all.raise(thread.component, {thread.epoch++, thread.shown});
    return all;
}

namespace {

void arrive(Gathering& gathering) {
    Thread& thread = here();
    gathering.arrivals.push_back({&thread, thread.knows, {thread.epoch++, thread.shown}});
}

// Everything that those who arrived knew and did.
Clock knowledge_of(const Gathering& gathering) {
    Clock all = gathering.arrivals[0].knew;
    const Clock* last = &gathering.arrivals[0].knew;
    for (const Gathering::Arrival& arrival : gathering.arrivals)
        if (!arrival.knew.same(*last)) {
            all = machine.joins.of(all, arrival.knew);
            last = &arrival.knew;
        }
    for (const Gathering::Arrival& arrival : gathering.arrivals)
        all.raise(arrival.thread->component, arrival.did);
    return all;
}

void release_waiting(Gathering& gathering) {
    for (Thread* const thread : gathering.waiting) wake(*thread);
    gathering.waiting.clear();
    gathering.arrivals.clear();
    ++gathering.generation;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Warps. Only __syncwarp orders memory: a shuffle and a ballot exchange values, and that is all.

namespace {

template <class Complete>
std::uint64_t gather(const char* what, unsigned mask, std::uint64_t value, Place place, bool orders,
                     const Complete& complete) {
    Thread& thread = here();
    thread.place = place;
    if (!(mask >> thread.lane & 1u)) fault(std::string(what) + " by a lane that its mask leaves out");
    std::vector<Gathering>& all = thread.warp->gatherings;
    auto found = std::find_if(all.begin(), all.end(), [&](const Gathering& g) { return g.mask & mask; });
    if (found == all.end()) {
        all.emplace_back();
        found = all.end() - 1;
        found->what = what;
        found->mask = mask;
        found->place = place;
    }
    if (found->what != what || found->mask != mask || found->place.line != place.line)
        fault(std::string("lanes of a warp diverge: one is at ") + what + " of " + text_of(place) + ", others at " +
              found->what + " of " + text_of(found->place));
    found->values[thread.lane] = value;
    arrive(*found);
    if (!orders) --thread.epoch;  // others learn nothing
    if (found->arrivals.size() < std::size_t(__builtin_popcount(mask))) {
        found->waiting.push_back(&thread);
        wait(what);
        return thread.result;
    }
    const Gathering full = std::move(*found);
    all.erase(found);
    const Clock knowledge = orders ? knowledge_of(full) : Clock();
    for (const Gathering::Arrival& arrival : full.arrivals) {
        Thread& member = *arrival.thread;
        member.result = complete(full.values, member);
        if (orders) member.knows = knowledge;
        if (&member != &thread) wake(member);
    }
    return thread.result;
}

}  // namespace

void sync_warp(unsigned mask, Place place) {
    gather("__syncwarp", mask, 0, place, true, [](const std::uint64_t*, const Thread&) { return 0; });
}

unsigned ballot(unsigned mask, bool vote, Place place) {
    const auto count = [mask](const std::uint64_t* votes, const Thread&) {
        unsigned result = 0;
        for (int lane = 0; lane < kLanes; ++lane)
            if (mask >> lane & 1u) result |= unsigned(votes[lane]) << lane;
        return result;
    };
    return static_cast<unsigned>(gather("ballot", mask, vote, place, false, count));
}

std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int from, Place place) {
    Thread& thread = here();
    if (!(mask >> from & 1u)) fault("a shuffle reads a lane that its mask leaves out");
    thread.shuffle_from = from;
    return gather("shuffle", mask, bits, place, false,
                  [](const std::uint64_t* values, const Thread& member) { return values[member.shuffle_from]; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and clusters

void sync_threads(Place place) {
    Thread& thread = here();
    thread.place = place;
    Block& block = *thread.block;
    Gathering& barrier = block.barrier;
    if (block.live != static_cast<int>(block.threads.size()))
        fault("__syncthreads after a thread of the block has exited");
    if (barrier.arrivals.empty()) barrier.place = place;
    if (barrier.place.line != place.line)
        fault("threads of a block diverge: one is at __syncthreads of " + text_of(place) + ", others at " +
              text_of(barrier.place));
    arrive(barrier);
    if (barrier.arrivals.size() < block.threads.size()) {
        barrier.waiting.push_back(&thread);
        wait("__syncthreads");
        return;
    }
    const Clock knowledge = knowledge_of(barrier);
    for (Thread& member : block.threads) member.knows = knowledge;
    release_waiting(barrier);
}

void arrive_at_cluster() {
    Thread& thread = here();
    Cluster& cluster = *thread.block->cluster;
    if (thread.cluster_arrived) fault("barrier.cluster.arrive twice without a wait between");
    thread.cluster_arrived = true;
    thread.cluster_generation = cluster.barrier.generation;
    arrive(cluster.barrier);
    if (cluster.barrier.arrivals.size() < cluster.threads) return;
    const Clock knowledge = knowledge_of(cluster.barrier);
    for (const Gathering::Arrival& arrival : cluster.barrier.arrivals) arrival.thread->from_cluster = knowledge;
    release_waiting(cluster.barrier);
}

void wait_for_cluster() {
    Thread& thread = here();
    Gathering& barrier = thread.block->cluster->barrier;
    if (!thread.cluster_arrived) fault("barrier.cluster.wait without an arrive before");
    if (barrier.generation == thread.cluster_generation) {
        barrier.waiting.push_back(&thread);
        wait("barrier.cluster.wait");
    }
    thread.cluster_arrived = false;
    learn(thread, thread.from_cluster);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fences and relaxed atomics: a fence before one synchronizes with a fence after another that reads it.

void thread_fence(Place place) {
    Thread& thread = here();
    thread.place = place;
    learn(thread, thread.observed);
    thread.fenced = publish(thread);
}

int atomic_add(int* at, int value, Place place) {
    Thread& thread = here();
    thread.place = place;
    check_atomic(thread, at);
    Clock& clock = machine.atomics[at];
    if (!thread.observed) thread.observed = Clock(machine.clock_size);
    thread.observed.join(clock);
    if (thread.fenced) {
        if (!clock) clock = Clock(machine.clock_size);
        clock.join(thread.fenced);
        clock.raise(thread.component, {thread.epoch++, thread.shown});  // the atomic itself
    }
    const int before = *at;
    *at = before + value;
    return before;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

float half_to_float(std::uint16_t bits) { return static_cast<float>(from_bits<_Float16>(bits)); }
std::uint16_t float_to_half(float x) { return static_cast<std::uint16_t>(to_bits(static_cast<_Float16>(x))); }

// ---------------------------------------------------------------------------------------------------------------------
// What tests call, through ctypes

extern "C" {

__attribute__((visibility("default"))) void emulator_configure(std::uint64_t seed, int processors, int shared_bytes,
                                                               int major) {
    settings = {seed, {processors, shared_bytes, major}};
    counted = {};
}

// Launches since the last emulator_configure: all, or of kernels in clusters of that many blocks.
__attribute__((visibility("default"))) int emulator_launches(int cluster) {
    return cluster ? counted.cluster_launches[cluster] : counted.launches;
}
}

}  // namespace emulator
