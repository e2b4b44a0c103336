// Inline PTX, read as text and interpreted.
#pragma once

#include <string>
#include <vector>

#include "device.h"

namespace emulator {

// An asm statement of the sources. translate.py writes them all into one table.
struct Site {
    const char* text;
    bool clobbers_memory;
    const char* file;
    int line;
};
extern const Site kSites[];
extern const int kSiteCount;

// mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1
struct Instruction {
    enum class Name {
        move, map, cluster_arrive, cluster_wait, barrier_init, fence_barrier_init, fence_proxy, arrive, arrive_expect,
        try_wait, branch, store_async, bulk_load, exp2
    } name;
    std::string text;
    std::vector<std::string> modifiers, operands;
    std::string predicate;  // register; empty: none
    bool negated = false;
    int target = 0;         // of a branch: the next instruction's number

    bool has(const char* modifier) const;
};

std::vector<Instruction> parse(const Site& site);

}  // namespace emulator
