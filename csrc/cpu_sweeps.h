// The two sweeps of a contiguous row, in one version per instruction set, selected at run time.
//
// cpu_sweeps.cpp is compiled once for each of them, with its own compiler flags. No other file may be: the linker could
// pick an inline function from such an object, which would then fail on an older processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace epo {

struct Sweeps {
    const char* name;
    // Moments of x[0..n), as double sums in an order that depends only on n.
    Moments<double> (*moments)(const void* x, std::int64_t n, const Transform& transform, bool softcap);
    // Σ e^t (t - mean)² and Σ e^2t of x[0..n) relative to a known maximum.
    Spread<double> (*spread)(const void* x, std::int64_t n, const Transform& transform, bool softcap, float maximum,
                             float mean);
    // out[0..n) = gradient line over x[0..n); out may be x. stream: use streaming stores.
    void (*gradient)(const void* x, void* out, std::int64_t n, const Transform& transform, bool softcap, float maximum,
                     const GradientLine& line, bool stream);
    // One float32 rounded to the dtype.
    void (*round)(const float* x, void* out);
    // x[0..n) *= factor.
    void (*scale)(void* x, std::int64_t n, float factor);
};

// One table for each DType.
struct SweepTable {
    Sweeps of[3];
};

const SweepTable& sweeps_plain();
#if defined(EPO_HAS_X86_SWEEPS)
const SweepTable& sweeps_avx2();
const SweepTable& sweeps_avx512();
#endif

// The best table for this processor.
const SweepTable& best_sweeps();
// The named table ("plain", "avx2", "avx512"); null if this build or processor does not have it.
const SweepTable* sweeps_named(const char* name);

}  // namespace epo
