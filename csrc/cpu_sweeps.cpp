// The sweeps of a contiguous row; see cpu_sweeps.h for why this file is compiled several times.
//
// The row is processed in blocks that stay in the first-level cache: first a block's maximum, then its exponentials
// relative to the running maximum, whose sums are added to the row's in double. The gradient walks the blocks
// backwards, because the caches still contain the row's end.
#include "cpu_sweeps.h"

#include "vector.h"

#if !defined(EPO_SWEEPS)
#error "compile with -DEPO_SWEEPS=plain, avx2 or avx512"
#endif

#define EPO_JOIN_(a, b) a##b
#define EPO_JOIN(a, b) EPO_JOIN_(a, b)
#define EPO_TEXT_(a) #a
#define EPO_TEXT(a) EPO_TEXT_(a)

namespace {

using epo::GradientLine;
using epo::Moments;
using epo::Spread;
using epo::Transform;

constexpr int kUnroll = 4;
constexpr std::int64_t kGroup = kUnroll * kWidth;
constexpr std::int64_t kBlock = 2048;
static_assert(kBlock % kGroup == 0, "blocks are whole groups");

inline Floats above_lowest(Floats x) { return larger(splat(epo::kLowestExponent), x); }  // NaN stays NaN

// How y depends on the raw logit: identity, negation (negative scale), or tanh.
enum class Form { raw, negative, softcap };

// A row seen as vectors: y of z = outer * y.
template <class Element, Form kForm>
struct Source {
    const char* x;
    Transform transform;

    Floats argument(std::int64_t i) const { return of(Element::load(x + i * Element::size)); }

    // The last, partial vector: `count` elements, padded with -inf, which adds 0.
    Floats partial(std::int64_t i, int count) const {
        alignas(64) char raw[Element::size * kWidth] = {};
        std::memcpy(raw, x + i * Element::size, static_cast<std::size_t>(Element::size * count));
        const Floats y = of(Element::load(raw));
        Floats result = splat(-INFINITY);
        for (int k = 0; k < count; ++k) result[k] = y[k];
        return result;
    }

    Floats of(Floats raw) const {
        if constexpr (kForm == Form::softcap) return tanh(raw * transform.inner);
        if constexpr (kForm == Form::negative) return -raw;
        return raw;
    }
};

inline float largest(Floats x) {
    float result = x[0];
    for (int k = 1; k < kWidth; ++k) result = x[k] > result ? x[k] : result;
    return result;
}

inline double total(const Floats (&parts)[kUnroll]) {
    const Floats x = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    double result = 0.0;
    for (int k = 0; k < kWidth; ++k) result += double(x[k]);
    return result;
}

template <class Part>
inline float block_maximum(std::int64_t n, const Part& part) {
    Floats best[kUnroll];
    for (Floats& one : best) one = splat(-INFINITY);
    std::int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup)
        for (int k = 0; k < kUnroll; ++k) best[k] = larger(part(i + k * kWidth), best[k]);
    for (; i < n; i += kWidth) best[0] = larger(part(i), best[0]);
    return largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

// Σ e^t and Σ t e^t.
template <class Part>
inline Moments<double> block_moments(std::int64_t n, float outer, float m, const Part& part) {
    Floats s[kUnroll] = {}, u[kUnroll] = {};
    const auto add = [&](std::int64_t i, int k) {
        const Floats t = above_lowest((part(i) - m) * outer);
        const Floats e = exp(t);
        s[k] += e;
        u[k] += t * e;
    };
    std::int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup)
        for (int k = 0; k < kUnroll; ++k) add(i + k * kWidth, k);
    for (; i < n; i += kWidth) add(i, 0);
    return {m, total(s), total(u)};
}

// Whether a block with maximum -inf contains NaN, which comparisons skip.
template <class Part>
inline bool holds_nan(std::int64_t n, const Part& part) {
    for (std::int64_t i = 0; i < n; i += kWidth) {
        const Floats y = part(i);
        for (int k = 0; k < kWidth; ++k)
            if (y[k] != y[k]) return true;
    }
    return false;
}

