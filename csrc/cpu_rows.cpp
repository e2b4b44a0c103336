#include "cpu_rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "thread_pool.h"

namespace epo {
namespace {

// Minimum number of elements per task, so that scheduling costs are negligible.
constexpr std::int64_t kTaskElements = 1 << 15;
// A larger gradient does not stay in the caches anyway, so it is written with streaming stores.
constexpr std::int64_t kStreamBytes = 16 << 20;

constexpr std::int64_t kHugePage = 2 << 20;

// Fresh memory is cheaper in huge pages. Advice only, and only for pages entirely inside the array.
void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__)
    const auto start = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
    if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// The row of one token. Non-contiguous rows are gathered into a copy and scattered from it.
class Row {
public:
    Row(const Rows& rows, std::int64_t index)
        : rows_(rows), b_(index / rows.time), t_(index % rows.time), size_(size_of(rows.dtype)) {}

    std::int64_t b() const { return b_; }
    std::int64_t t() const { return t_; }
    bool counted() const { return rows_.mask.at(b_, t_); }
    std::int64_t token() const { return rows_.tokens.at(b_, t_); }
    bool valid() const { return token() >= 0 && token() < rows_.vocab_size; }
    Transform transform() const { return transform_at(rows_, b_, t_); }

    const void* logits(std::vector<char>& scratch) const {
        const char* const first = at(rows_.logits, 0);
        if (rows_.logits.vocab_stride == 1) return first;
        scratch.resize(static_cast<std::size_t>(rows_.vocab_size * size_));
        for (std::int64_t v = 0; v < rows_.vocab_size; ++v)
            std::memcpy(&scratch[static_cast<std::size_t>(v * size_)], at(rows_.logits, v), size_);
        return scratch.data();
    }

    void scatter(const std::vector<char>& values, const Matrix& out) const {
        for (std::int64_t v = 0; v < rows_.vocab_size; ++v)
            std::memcpy(at(out, v), &values[static_cast<std::size_t>(v * size_)], size_);
    }

    // 0 in [from, width): all bits 0 in every dtype.
    void clear(const Matrix& out, std::int64_t from) const {
        if (out.vocab_stride == 1) {
            std::memset(at(out, from), 0, static_cast<std::size_t>((rows_.width - from) * size_));
            return;
        }
        for (std::int64_t v = from; v < rows_.width; ++v) std::memset(at(out, v), 0, size_);
    }

