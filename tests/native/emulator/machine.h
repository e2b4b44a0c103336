// The emulated GPU while it runs a grid: its threads, and their synchronisation.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "device.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr std::size_t kMostSharedBytes = 256 * 1024;

struct Block;
struct Thread;
struct Barrier;     // an mbarrier

// Threads that wait for each other, each with what it knew when it arrived.
struct Gathering {
    struct Arrival {
        Thread* thread;
        Clock knew;
        Stamp did;
    };
    const char* what = nullptr;
    Place place{};
    unsigned mask = 0;        // of lanes, in a warp
    unsigned generation = 0;  // times that it was complete
    std::vector<Arrival> arrivals;
    std::vector<Thread*> waiting;
    std::uint64_t values[kLanes];
};

struct Warp {
    std::vector<Gathering> gatherings;  // by mask
};

struct Cluster {
    std::vector<Block*> blocks;
    Gathering barrier;
    std::size_t threads = 0;
};

struct Thread {
    Block* block = nullptr;
    Warp* warp = nullptr;
    int component = 0, in_block = 0, lane = 0;
    Index index;

    void* fiber = nullptr;
    enum { ready, waiting, done } state = ready;
    const char* waits_for = "";
    Place place{};
    std::uint64_t result = 0;  // of a warp's collective
    int shuffle_from = 0;

    // What it knows. `epoch` counts up whenever others learn what it did.
    Clock knows;
    std::uint32_t epoch = 1, shown = 0;
    Clock fenced, observed;  // fences around relaxed atomics: as of the last fence; read since then

    unsigned cluster_generation = 0;     // of the cluster's barrier, when the thread arrived
    bool cluster_arrived = false;
    Clock from_cluster;                  // what its barrier gave the thread to know
};

struct Block {
    int number = 0, rank = 0, live = 0;
    Index index;
    Cluster* cluster = nullptr;
    char* shared = nullptr;
    std::size_t shared_end = 0;
    std::unordered_map<int, std::size_t> variables;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Gathering barrier;
    std::map<std::size_t, std::shared_ptr<Barrier>> barriers;  // by offset in shared memory
};

// Random numbers of a launch, the same everywhere.
class Random {
public:
    explicit Random(std::uint64_t seed = 0) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }
    bool chance(int percent) { return below(100) < static_cast<std::size_t>(percent); }

private:
    std::uint64_t state_;
};

struct Machine {
    Index grid, block_size;
    std::size_t dynamic_bytes = 0, clock_size = 0;
    std::vector<Block> blocks;
    std::vector<Cluster> clusters;
    std::vector<Thread*> ready;
    std::vector<std::string> async_components;  // after the threads'
    std::size_t thread_count = 0;
    Thread* current = nullptr;
    const Warp* favourite = nullptr;  // of the scheduler
    Joins joins;
    Random random;
    std::unordered_map<int*, Clock> atomics;
    std::vector<Constant> constants;
};
extern Machine machine;

// Ends the launch with an error that gives the fault and the position of the running thread.
[[noreturn]] void fault(const std::string& what);

std::string name_of(const Thread& thread);
std::string name_of_component(std::size_t component);
std::string text_of(const Place& place);
int new_component(std::string name);

// The running thread gives way until wake(). `what` must outlive the wait.
void wait(const char* what);
void wake(Thread& thread);

// Adds what `clock` knows to what the thread knows.
void learn(Thread& thread, const Clock& clock);
// What the thread knows and did, for others to learn.
Clock publish(Thread& thread);

void arrive_at_cluster();
void wait_for_cluster();

}  // namespace emulator
