// The family that runs on any chip: one block per row, with one sweep for its statistics and one for its gradient.
//
// Any strides, width and dtype, and softcap. A loss with gradient moves two reads and one write of the row, unless the
// L2 cache retains it: to help it do so, the second sweep goes backwards (the end of the row is most recent), and the
// gradient is stored evict-first. Blocks are small and many, so that some compute while others wait for a row's first
// loads, its barriers or the maths of its token. Grids are persistent: block i processes rows i, i + blocks, ..., and
// adds up its sums in that order.
//
// Barriers per row: 2 (statistics 2, spread 2, gradient 2, loss 3).
#pragma once

#include "cuda_common.cuh"

namespace epo {
namespace sweeps {

constexpr int kThreads = 128;
constexpr int kBlocks = 5;  // per multiprocessor: 96 registers a thread; with 80 one of the kernels spills

// (B, T) float32, contiguous.
struct SpreadResults {
    float *variance, *collision;
};

struct Arguments {
    Rows rows;
    Terms terms;            // loss
    Statistics statistics;  // statistics: results; gradient, spread: arguments
    SpreadResults spread;   // spread
    Upstream upstream;      // gradient
    LossResults results;    // loss
    Matrix out;             // loss, gradient; data null: none
};

// A thread's view of one row: vectors of the aligned body, edges, or single strided elements.
template <class Element, bool Softcap>
struct RowView {
    using Stored = typename Element::Stored;
    static constexpr int kPerVector = Element::kPerVector;
    static constexpr int kInFlight = Softcap ? 2 : 4;                                  // vectors; tanh takes registers
    static constexpr int kGroup = Softcap ? 1 : 16 / kPerVector;  // vectors

    const Stored* x;
    std::int64_t size, stride;
    Transform transform;
    float outer2;
    RowTiles<1, kVectorBytes * kLanes> parts;

    __device__ RowView(const Rows& rows, const TokenPlace& at, const Transform& transform_)
        : x(row_of<Element>(rows.logits, at)),
          size(rows.vocab_size),
          stride(rows.logits.vocab_stride),
          transform(transform_),
          outer2(transform_.outer * kLog2E),
          parts(reinterpret_cast<std::uint64_t>(x), rows.vocab_size * std::int64_t(sizeof(Stored))) {}

    __device__ float argument(float raw) const { return Softcap ? tanhf(raw * transform.inner) : raw * transform.inner; }
    __device__ float at(std::int64_t v) const { return argument(Element::load(x + v * stride)); }
    __device__ const char* body() const { return reinterpret_cast<const char*>(x) + parts.head_bytes; }
    __device__ uint4 vector(std::int64_t i) const { return reinterpret_cast<const uint4*>(body())[i]; }
    __device__ std::int64_t vectors() const { return parts.body_bytes / kVectorBytes; }
    // This thread's element among the row's edges, -1 if it has none.
    __device__ std::int64_t edge() const {
        const std::int64_t byte = threadIdx.x < kLanes ? parts.edge_of(threadIdx.x, sizeof(Stored)) : -1;
        return byte < 0 ? -1 : byte / std::int64_t(sizeof(Stored));
    }

    template <int Vectors>
    __device__ void unpack(const uint4* raw, float (&y)[Vectors * kPerVector]) const {
#pragma unroll
        for (int k = 0; k < Vectors; ++k) {
            float part[kPerVector];
            Element::unpack(raw[k], part);
#pragma unroll
            for (int i = 0; i < kPerVector; ++i) y[k * kPerVector + i] = argument(part[i]);
        }
    }

    // Calls add with every y of this thread, in arrays whose length is known when it is compiled.
    template <class Add>
    __device__ void for_each_group(const Add& add) const {
        if (stride != 1) {
            for (std::int64_t v = threadIdx.x; v < size; v += blockDim.x) {
                const float one[1] = {at(v)};
                add(one);
            }
            return;
        }
        const std::int64_t count = vectors(), step = blockDim.x;
        std::int64_t i = threadIdx.x;
        for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
            uint4 raw[kInFlight];
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) raw[k] = vector(i + k * step);
#pragma unroll
            for (int k = 0; k < kInFlight; k += kGroup) {
                float y[kGroup * kPerVector];
                unpack<kGroup>(raw + k, y);
                add(y);
            }
        }
        for (; i < count; i += step) {
            const uint4 raw = vector(i);
            float y[kPerVector];
            unpack<1>(&raw, y);
            add(y);
        }
        if (const std::int64_t v = edge(); v >= 0) {
            const float one[1] = {at(v)};
            add(one);
        }
    }

