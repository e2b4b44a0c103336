// Runs the kernels with one planted fault at a time (mutants.py) and prints how each was detected.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_rows.h"

extern "C" {
void emulator_configure(std::uint64_t seed, int processors, int shared_bytes, int major);
void emulator_allow(std::uintptr_t address, std::int64_t item, int dimensions, const std::int64_t* sizes,
                    const std::int64_t* strides);
void emulator_expect(std::uintptr_t address, std::int64_t item, int dimensions, const std::int64_t* sizes,
                     const std::int64_t* strides, int result);
}
namespace {

int chosen = 0;  // from 1; 0: none

// A multiprocessor with four blocks, whose warps have 5 slots.
constexpr int kBlocks = 4, kProcessors = 1, kSharedBytes = kBlocks * (5 * 8192 + 4608), kSchedules = 12;

template <class T>
void allow(const std::vector<T>& values) {
    const std::int64_t size = static_cast<std::int64_t>(values.size()), stride = 1;
    emulator_allow(reinterpret_cast<std::uintptr_t>(values.data()), sizeof(T), 1, &size, &stride);
}

template <class T>
void expect(const std::vector<T>& values) {
    allow(values);
    const std::int64_t size = static_cast<std::int64_t>(values.size()), stride = 1;
    emulator_expect(reinterpret_cast<std::uintptr_t>(values.data()), sizeof(T), 1, &size, &stride, 1);
}

// Rows that need clusters of one block or of two, at any alignment, one of them masked.
struct Case {
    static constexpr std::int64_t kRows = 9;
    std::int64_t width;
    epo::Family family;  // sweeps: without a gradient
    std::vector<float> logits, gradient, log_probs, entropy, weights, coefficients;
    std::vector<std::int64_t> tokens;
    std::vector<char> mask;
    std::vector<double> sums, workspace;

    Case(std::int64_t width_, epo::Family family_)
        : width(width_),
          family(family_),
          logits(kRows * width),
          gradient(kRows * width),
          log_probs(kRows),
          entropy(kRows),
          weights(kRows),
          coefficients(epo::kNumCoefficients),
          tokens(kRows),
          mask(kRows, 1),
          sums(epo::kNumSums),
          workspace(5 * kProcessors * epo::kNumSums) {
        epo::Coefficients given{};
        given.clip_ratio_low = given.clip_ratio_high = 0.2f;
        given.clip_ratio_c = 3.0f;
        given.entropy_coeff = 0.01f;
        std::memcpy(coefficients.data(), &given, sizeof given);
        for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = 4.0f * std::sin(static_cast<float>(i * i % 10007));
        for (std::int64_t i = 0; i < kRows; ++i) {
            tokens[i] = i * 2003 % width;
            weights[i] = 0.1f * static_cast<float>(i + 1);
        }
        tokens[1] = width - 1, tokens[2] = 0;  // edges, where a row isn't aligned
        mask[3] = 0;
    }

    const char* run(std::uint64_t seed) {
        float loss = 0.0f;
        int ticket = 0;
        emulator_configure(seed, kProcessors, kSharedBytes, 9);
        allow(logits), allow(weights), allow(coefficients), allow(tokens), allow(mask);
        allow(workspace);
        expect(log_probs), expect(entropy), expect(sums);
        const bool with_gradient = family == epo::Family::ring;
        if (with_gradient) expect(gradient);
        const std::int64_t one = 1;
        emulator_allow(reinterpret_cast<std::uintptr_t>(&ticket), sizeof ticket, 1, &one, &one);
        emulator_allow(reinterpret_cast<std::uintptr_t>(&loss), sizeof loss, 1, &one, &one);
        epo::Rows rows{};
        rows.logits = {logits.data(), 0, width, 1};
        rows.dtype = epo::DType::float32;
        rows.batch = 1, rows.time = kRows, rows.width = rows.vocab_size = width;
        rows.tokens = {tokens.data(), 0, 1};
        rows.mask = {reinterpret_cast<const bool*>(mask.data()), 0, 1};
        rows.temperature = rows.scale = 1.0f;
        epo::Terms terms{};
        terms.weights = terms.advantages = {weights.data(), 0, 1};
        terms.coefficients = coefficients.data();
        const epo::LossResults results{log_probs.data(), entropy.data(), sums.data(), &loss, workspace.data(), &ticket};
        epo::Family ran{};
        const epo::Matrix out{with_gradient ? gradient.data() : nullptr, 0, width, 1};
        return epo::cuda_loss(rows, terms, out, results, family, {0, nullptr}, ran);
    }
    bool same(const Case& other) const {
        return std::memcmp(gradient.data(), other.gradient.data(), gradient.size() * sizeof(float)) == 0 &&
               sums == other.sums && log_probs == other.log_probs;
    }
};

std::string symptom(const std::vector<Case>& right) {
    for (std::uint64_t seed = 1; seed <= kSchedules; ++seed)
        for (const Case& expected : right) {
            Case it(expected.width, expected.family);
            if (const char* const fault = it.run(seed)) return fault;
            if (!it.same(expected)) return "a wrong result";
        }
    return "nothing";
}

}  // namespace

namespace emulator {
bool mutated(int number) { return number == chosen; }
}  // namespace emulator

int main(int, char** arguments) {
    const int count = std::atoi(arguments[1]);
    std::vector<Case> right;
    right.emplace_back(5003, epo::Family::ring);
    right.emplace_back(9001, epo::Family::ring);
    right.emplace_back(1301, epo::Family::ring);  // a warp without a tile
    right.emplace_back(1001, epo::Family::sweeps);
    for (Case& it : right)
        if (const char* const fault = it.run(0)) {
            std::printf("without a mutant: %s\n", fault);
            return 1;
        }
    for (int mutant = 0; mutant <= count; ++mutant) {
        chosen = mutant;
        std::string text = symptom(right);
        for (char& c : text)
            if (c == '\n') c = ' ';
        std::printf("%d: %s\n", mutant, text.c_str());
    }
}
