// The small launch before a loss: token weights and coefficients, from numbers that may be on the device.
#pragma once

#include "cuda_common.cuh"

namespace epo {
namespace prepare {

constexpr int kThreads = 256;
constexpr int kTokensPerBlock = 4 * kThreads;

struct Sequences {
    float total, with_tokens;  // counted tokens, and sequences that have any
};

// Every block reads all lengths in the same order, so that no block waits for another.
__device__ inline Sequences read_lengths(const Aggregation& aggregation) {
    __shared__ float totals[kThreads], with_tokens[kThreads];
    float total = 0.0f, with = 0.0f;
    for (std::int64_t i = threadIdx.x; i < aggregation.sequences; i += kThreads) {
        const float length = static_cast<float>(aggregation.lengths[i]);
        total += length;
        with += length > 0.0f ? 1.0f : 0.0f;
    }
    totals[threadIdx.x] = total, with_tokens[threadIdx.x] = with;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            totals[threadIdx.x] += totals[threadIdx.x + half];
            with_tokens[threadIdx.x] += with_tokens[threadIdx.x + half];
        }
        __syncthreads();
    }
    return {totals[0], with_tokens[0]};
}

// Weight w of a counted token in a sequence of that length (epo_kernels/aggregation.py).
__device__ inline float weight_of(const Aggregation& aggregation, const Sequences& sequences, float length) {
    const float counted = aggregation.mode == AggMode::token_mean ? sequences.total : sequences.with_tokens;
    float denominator = aggregation.normalized ? aggregation.normalizer.get() : fmaxf(counted, 1.0f);
    if (aggregation.mode == AggMode::seq_mean_token_mean) denominator *= fmaxf(length, 1.0f);
    if (aggregation.mode == AggMode::seq_mean_token_sum_norm) denominator *= aggregation.max_length;
    return aggregation.loss_scale.get() / denominator;
}

__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Aggregation aggregation,
                                                   const __grid_constant__ Prepared out) {
    const Sequences sequences = read_lengths(aggregation);
    if (blockIdx.x == 0) {
        if (threadIdx.x < kNumCoefficients)
            out.coefficients[threadIdx.x] = aggregation.coefficients[threadIdx.x].get();
        if (threadIdx.x == 0) {
            *out.ticket = 0;
            out.extras[0] = sequences.with_tokens;
            out.extras[1] = 0.0;
        }
    }
    const std::int64_t count = aggregation.batch * aggregation.time;
    for (int k = 0; k < kTokensPerBlock / kThreads; ++k) {
        const std::int64_t i = std::int64_t(blockIdx.x) * kTokensPerBlock + k * kThreads + threadIdx.x;
        if (i >= count) return;
        const std::int64_t b = i / aggregation.time, t = i % aggregation.time;
        float weight = 0.0f;
        if (aggregation.mask.at(b, t)) {
            const std::int64_t sequence = aggregation.sequence_ids ? aggregation.sequence_ids.at(b, t) : b;
            weight = weight_of(aggregation, sequences, static_cast<float>(aggregation.lengths[sequence]));
        }
        out.weights[i] = weight;
    }
}

}  // namespace prepare
}  // namespace epo