    __device__ Moments2 moments() const {
        Moments2 run = no_moments<float>();
        for_each_group([&](const auto& y) { add_group(run, y, outer2); });
        return run;
    }

    __device__ Spread2 spread(float m, float mean) const {
        Spread2 run{0.0f, 0.0f};
        const float scale = outer2;
        for_each_group([&run, scale, m, mean](const auto& y) { add_spread_group(run, y, scale, m, mean); });
        return run;
    }
};

template <class Element, bool Softcap>
struct GradientWriter {
    using Stored = typename Element::Stored;
    static constexpr int kPerVector = Element::kPerVector;
    static constexpr int kInFlight = RowView<Element, Softcap>::kInFlight;

    RowView<Element, Softcap> row;
    Stored* out;
    std::int64_t out_stride;
    Slope2 slope;

    __device__ float of(float y) const {
        const float gradient = slope.of(y);
        return Softcap ? gradient * (1.0f - y * y) : gradient;
    }
    __device__ void write(std::int64_t v) const { Element::store(out + v * out_stride, of(row.at(v))); }

    __device__ void write_vector(std::int64_t i, const uint4& raw, bool aligned) const {
        float y[kPerVector];
        row.template unpack<1>(&raw, y);
#pragma unroll
        for (int k = 0; k < kPerVector; ++k) y[k] = of(y[k]);
        char* const target = reinterpret_cast<char*>(out) + row.parts.head_bytes + i * kVectorBytes;
        if (aligned) {
            __stcs(reinterpret_cast<uint4*>(target), Element::pack(y));
        } else {
#pragma unroll
            for (int k = 0; k < kPerVector; ++k) Element::store(reinterpret_cast<Stored*>(target) + k, y[k]);
        }
    }

    __device__ void write_all() const {
        if (row.stride != 1 || out_stride != 1) {
            for (std::int64_t v = threadIdx.x; v < row.size; v += blockDim.x) write(v);
            return;
        }
        const std::int64_t count = row.vectors(), step = blockDim.x, group = kInFlight * step;
        const bool aligned = (reinterpret_cast<std::uint64_t>(out) - reinterpret_cast<std::uint64_t>(row.x)) %
                                 kVectorBytes == 0;
        const std::int64_t whole = count / group * group;
        for (std::int64_t i = whole + threadIdx.x; i < count; i += step) write_vector(i, row.vector(i), aligned);
        for (std::int64_t start = whole - group; start >= 0; start -= group) {
            uint4 raw[kInFlight];
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) raw[k] = row.vector(start + threadIdx.x + k * step);
#pragma unroll
            for (int k = 0; k < kInFlight; ++k)
                write_vector(start + threadIdx.x + k * step, raw[k], aligned);
        }
        if (const std::int64_t v = row.edge(); v >= 0) write(v);
    }
};

template <class Element>
__device__ void clear(const Rows& rows, const Matrix& out, const TokenPlace& at, std::int64_t from) {
    typename Element::Stored* const row = row_of<Element>(out, at);
    if (out.vocab_stride == 1) return clear_row<Element>(row, from, rows.width, threadIdx.x, blockDim.x);
    for (std::int64_t v = from + threadIdx.x; v < rows.width; v += blockDim.x)
        Element::store(row + v * out.vocab_stride, 0.0f);
}

// The gradient parameters of a row, besides its statistics. y_token: read before the logits may be overwritten.
template <class Element, bool Softcap>
__device__ void write_gradient(const Rows& rows, const Matrix& out, const TokenPlace& at,
                               const RowView<Element, Softcap>& view, const RowStats& stats, float a, float b,
                               std::int64_t token, float y_token) {
    typename Element::Stored* const target = row_of<Element>(out, at);
    GradientWriter<Element, Softcap>{view, target, out.vocab_stride, slope2(a, b, stats, view.transform)}.write_all();
    clear<Element>(rows, out, at, rows.vocab_size);
    __syncthreads();
    if (threadIdx.x == 0 && token >= 0) {
        const float slope = Softcap ? 1.0f - y_token * y_token : 1.0f;
        Element::store(target + token * out.vocab_stride, slope * token_gradient(a, b, stats, view.transform));
    }
}

