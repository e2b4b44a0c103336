// The row kernels on the CPU: the interface of RowKernels in epo_kernels/fused/rows.py.
//
// Arguments have been validated. Results do not depend on the number of threads.
#pragma once

#include "cpu_sweeps.h"
#include "rows.h"

namespace epo {

// Execution options of a call.
struct Machine {
    int threads;
    const SweepTable* sweeps;
};

void cpu_statistics(const Rows& rows, const Statistics& out, const Machine& machine);

// variance, collision: (B, T), contiguous. statistics: of whole rows, with their entropy; log_probs are not read.
void cpu_spread(const Rows& rows, const Statistics& statistics, float* variance, float* collision,
                const Machine& machine);

// Writes every element of `out` (width of rows.width): 0 in masked rows and past vocab_size.
void cpu_gradient(const Rows& rows, const Statistics& statistics, const Upstream& upstream, const Matrix& out,
                  const Machine& machine);

// log_probs, entropy: (B, T), contiguous. sums: kNumSums, at the places of RowSums. out.data null: no gradient.
void cpu_loss(const Rows& rows, const Terms& terms, const Matrix& out, float* log_probs, float* entropy, double* sums,
              const Machine& machine);

// x[0..count) *= factor, contiguous.
void cpu_scale(void* x, DType dtype, std::int64_t count, float factor, const Machine& machine);

}  // namespace epo