template <class Part>
inline void add_block(Moments<double>& row, std::int64_t n, float outer, const Part& part) {
    const float m = block_maximum(n, part);
    if (m == -INFINITY) {
        if (holds_nan(n, part)) row.s = NAN;
        return;
    }
    if (m > row.m) row = epo::about(row, m, outer);
    const Moments<double> block = block_moments(n, outer, row.m, part);
    row.s += block.s;
    row.u += block.u;
}

template <class Element, Form kForm>
Moments<double> moments(const void* x, std::int64_t n, const Transform& transform) {
    const Source<Element, kForm> source{static_cast<const char*>(x), transform};
    Moments<double> row = epo::no_moments<double>();
    const std::int64_t whole = n / kWidth * kWidth;
    for (std::int64_t start = 0; start < whole; start += kBlock) {
        const std::int64_t size = whole - start < kBlock ? whole - start : kBlock;
        add_block(row, size, transform.outer, [&](std::int64_t i) { return source.argument(start + i); });
    }
    if (whole < n) {
        const Floats last = source.partial(whole, static_cast<int>(n - whole));
        add_block(row, kWidth, transform.outer, [&](std::int64_t) { return last; });
    }
    return row;
}

// Adds Σ e^t (t - mean)² and Σ e^2t of a block.
template <class Part>
inline void add_spread(Spread<double>& row, std::int64_t n, float outer, float m, float mean, const Part& part) {
    Floats variance[kUnroll] = {}, collision[kUnroll] = {};
    const auto add = [&](std::int64_t i, int k) {
        const Floats t = above_lowest((part(i) - m) * outer);
        const Floats e = exp(t), distance = t - mean;
        variance[k] += e * distance * distance;
        collision[k] += e * e;
    };
    std::int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup)
        for (int k = 0; k < kUnroll; ++k) add(i + k * kWidth, k);
    for (; i < n; i += kWidth) add(i, 0);
    row.variance += total(variance);
    row.collision += total(collision);
}

template <class Element, Form kForm>
Spread<double> spread(const void* x, std::int64_t n, const Transform& transform, float m, float mean) {
    const Source<Element, kForm> source{static_cast<const char*>(x), transform};
    Spread<double> row{0.0, 0.0};
    const std::int64_t whole = n / kWidth * kWidth;
    for (std::int64_t start = 0; start < whole; start += kBlock) {
        const std::int64_t size = whole - start < kBlock ? whole - start : kBlock;
        add_spread(row, size, transform.outer, m, mean, [&](std::int64_t i) { return source.argument(start + i); });
    }
    if (whole < n) {
        const Floats last = source.partial(whole, static_cast<int>(n - whole));
        add_spread(row, kWidth, transform.outer, m, mean, [&](std::int64_t) { return last; });
    }
    return row;
}

template <class Element, Form kForm>
struct Gradient {
    Source<Element, kForm> source;
    float m;
    GradientLine line;

    Floats of(Floats y) const {
        const Floats t = above_lowest((y - m) * source.transform.outer);
        const Floats g = exp(t) * (line.linear * t + line.constant);
        if constexpr (kForm == Form::softcap) return g * (1.0f - y * y);
        return g;
    }
    void store(char* out, std::int64_t i) const {
        write(out + i * Element::size, Element::round(of(source.argument(i))));
    }
    void stream(char* out, std::int64_t i) const {
        write_past(out + i * Element::size, Element::round(of(source.argument(i))));
    }
    void store_partial(char* out, std::int64_t i, int count) const {
        const auto rounded = Element::round(of(source.partial(i, count)));
        std::memcpy(out + i * Element::size, &rounded, static_cast<std::size_t>(Element::size * count));
    }
};

