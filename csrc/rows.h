// The arguments of a call: numbers and non-owning strided arrays, mirroring Rows, Terms, RowStatistics and RowLoss in
// epo_kernels/fused/rows.py. Strides count elements. The caller has validated them.
#pragma once

#include "epo_math.h"

namespace epo {

enum class DType : int { float32, float16, bfloat16 };

constexpr int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// One value per token, (B, T); null: not given.
template <class T>
struct PerToken {
    T* data = nullptr;
    std::int64_t batch_stride = 0, time_stride = 0;

    EPO_FN explicit operator bool() const { return data != nullptr; }
    EPO_FN T& at(std::int64_t b, std::int64_t t) const { return data[b * batch_stride + t * time_stride]; }
};

// Logits or their gradient, (B, T, V).
struct Matrix {
    void* data = nullptr;
    std::int64_t batch_stride = 0, time_stride = 0, vocab_stride = 1;

    EPO_FN std::int64_t offset(std::int64_t b, std::int64_t t) const { return b * batch_stride + t * time_stride; }
};

struct Rows {
    Matrix logits;
    DType dtype;
    std::int64_t batch, time, width, vocab_size;
    PerToken<const std::int64_t> tokens;
    PerToken<const bool> mask;
    PerToken<const float> temperatures;  // null: one for all
    float temperature, scale, softcap;   // softcap 0: none
};

EPO_FN Transform transform_at(const Rows& rows, std::int64_t b, std::int64_t t) {
    return make_transform(rows.scale, rows.softcap, rows.temperatures ? rows.temperatures.at(b, t) : rows.temperature);
}

struct Terms {
    PerToken<const float> weights, advantages, old_log_probs, ref_log_probs, is_weights, lower, upper;
    const float* coefficients;  // kNumCoefficients
    Choices choices;
};

// (B, T) float32, contiguous; entropy may be null. maximum is that of y. The sum is stored instead of its logarithm,
// whose rounding error every p would share. The gradient also accepts statistics of a row of which it sees only a part:
// the token may then be outside [0, vocab_size). A NaN log-prob makes the whole row's gradient NaN.
struct Statistics {
    float *log_probs, *entropy, *maximum, *sum;
};

// Upstream gradients (B, T); entropy may be null.
struct Upstream {
    PerToken<const float> log_probs, entropy;
};

EPO_FN TokenTerms terms_at(const Terms& terms, std::int64_t b, std::int64_t t) {
    TokenTerms token{};
    token.weight = terms.weights.at(b, t);
    token.advantage = terms.advantages.at(b, t);
    token.on_policy = !terms.old_log_probs;
    token.has_ref = bool(terms.ref_log_probs);
    token.has_band = terms.lower && terms.upper;
    token.old_log_prob = token.on_policy ? 0.0f : terms.old_log_probs.at(b, t);
    token.ref_log_prob = token.has_ref ? terms.ref_log_probs.at(b, t) : 0.0f;
    token.is_weight = terms.is_weights ? terms.is_weights.at(b, t) : 1.0f;
    token.lower = token.has_band ? terms.lower.at(b, t) : 0.0f;
    token.upper = token.has_band ? terms.upper.at(b, t) : 0.0f;
    return token;
}

}  // namespace epo