// The token of a row, -1 if it is invalid.
__device__ inline std::int64_t token_of(const Rows& rows, const TokenPlace& at) {
    const std::int64_t token = rows.tokens.at(at.b, at.t);
    return token >= 0 && token < rows.vocab_size ? token : -1;
}

__device__ inline Moments2 block_merge(const Moments2& thread, float outer2) {
    __shared__ Moments2 parts[kThreads / kLanes];
    const Moments2 warp = warp_merge(thread, outer2);
    const int lane = threadIdx.x % kLanes;
    if (lane == 0) parts[threadIdx.x / kLanes] = warp;
    __syncthreads();
    const Moments2 part = lane < blockDim.x / kLanes ? parts[lane] : no_moments<float>();
    return warp_merge(part, outer2);
}

// Valid in the first thread.
__device__ inline Spread2 block_sum(const Spread2& thread) {
    __shared__ Spread2 parts[kThreads / kLanes];
    const Spread2 warp{warp_sum(thread.variance), warp_sum(thread.collision)};
    const int lane = threadIdx.x % kLanes;
    if (lane == 0) parts[threadIdx.x / kLanes] = warp;
    __syncthreads();
    const Spread2 part = lane < blockDim.x / kLanes ? parts[lane] : Spread2{0.0f, 0.0f};
    return {warp_sum(part.variance), warp_sum(part.collision)};
}

template <class Element, bool Softcap>
__global__ void __launch_bounds__(kThreads, kBlocks) spread_kernel(const __grid_constant__ Arguments args) {
    const Rows& rows = args.rows;
    for (std::int64_t i = blockIdx.x; i < rows.batch * rows.time; i += gridDim.x) {
        const TokenPlace at = place_of(rows, i);
        Spread2 spread{0.0f, 0.0f};
        if (rows.mask.at(at.b, at.t)) {
            const RowView<Element, Softcap> view(rows, at, transform_at(rows, at.b, at.t));
            const float s = args.statistics.sum[i];
            const float mean = mean_exponent(s, args.statistics.entropy[i]);
            spread = normalized(block_sum(view.spread(args.statistics.maximum[i], mean)), s);
        }
        if (threadIdx.x == 0) {
            args.spread.variance[i] = spread.variance;
            args.spread.collision[i] = spread.collision;
        }
        __syncthreads();  // the next row's parts go to the same place
    }
}

template <class Element, bool Softcap>
__global__ void __launch_bounds__(kThreads, kBlocks) statistics_kernel(const __grid_constant__ Arguments args) {
    const Rows& rows = args.rows;
    for (std::int64_t i = blockIdx.x; i < rows.batch * rows.time; i += gridDim.x) {
        const TokenPlace at = place_of(rows, i);
        RowStats stats{};
        if (rows.mask.at(at.b, at.t)) {
            const Transform transform = transform_at(rows, at.b, at.t);
            const RowView<Element, Softcap> view(rows, at, transform);
            const std::int64_t token = token_of(rows, at);
            const float y_token = token < 0 ? NAN : view.at(token);
            stats = finish2(block_merge(view.moments(), view.outer2), y_token, transform.outer);
        }
        if (threadIdx.x == 0) {
            args.statistics.log_probs[i] = stats.log_prob;
            if (args.statistics.entropy) args.statistics.entropy[i] = stats.entropy;
            args.statistics.maximum[i] = stats.m;  // of y, as the gradient wants it
            args.statistics.sum[i] = stats.s;
        }
        __syncthreads();
    }
}

template <class Element, bool Softcap>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_kernel(const __grid_constant__ Arguments args) {
    const Rows& rows = args.rows;
    for (std::int64_t i = blockIdx.x; i < rows.batch * rows.time; i += gridDim.x) {
        const TokenPlace at = place_of(rows, i);
        if (!rows.mask.at(at.b, at.t)) {
            clear<Element>(rows, args.out, at, 0);
            continue;
        }
        const Transform transform = transform_at(rows, at.b, at.t);
        const RowView<Element, Softcap> view(rows, at, transform);
        const std::int64_t token = token_of(rows, at);
        const float y_token = token < 0 ? NAN : view.at(token);
        const Statistics& saved = args.statistics;
        const RowStats stats{saved.log_probs[i], saved.entropy ? saved.entropy[i] : 0.0f, saved.maximum[i],
                             saved.sum[i]};
        const float a = stats.log_prob == stats.log_prob ? args.upstream.log_probs.at(at.b, at.t) : NAN;
        const float b = args.upstream.entropy ? args.upstream.entropy.at(at.b, at.t) : 0.0f;
        __syncthreads();  // every thread has read its token's logit
        write_gradient<Element, Softcap>(rows, args.out, at, view, stats, a, b, token, y_token);
    }
}

