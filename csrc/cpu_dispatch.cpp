// Selects the compiled sweeps for this processor.
#include <cstring>

#include "cpu_sweeps.h"

namespace epo {
namespace {

#if defined(EPO_HAS_X86_SWEEPS)
// The compiler's own test also checks the operating system's support for the registers.
bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const SweepTable* sweeps_named(const char* name) {
#if defined(EPO_HAS_X86_SWEEPS)
    if (!std::strcmp(name, "avx512")) return runs_avx512() ? &sweeps_avx512() : nullptr;
    if (!std::strcmp(name, "avx2")) return runs_avx2() ? &sweeps_avx2() : nullptr;
#endif
    return std::strcmp(name, "plain") ? nullptr : &sweeps_plain();
}

const SweepTable& best_sweeps() {
    static const SweepTable* const best = [] {
        const SweepTable* table = sweeps_named("avx512");
        if (!table) table = sweeps_named("avx2");
        return table ? table : &sweeps_plain();
    }();
    return *best;
}

}  // namespace epo
