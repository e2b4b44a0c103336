// Checks of csrc/ that want no Python: run under AddressSanitizer and UBSan by test_checks.py. Every array is allocated
// to its exact size, so that a read or write past it is caught.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu_rows.h"
#include "thread_pool.h"
#include "tile_math.h"

namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
    if (holds) return;
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
}

bool close(double a, double b, double tolerance) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    if (std::isinf(a) || std::isinf(b)) return a == b;
    return std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
}

std::mt19937 generator(0);

float normal(float scale) { return std::normal_distribution<float>(0.0f, scale)(generator); }

// ---------------------------------------------------------------------------------------------------------------------
// The truth, in double and in the order that the formulas are written

struct Truth {
    double log_prob, entropy;
    std::vector<double> p, log_p;
};

Truth truth_of(const std::vector<double>& z, std::int64_t token) {
    double m = -INFINITY, s = 0.0;
    for (double value : z) m = std::max(m, value);
    for (double value : z) s += std::exp(value - m);
    Truth truth{0.0, 0.0, {}, {}};
    for (double value : z) {
        const double log_p = value - m - std::log(s);
        truth.log_p.push_back(log_p);
        truth.p.push_back(std::exp(log_p));
        if (std::exp(log_p) > 0.0) truth.entropy -= std::exp(log_p) * log_p;
    }
    truth.log_prob = truth.log_p[static_cast<std::size_t>(token)];
    return truth;
}

double gradient_of(const Truth& truth, std::size_t v, std::int64_t token, double a, double b) {
    const double bonus = truth.p[v] > 0.0 ? b * truth.p[v] * (truth.log_p[v] + truth.entropy) : 0.0;
    return a * ((std::int64_t(v) == token ? 1.0 : 0.0) - truth.p[v]) - bonus;
}

// ---------------------------------------------------------------------------------------------------------------------
// The CPU kernels: every instruction set, dtype, odd width, stride, threads

float bfloat16_value(std::uint16_t half) {
    const std::uint32_t raw = std::uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &raw, 4);
    return value;
}

float float16_value(std::uint16_t half) {
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const float magnitude = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return half & 0x8000 ? -magnitude : magnitude;
}

float value_at(const char* data, epo::DType dtype, std::int64_t i) {
    if (dtype == epo::DType::float32) {
        float value;
        std::memcpy(&value, data + 4 * i, 4);
        return value;
    }
    std::uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    return dtype == epo::DType::bfloat16 ? bfloat16_value(half) : float16_value(half);
}

struct Case {
    epo::DType dtype;
    std::int64_t width, vocab_size, vocab_stride;
    float softcap;
    int threads;
    bool inplace;
};

