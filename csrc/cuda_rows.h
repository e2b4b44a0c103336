// The row kernels on CUDA: the interface of RowKernels in epo_kernels/fused/rows.py. They launch on the caller's
// stream, never sync, and allocate no memory, so they can be captured in a graph. Arguments have been validated; every
// function returns null, or CUDA's error message.
#pragma once

#include "rows.h"

namespace epo {

struct CudaPlace {
    int device;
    void* stream;  // cudaStream_t
};

// Results of a loss, and what is needed to sum them: `ticket` is initially 0 and reset to 0, `workspace` has room for
// kNumSums doubles for each of cuda_most_blocks(device) blocks.
struct LossResults {
    float *log_probs, *entropy;
    double* sums;
    float* loss;
    double* workspace;
    int* ticket;
};

const char* cuda_statistics(const Rows& rows, const Statistics& out, const CudaPlace& place);

// See cpu_spread.
const char* cuda_spread(const Rows& rows, const Statistics& statistics, float* variance, float* collision,
                        const CudaPlace& place);

const char* cuda_gradient(const Rows& rows, const Statistics& statistics, const Upstream& upstream, const Matrix& out,
                          const CudaPlace& place);

// Kernel family of a loss; `chosen` uses the ring wherever it can run.
enum class Family : int { chosen, sweeps, ring };

// out.data null: no gradient. Requesting a ring that cannot run here is an error. ran: the launched family.
const char* cuda_loss(const Rows& rows, const Terms& terms, const Matrix& out, const LossResults& results,
                      Family family, const CudaPlace& place, Family& ran);

// A number known on the host, or one on the device.
struct Scalar {
    float value = 0.0f;
    const float* device = nullptr;
    EPO_FN float get() const { return device ? *device : value; }
};

// How tokens are weighted; the formulas are in epo_kernels/aggregation.py.
struct Aggregation {
    std::int64_t batch, time, sequences;
    PerToken<const bool> mask;
    PerToken<const std::int64_t> sequence_ids;  // null: each batch row is a sequence
    const std::int64_t* lengths;                // counted tokens of each sequence
    AggMode mode;
    bool normalized;
    Scalar normalizer, loss_scale;
    float max_length;
    Scalar coefficients[kNumCoefficients];
};

// weights: (B, T), contiguous. extras: the sequences that have tokens, and 0.
struct Prepared {
    float *weights, *coefficients;
    int* ticket;
    double* extras;
};

const char* cuda_prepare(const Aggregation& aggregation, const Prepared& out, const CudaPlace& place);

// out[0..count) = values[0..count) * *factor, contiguous. out is values itself, not touched if the factor is 1, or
// memory of its own: of values' dtype, or of any if values are float32.
const char* cuda_scale(const void* values, DType dtype, void* out, DType out_dtype, std::int64_t count,
                       const float* factor, const CudaPlace& place);

// Upper bound of the number of blocks that a loss launches, for its workspace.
const char* cuda_most_blocks(int device, int* blocks);

// Null if this build has machine code for the device, otherwise the error message.
const char* cuda_supports(int device);

}  // namespace epo