template <class Element, bool Softcap>
__global__ void __launch_bounds__(kThreads, kBlocks) loss_kernel(const __grid_constant__ Arguments args) {
    const Rows& rows = args.rows;
    const Coefficients coefficients = read_coefficients(args.terms.coefficients);
    __shared__ double sums[kNumSums];
    if (threadIdx.x < kNumSums) sums[threadIdx.x] = 0.0;
    __syncthreads();
    for (std::int64_t i = blockIdx.x; i < rows.batch * rows.time; i += gridDim.x) {
        const TokenPlace at = place_of(rows, i);
        if (!rows.mask.at(at.b, at.t)) {
            if (args.out.data) clear<Element>(rows, args.out, at, 0);
            if (threadIdx.x == 0) args.results.log_probs[i] = args.results.entropy[i] = 0.0f;
            continue;
        }
        const Transform transform = transform_at(rows, at.b, at.t);
        const RowView<Element, Softcap> view(rows, at, transform);
        const std::int64_t token = token_of(rows, at);
        const float y_token = token < 0 ? NAN : view.at(token);
        const RowStats stats = finish2(block_merge(view.moments(), view.outer2), y_token, transform.outer);
        const TokenTerms terms = terms_at(args.terms, at.b, at.t);
        const TokenLoss loss = token_loss(stats.log_prob, stats.entropy, terms, coefficients, args.terms.choices);
        if (threadIdx.x == 0) {
            args.results.log_probs[i] = stats.log_prob;
            args.results.entropy[i] = stats.entropy;
            add_sums(sums, loss, stats.log_prob, stats.entropy, terms.weight, token < 0);
        }
        if (args.out.data) {
            write_gradient<Element, Softcap>(rows, args.out, at, view, stats, terms.weight * loss.d_log_prob,
                                             terms.weight * loss.d_entropy, token, y_token);
        }
        __syncthreads();  // the block's shared memory is free for the next row
    }
    publish_sums(sums, args.results.workspace, args.results.ticket, blockIdx.x, gridDim.x, args.results.sums,
                 args.results.loss);
}

// out = values * factor, rounded once. In place with a factor of 1, nothing is read or written.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const void* values, void* out, std::int64_t count, const float* factor) {
    const float by = *factor;
    if (by == 1.0f && values == out) return;
    constexpr int kPerVector = To::kPerVector, kPerLoad = From::kPerVector, kLoads = kPerVector / kPerLoad;
    static_assert(kPerVector % kPerLoad == 0, "each vector of the result takes whole vectors of values");
    const auto* const from = static_cast<const typename From::Stored*>(values);
    auto* const to = static_cast<typename To::Stored*>(out);
    const RowTiles<1, kVectorBytes * kLanes> parts(reinterpret_cast<std::uint64_t>(out),
                                                   count * std::int64_t(sizeof(*to)));
    const std::int64_t head = parts.head_bytes / std::int64_t(sizeof(*to));
    const bool aligned_alike = reinterpret_cast<std::uint64_t>(from + head) % kVectorBytes == 0;
    const std::int64_t vectors = aligned_alike ? parts.body_bytes / kVectorBytes : 0;
    const std::int64_t worker = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t workers = std::int64_t(gridDim.x) * blockDim.x;
    const auto* const loads = reinterpret_cast<const uint4*>(from + head);
    auto* const stores = reinterpret_cast<uint4*>(to + head);
    for (std::int64_t i = worker; i < vectors; i += workers) {
        float x[kLoads][kPerLoad], y[kPerVector];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) From::unpack(loads[i * kLoads + k], x[k]);
#pragma unroll
        for (int k = 0; k < kPerVector; ++k) y[k] = x[k / kPerLoad][k % kPerLoad] * by;
        stores[i] = To::pack(y);
    }
    const std::int64_t in_vectors = vectors * kPerVector;
    for (std::int64_t i = worker; i < count - in_vectors; i += workers) {
        const std::int64_t at = i < head ? i : i + in_vectors;
        To::store(to + at, From::load(from + at) * by);
    }
}

}  // namespace sweeps
}  // namespace epo