void check_cpu(const Case& one, const char* instructions) {
    constexpr std::int64_t kTime = 3;
    const epo::SweepTable* const sweeps = epo::sweeps_named(instructions);
    const std::string name = std::string(instructions) + " dtype " + std::to_string(int(one.dtype)) + " width " +
                             std::to_string(one.width) + " stride " + std::to_string(one.vocab_stride) + " softcap " +
                             std::to_string(one.softcap);
    const std::int64_t size = epo::size_of(one.dtype), row = (one.width - 1) * one.vocab_stride + 1;
    const std::int64_t elements = kTime * row;
    const auto x = std::make_unique<char[]>(static_cast<std::size_t>(elements * size));
    const auto other = std::make_unique<char[]>(static_cast<std::size_t>(elements * size));
    const epo::Sweeps& kernels = sweeps->of[static_cast<int>(one.dtype)];
    for (std::int64_t i = 0; i < elements; ++i) {
        const float value = normal(3.0f);
        kernels.round(&value, x.get() + i * size);
    }
    const std::int64_t tokens[kTime] = {0, one.vocab_size - 1, one.vocab_size / 2};
    const bool mask[kTime] = {true, true, false};
    epo::Rows rows{};
    rows.logits = {x.get(), elements, row, one.vocab_stride};
    rows.dtype = one.dtype;
    rows.batch = 1, rows.time = kTime, rows.width = one.width, rows.vocab_size = one.vocab_size;
    rows.tokens = {tokens, 0, 1};
    rows.mask = {mask, 0, 1};
    rows.temperature = 0.7f;
    rows.scale = 1.3f, rows.softcap = one.softcap;

    std::vector<Truth> truths;
    std::vector<std::vector<double>> slopes;
    for (std::int64_t t = 0; t < kTime; ++t) {
        std::vector<double> z, slope;
        for (std::int64_t v = 0; v < one.vocab_size; ++v) {
            const double raw = value_at(x.get(), one.dtype, t * row + v * one.vocab_stride) * 1.3f;
            const double capped = one.softcap > 0.0f ? std::tanh(raw / one.softcap) : 0.0;
            z.push_back((one.softcap > 0.0f ? one.softcap * capped : raw) / 0.7f);
            slope.push_back(1.3f / 0.7f * (1.0 - capped * capped));
        }
        truths.push_back(truth_of(z, tokens[t]));
        slopes.push_back(slope);
    }

    float log_probs[kTime], entropy[kTime], maximum[kTime], sum[kTime];
    const epo::Machine machine{one.threads, sweeps};
    epo::cpu_statistics(rows, {log_probs, entropy, maximum, sum}, machine);
    for (std::int64_t t = 0; t < kTime; ++t) {
        check(close(log_probs[t], mask[t] ? truths[t].log_prob : 0.0, 1e-5), name + ": log-prob");
        check(close(entropy[t], mask[t] ? truths[t].entropy : 0.0, 1e-5), name + ": entropy");
    }
    const float a[kTime] = {0.5f, -1.5f, NAN}, b[kTime] = {-0.25f, 0.0f, NAN};
    const epo::Matrix out{one.inplace ? x.get() : other.get(), elements, row, one.vocab_stride};
    epo::cpu_gradient(rows, {log_probs, entropy, maximum, sum}, {{a, 0, 1}, {b, 0, 1}}, out, machine);
    const double tolerance = one.dtype == epo::DType::float32 ? 2e-6 : one.dtype == epo::DType::float16 ? 1e-3 : 8e-3;
    for (std::int64_t t = 0; t < kTime; ++t) {
        for (std::int64_t v = 0; v < one.width; ++v) {
            const float got = value_at(static_cast<char*>(out.data), one.dtype, t * row + v * one.vocab_stride);
            if (!mask[t] || v >= one.vocab_size) {
                check(got == 0.0f, name + ": 0 where nothing counts");
                continue;
            }
            const std::size_t at = static_cast<std::size_t>(v);
            check(close(got, slopes[t][at] * gradient_of(truths[t], at, tokens[t], a[t], b[t]), tolerance),
                  name + ": gradient");
        }
    }
}

void check_all_cpu() {
    for (const char* instructions : {"plain", "avx2", "avx512"}) {
        if (!epo::sweeps_named(instructions)) continue;
        for (const auto dtype : {epo::DType::float32, epo::DType::float16, epo::DType::bfloat16})
            for (const std::int64_t width : {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 2047, 2048, 2049, 6001})
                for (const std::int64_t stride : {1, 3})
                    for (const float softcap : {0.0f, 5.0f}) {
                        check_cpu({dtype, width, width, stride, softcap, 1, false}, instructions);
                        check_cpu({dtype, width, std::max<std::int64_t>(1, width - 3), stride, softcap, 2, true},
                                  instructions);
                    }
    }
}