    char* at(const Matrix& matrix, std::int64_t v) const {
        const std::int64_t element = matrix.offset(b_, t_) + v * matrix.vocab_stride;
        return static_cast<char*>(matrix.data) + element * static_cast<std::int64_t>(size_);
    }

private:
    const Rows& rows_;
    std::int64_t b_, t_;
    std::size_t size_;
};

float to_float(const void* x, DType dtype) {
    if (dtype == DType::float32) {
        float value;
        std::memcpy(&value, x, 4);
        return value;
    }
    std::uint16_t half;
    std::memcpy(&half, x, 2);
    std::uint32_t raw = std::uint32_t(half) << 16;
    float value;
    if (dtype == DType::bfloat16) {
        std::memcpy(&value, &raw, 4);
        return value;
    }
    const std::uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
    const float magnitude = exponent == 0      ? std::ldexp(float(mantissa), -24)
                            : exponent == 0x1f ? (mantissa ? NAN : INFINITY)
                                               : std::ldexp(float(mantissa | 0x400u), int(exponent) - 25);
    return half & 0x8000u ? -magnitude : magnitude;
}

// y of the token. NaN for an invalid token, which makes its log-prob and everything derived from it NaN.
float argument_of_token(const Rows& rows, const Row& row, const void* x, const Transform& transform) {
    if (!row.valid()) return NAN;
    const float raw = to_float(static_cast<const char*>(x) + row.token() * size_of(rows.dtype), rows.dtype);
    return rows.softcap > 0.0f ? std::tanh(raw * transform.inner) : raw * transform.inner;
}

RowStats statistics_of(const Rows& rows, const Row& row, const void* x, const Transform& transform,
                       const Sweeps& sweeps) {
    const auto moments = sweeps.moments(x, rows.vocab_size, transform, rows.softcap > 0.0f);
    return finish(moments, argument_of_token(rows, row, x, transform), transform.outer);
}

// One row's gradient, from its statistics and a = ∂loss/∂logp, b = ∂loss/∂H.
void write_gradient(const Rows& rows, const Row& row, const void* x, const RowStats& stats, float a, float b,
                    const Transform& transform, const Matrix& out, bool stream, const Sweeps& sweeps) {
    const bool softcap = rows.softcap > 0.0f;
    const float y = argument_of_token(rows, row, x, transform);  // before x may be overwritten
    std::vector<char> scattered;
    const bool contiguous = out.vocab_stride == 1;
    if (!contiguous) scattered.resize(static_cast<std::size_t>(rows.vocab_size * size_of(rows.dtype)));
    char* const target = contiguous ? row.at(out, 0) : scattered.data();
    const GradientLine line = gradient_line(a, b, stats, transform);
    sweeps.gradient(x, target, rows.vocab_size, transform, softcap, stats.m, line, stream && contiguous);
    if (row.valid()) {
        const float slope = softcap ? 1.0f - y * y : 1.0f;
        const float gradient = slope * token_gradient(a, b, stats, transform);
        sweeps.round(&gradient, target + row.token() * size_of(rows.dtype));
    }
    if (!contiguous) row.scatter(scattered, out);
    row.clear(out, rows.vocab_size);
}

// Tasks of rows; their size, and therefore the order of partial sums, depends only on the width.
template <class Task>
void for_each_task(const Rows& rows, const Machine& machine, const Task& task) {
    const std::int64_t count = rows.batch * rows.time;
    const std::int64_t per_task = std::max<std::int64_t>(1, kTaskElements / rows.width);
    parallel_for((count + per_task - 1) / per_task, machine.threads, [&](std::int64_t i) {
        task(i, i * per_task, std::min(count, (i + 1) * per_task));
    });
}

std::int64_t tasks_of(const Rows& rows) {
    const std::int64_t per_task = std::max<std::int64_t>(1, kTaskElements / rows.width);
    return (rows.batch * rows.time + per_task - 1) / per_task;
}

const Sweeps& sweeps_for(const Rows& rows, const Machine& machine) {
    return machine.sweeps->of[static_cast<int>(rows.dtype)];
}

// Whether to use streaming stores; also advises on fresh memory.
bool prepare_output(const Rows& rows, const Matrix& out) {
    const std::int64_t bytes = rows.batch * rows.time * rows.width * size_of(rows.dtype);
    if (out.data == rows.logits.data || bytes < kStreamBytes) return false;
    const bool dense = out.vocab_stride == 1 && out.time_stride == rows.width && out.batch_stride == rows.time * rows.width;
    if (dense) advise_huge_pages(out.data, bytes);
    return true;
}

}  // namespace

void cpu_statistics(const Rows& rows, const Statistics& out, const Machine& machine) {
    const Sweeps& sweeps = sweeps_for(rows, machine);
    for_each_task(rows, machine, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        std::vector<char> scratch;
        for (std::int64_t i = begin; i < end; ++i) {
            const Row row(rows, i);
            RowStats stats{};
            if (row.counted()) stats = statistics_of(rows, row, row.logits(scratch), row.transform(), sweeps);
            out.log_probs[i] = stats.log_prob;
            if (out.entropy) out.entropy[i] = stats.entropy;
            out.maximum[i] = stats.m;
            out.sum[i] = stats.s;
        }
    });
}