template <class Element, Form kForm>
void gradient(const void* x, void* result, std::int64_t n, const Transform& transform, float m,
              const GradientLine& line, bool stream) {
    const Gradient<Element, kForm> gradient{{static_cast<const char*>(x), transform}, m, line};
    char* const out = static_cast<char*>(result);
    constexpr std::int64_t kVector = kWidth * Element::size;
    // Streaming stores must be aligned, so a partial vector comes first.
    const std::int64_t misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % kVector);
    std::int64_t head = stream && misaligned ? (kVector - misaligned) / Element::size : 0;
    if (head > n) head = n;
    const std::int64_t last = head + (n - head) / kWidth * kWidth;  // end of the whole vectors
    if (last < n) gradient.store_partial(out, last, static_cast<int>(n - last));
    for (std::int64_t end = last; end > head;) {
        const std::int64_t start = end - head > kBlock ? end - kBlock : head;
        if (stream)
            for (std::int64_t i = start; i < end; i += kWidth) gradient.stream(out, i);
        else
            for (std::int64_t i = start; i < end; i += kWidth) gradient.store(out, i);
        end = start;
    }
    if (head) gradient.store_partial(out, 0, static_cast<int>(head));
#if defined(__AVX512F__) || defined(__AVX2__)
    if (stream) _mm_sfence();
#endif
}

template <class Element>
Moments<double> any_moments(const void* x, std::int64_t n, const Transform& transform, bool softcap) {
    if (softcap) return moments<Element, Form::softcap>(x, n, transform);
    if (transform.inner < 0.0f) return moments<Element, Form::negative>(x, n, transform);
    return moments<Element, Form::raw>(x, n, transform);
}

template <class Element>
Spread<double> any_spread(const void* x, std::int64_t n, const Transform& transform, bool softcap, float m, float mean) {
    if (softcap) return spread<Element, Form::softcap>(x, n, transform, m, mean);
    if (transform.inner < 0.0f) return spread<Element, Form::negative>(x, n, transform, m, mean);
    return spread<Element, Form::raw>(x, n, transform, m, mean);
}

template <class Element>
void any_gradient(const void* x, void* out, std::int64_t n, const Transform& transform, bool softcap, float m,
                  const GradientLine& line, bool stream) {
    if (softcap) return gradient<Element, Form::softcap>(x, out, n, transform, m, line, stream);
    if (transform.inner < 0.0f) return gradient<Element, Form::negative>(x, out, n, transform, m, line, stream);
    gradient<Element, Form::raw>(x, out, n, transform, m, line, stream);
}

template <class Element>
void scale(void* x, std::int64_t n, float factor) {
    char* const data = static_cast<char*>(x);
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        char* const at = data + i * Element::size;
        write(at, Element::round(Element::load(at) * factor));
    }
    if (i < n) {
        alignas(64) char raw[Element::size * kWidth] = {};
        const std::size_t size = static_cast<std::size_t>(Element::size * (n - i));
        std::memcpy(raw, data + i * Element::size, size);
        write(raw, Element::round(Element::load(raw) * factor));
        std::memcpy(data + i * Element::size, raw, size);
    }
}

template <class Element>
void round(const float* x, void* out) {
    const auto rounded = Element::round(splat(*x));
    std::memcpy(out, &rounded, Element::size);
}

template <class Element>
constexpr epo::Sweeps sweeps_of(const char* name) {
    return {name, any_moments<Element>, any_spread<Element>, any_gradient<Element>, round<Element>, scale<Element>};
}

}  // namespace

namespace epo {

const SweepTable& EPO_JOIN(sweeps_, EPO_SWEEPS)() {
    static constexpr const char* kName = EPO_TEXT(EPO_SWEEPS);
    static constexpr SweepTable table{
        {sweeps_of<Float32>(kName), sweeps_of<Float16>(kName), sweeps_of<BFloat16>(kName)}};
    return table;
}

}  // namespace epo