// Rounding to 16 bits: each version agrees with the first on every kind of number.
void check_rounding() {
    const epo::SweepTable& plain = *epo::sweeps_named("plain");
    for (const char* instructions : {"avx2", "avx512"}) {
        const epo::SweepTable* const table = epo::sweeps_named(instructions);
        if (!table) continue;
        for (std::uint32_t raw = 0; raw < 0xffff0000u; raw += 9973) {
            float value;
            std::memcpy(&value, &raw, 4);
            for (const auto dtype : {epo::DType::float16, epo::DType::bfloat16}) {
                std::uint16_t expected, got;
                plain.of[int(dtype)].round(&value, &expected);
                table->of[int(dtype)].round(&value, &got);
                const bool nan = std::isnan(value);
                const unsigned exponent = dtype == epo::DType::float16 ? 0x7c00u : 0x7f80u;
                check(nan ? (got & exponent) == exponent && (got & ~exponent & 0x7fffu) : got == expected,
                      std::string(instructions) + " rounds " + std::to_string(value));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The CUDA ring's tree of groups, lanes, warps and blocks

using epo::Moments2;

Moments2 merge_lanes(const Moments2 (&lanes)[epo::kLanes], float outer2) {
    float m = -INFINITY, s[epo::kLanes], u[epo::kLanes];
    for (const Moments2& lane : lanes) m = std::fmax(m, lane.m);
    for (int i = 0; i < epo::kLanes; ++i) {
        const Moments2 part = epo::about2(lanes[i], m, outer2);
        s[i] = part.s, u[i] = part.u;
    }
    for (int step = epo::kLanes / 2; step > 0; step /= 2) {
        float left[epo::kLanes], right[epo::kLanes];
        for (int i = 0; i < epo::kLanes; ++i) left[i] = s[i] + s[i ^ step], right[i] = u[i] + u[i ^ step];
        std::copy(left, left + epo::kLanes, s), std::copy(right, right + epo::kLanes, u);
    }
    return {m, s[0], u[0]};
}

struct EmulatedRow {
    Moments2 moments;
    float y_token;
    std::vector<int> visits;  // of each element
};

// What the cluster's warps make of a row of 2-byte elements whose values are x.
EmulatedRow emulate(const std::vector<float>& x, std::uint64_t address, int ranks, std::int64_t token, float outer2) {
    constexpr int kSize = 2, kPerVector = epo::kVectorBytes / kSize;
    constexpr int kGroup = epo::RingTiles::kVectorsPerLane * kPerVector;
    const epo::RingTiles tiles(address, std::int64_t(x.size()) * kSize);
    EmulatedRow row{{}, 0.0f, std::vector<int>(x.size(), 0)};
    std::vector<Moments2> messages;
    for (int rank = 0; rank < ranks; ++rank) {
        for (int warp = 0; warp < epo::kRingWarps; ++warp) {
            Moments2 lanes[epo::kLanes];
            for (int lane = 0; lane < epo::kLanes; ++lane) {
                Moments2 run = epo::no_moments<float>();
                for (epo::TilePart<epo::RingTiles> part(tiles, rank, warp, ranks); part.left > 0; part.advance()) {
                    float y[kGroup];
                    int filled = 0;
                    for (int v = lane; v * epo::kVectorBytes < part.bytes(); v += epo::kLanes) {
                        for (int i = 0; i < kPerVector; ++i) {
                            const std::size_t at = static_cast<std::size_t>(part.offset / kSize + v * kPerVector + i);
                            ++row.visits.at(at);
                            y[filled++] = x.at(at);
                        }
                    }
                    if (filled == kGroup) epo::add_group(run, y, outer2);
                    else
                        for (int start = 0; start < filled; start += kPerVector) {
                            float vector[kPerVector];
                            std::copy(y + start, y + start + kPerVector, vector);
                            epo::add_group(run, vector, outer2);
                        }
                    if (lane == 0 && part.holds(int(token) * kSize)) row.y_token += x.at(std::size_t(token));
                }
                const std::int64_t edge = rank == 0 && warp == 0 ? tiles.edge_of(lane, kSize) : -1;
                if (edge >= 0) {
                    const std::size_t at = static_cast<std::size_t>(edge / kSize);
                    ++row.visits.at(at);
                    const float one[1] = {x.at(at)};
                    epo::add_group(run, one, outer2);
                    if (std::int64_t(at) == token) row.y_token += x.at(at);
                }
                lanes[lane] = run;
            }
            messages.push_back(merge_lanes(lanes, outer2));
        }
    }
    Moments2 lanes[epo::kLanes];
    for (int lane = 0; lane < epo::kLanes; ++lane) {
        lanes[lane] = epo::no_moments<float>();
        for (std::size_t i = std::size_t(lane); i < messages.size(); i += epo::kLanes)
            lanes[lane] = epo::merge2(lanes[lane], messages[i], outer2);
    }
    row.moments = merge_lanes(lanes, outer2);
    return row;
}

void check_tree(std::int64_t width, std::uint64_t address, int ranks, float offset) {
    const std::string name = "tree of " + std::to_string(ranks) + " blocks, width " + std::to_string(width) +
                             ", address " + std::to_string(address) + ", offset " + std::to_string(offset);
    std::vector<float> x(static_cast<std::size_t>(width));
    std::vector<double> z;
    for (float& value : x) value = offset + std::round(normal(3.0f) * 16.0f) / 16.0f;
    for (std::size_t v = 0; v < x.size(); v += 7) x[v] = -INFINITY;  // impossible tokens
    x.back() = offset;
    for (float value : x) z.push_back(double(value) / 0.7f);
    const epo::Transform transform = epo::make_transform(1.0f, 0.0f, 0.7f);
    const float outer2 = transform.outer * epo::kLog2E;
    for (const std::int64_t token : {width - 1, width / 2}) {
        const EmulatedRow row = emulate(x, address, ranks, token, outer2);
        for (int visits : row.visits) check(visits == 1, name + ": each element once");
        const epo::RowStats stats = epo::finish2(row.moments, row.y_token, transform.outer);
        const Truth truth = truth_of(z, token);
        check(close(stats.log_prob, truth.log_prob, 1e-5), name + ": log-prob");
        check(close(stats.entropy, truth.entropy, 1e-5), name + ": entropy");
        const epo::Slope2 slope = epo::slope2(0.5f, -0.25f, stats, transform);
        for (std::size_t v = 0; v < x.size(); ++v) {
            const float got = std::int64_t(v) == token ? epo::token_gradient(0.5f, -0.25f, stats, transform)
                                                       : slope.of(x[v]);
            check(close(got, gradient_of(truth, v, token, 0.5, -0.25) / 0.7f, 2e-6), name + ": gradient");
        }
    }
}

void check_tree_of_strange_rows() {
    const float outer2 = epo::kLog2E;
    const auto stats_of = [&](const std::vector<float>& x) {
        const EmulatedRow row = emulate(x, 6, 2, 40, outer2);
        return epo::finish2(row.moments, row.y_token, 1.0f);
    };
    for (const float strange : {NAN, INFINITY}) {
        std::vector<float> x(20000, 1.0f);
        x[17000] = strange;
        check(std::isnan(stats_of(x).log_prob) && std::isnan(stats_of(x).entropy), "NaN or +inf makes the row NaN");
        std::fill(x.begin(), x.end(), -INFINITY);
        x[17000] = strange;
        check(std::isnan(stats_of(x).log_prob), "NaN or +inf among -inf too");
    }
    check(std::isnan(stats_of(std::vector<float>(20000, -INFINITY)).log_prob), "a row wholly -inf is NaN");
    std::vector<float> sure(20000, -INFINITY);
    sure[40] = 3.0f;
    check(stats_of(sure).log_prob == 0.0f && stats_of(sure).entropy == 0.0f, "one possible token: log-prob 0, entropy 0");

    std::vector<float> x(20000), shifted;
    for (float& value : x) value = std::round(normal(3.0f) * 16.0f) / 16.0f;
    for (float value : x) shifted.push_back(value + 4096.0f);
    const epo::RowStats one = stats_of(x), other = stats_of(shifted);
    check(one.log_prob == other.log_prob && one.entropy == other.entropy, "an exact offset changes no bit");
}

// The plan for the common vocabularies on an H200.
void check_plan() {
    const struct {
        std::int64_t bytes;
        int ranks, blocks;
    } expected[] = {{8192, 1, 4},        {32000 * 2, 2, 4},  {128256 * 2, 8, 4}, {151936 * 2, 8, 4}, {248320 * 2, 8, 3},
                    {262144 * 2, 8, 2}, {151936 * 4, 8, 2}, {262144 * 4, 8, 1}, {1 << 22, 0, 0}};
    for (const auto& one : expected) {
        const epo::RingPlan plan = epo::ring_plan<epo::RingTiles>(one.bytes, 232448, 2304);
        check(plan.ranks == one.ranks && plan.blocks == one.blocks,
              std::to_string(one.bytes) + " bytes: " + std::to_string(plan.ranks) + " ranks, " +
                  std::to_string(plan.blocks) + " blocks");
    }
}

// ---------------------------------------------------------------------------------------------------------------------

void check_threads() {
    for (const int threads : {1, 2, 7}) {
        std::vector<std::atomic<int>> calls(1000);
        epo::parallel_for(1000, threads, [&](std::int64_t i) { ++calls[static_cast<std::size_t>(i)]; });
        for (const auto& count : calls) check(count == 1, "each task once");
    }
    std::atomic<int> total{0};
    std::vector<std::thread> callers;
    for (int k = 0; k < 4; ++k)
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) epo::parallel_for(5, 3, [&](std::int64_t) { ++total; });
        });
    for (std::thread& caller : callers) caller.join();
    check(total == 4 * 200 * 5, "callers side by side");
    epo::parallel_for(0, 4, [](std::int64_t) { std::abort(); });
}

}  // namespace

int main() {
    check_threads();
    check_rounding();
    check_all_cpu();
    for (const std::int64_t width : {1, 7, 8, 9, 1000, 8192 + 5, 32000, 70001})
        for (const std::uint64_t address : {0, 2, 14})
            for (const int ranks : {1, 2, 8})
                for (const float offset : {0.0f, 4096.0f}) check_tree(width, address, ranks, offset);
    check_tree_of_strange_rows();
    check_plan();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