void cpu_spread(const Rows& rows, const Statistics& statistics, float* variance, float* collision,
                const Machine& machine) {
    const Sweeps& sweeps = sweeps_for(rows, machine);
    for_each_task(rows, machine, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        std::vector<char> scratch;
        for (std::int64_t i = begin; i < end; ++i) {
            const Row row(rows, i);
            Spread<double> spread{0.0, 0.0};
            if (row.counted()) {
                const float s = statistics.sum[i];
                spread = normalized(
                    sweeps.spread(row.logits(scratch), rows.vocab_size, row.transform(), rows.softcap > 0.0f,
                                  statistics.maximum[i], mean_exponent(s, statistics.entropy[i])),
                    double(s));
            }
            variance[i] = float(spread.variance);
            collision[i] = float(spread.collision);
        }
    });
}

void cpu_gradient(const Rows& rows, const Statistics& statistics, const Upstream& upstream, const Matrix& out,
                  const Machine& machine) {
    const Sweeps& sweeps = sweeps_for(rows, machine);
    const bool stream = prepare_output(rows, out);
    for_each_task(rows, machine, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        std::vector<char> scratch;
        for (std::int64_t i = begin; i < end; ++i) {
            const Row row(rows, i);
            if (!row.counted()) {
                row.clear(out, 0);
                continue;
            }
            const RowStats stats{statistics.log_probs[i], statistics.entropy ? statistics.entropy[i] : 0.0f,
                                 statistics.maximum[i], statistics.sum[i]};
            const float a = upstream.log_probs.at(row.b(), row.t());
            const float b = upstream.entropy ? upstream.entropy.at(row.b(), row.t()) : 0.0f;
            const float spread = stats.log_prob == stats.log_prob ? a : NAN;
            write_gradient(rows, row, row.logits(scratch), stats, spread, b, row.transform(), out, stream, sweeps);
        }
    });
}

void cpu_loss(const Rows& rows, const Terms& terms, const Matrix& out, float* log_probs, float* entropy, double* sums,
              const Machine& machine) {
    const Sweeps& sweeps = sweeps_for(rows, machine);
    const bool stream = out.data && prepare_output(rows, out);
    const Coefficients coefficients = read_coefficients(terms.coefficients);
    std::vector<double> partial(static_cast<std::size_t>(tasks_of(rows) * kNumSums), 0.0);
    for_each_task(rows, machine, [&](std::int64_t task, std::int64_t begin, std::int64_t end) {
        std::vector<char> scratch;
        for (std::int64_t i = begin; i < end; ++i) {
            const Row row(rows, i);
            log_probs[i] = entropy[i] = 0.0f;
            if (!row.counted()) {
                if (out.data) row.clear(out, 0);
                continue;
            }
            const void* const x = row.logits(scratch);
            const Transform transform = row.transform();
            const RowStats stats = statistics_of(rows, row, x, transform, sweeps);
            const TokenTerms token = terms_at(terms, row.b(), row.t());
            const TokenLoss loss = token_loss(stats.log_prob, stats.entropy, token, coefficients, terms.choices);
            log_probs[i] = stats.log_prob;
            entropy[i] = stats.entropy;
            add_sums(&partial[static_cast<std::size_t>(task * kNumSums)], loss, stats.log_prob, stats.entropy,
                     token.weight, !row.valid());
            if (!out.data) continue;
            write_gradient(rows, row, x, stats, token.weight * loss.d_log_prob, token.weight * loss.d_entropy,
                           transform, out, stream, sweeps);
        }
    });
    std::fill(sums, sums + kNumSums, 0.0);
    for (std::size_t i = 0; i < partial.size(); ++i) sums[i % kNumSums] += partial[i];
}

void cpu_scale(void* x, DType dtype, std::int64_t count, float factor, const Machine& machine) {
    const Sweeps& sweeps = machine.sweeps->of[static_cast<int>(dtype)];
    parallel_for((count + kTaskElements - 1) / kTaskElements, machine.threads, [&](std::int64_t i) {
        const std::int64_t begin = i * kTaskElements;
        sweeps.scale(static_cast<char*>(x) + begin * size_of(dtype), std::min(kTaskElements, count - begin), factor);
    });
}

}  // namespace epo
