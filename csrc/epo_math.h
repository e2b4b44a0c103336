// The maths of epo_kernels/reference.py for every native kernel: CPU and CUDA kernels are loops and data movement
// around the functions of this file. Names and conventions (ties, clamps, NaN, skipped terms) follow reference.py.
//
//   z = outer * y,  y = ±x or tanh(inner * x),  outer >= 0               (x raw logit, Transform below)
//   t = outer * (y - m),  m = max y;  s = Σ e^t,  u = Σ t e^t
//   logp = t_token - log s           H = log s - u / s
//   ∂ℓ/∂x_v = dz/dx * [ a (1[v=y] - p_v) - b p_v (log p_v + H) ],        a = ∂ℓ/∂logp, b = ∂ℓ/∂H
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EPO_FN __host__ __device__ __forceinline__
#define EPO_UNROLL _Pragma("unroll")
#else
#define EPO_FN inline __attribute__((always_inline))  // so that it never becomes a symbol: see cpu_sweeps.h
#define EPO_UNROLL
#endif

// Enums, Coefficients and the indices of the sums; needs EPO_FN.
#include "declaration.h"

namespace epo {

// e^-200 is 0 in float32. Exponents are clamped above it, so that e^x x is 0 instead of NaN where p_v = 0.
constexpr float kLowestExponent = -200.0f;
constexpr float kLogRatioLimit = 20.0f;
constexpr float kK3Limit = 10.0f;
constexpr float kDppoEpsilon = 1e-8f;

// ---------------------------------------------------------------------------------------------------------------------
// Logits

// y = inner * x without softcap (inner is the sign of the scale), tanh(inner * x) with it; z = outer * y. The maximum
// is that of y, before any rounding: an offset that the logits' dtype represents exactly changes no bit.
struct Transform {
    float inner, outer;
    float slope;  // dz/dx at x = 0: scale / temperature
};

EPO_FN Transform make_transform(float scale, float softcap, float temperature) {
    const float slope = scale / temperature;
    if (softcap > 0.0f) return {scale / softcap, softcap / temperature, slope};
    return {slope < 0.0f ? -1.0f : 1.0f, fabsf(slope), slope};
}

EPO_FN bool is_finite(float x) { return x - x == 0.0f; }
EPO_FN float above_lowest(float x) { return x < kLowestExponent ? kLowestExponent : x; }  // NaN stays NaN

// ---------------------------------------------------------------------------------------------------------------------
// Statistics

// Moments of a part of a row: m, s, u. Empty: (-inf, 0, 0).
template <class Real>
struct Moments {
    float m;
    Real s, u;
};

template <class Real>
EPO_FN Moments<Real> no_moments() {
    return {-INFINITY, Real(0), Real(0)};
}

// The same sums relative to another maximum. A part that is entirely -inf adds 0 to any other; NaN stays in s.
template <class Real>
EPO_FN Moments<Real> about(const Moments<Real>& part, float m, float outer) {
    if (part.m == m) return part;
    const float shift = part.m == -INFINITY ? kLowestExponent : above_lowest((part.m - m) * outer);
    const Real decay = exp(Real(shift));
    return {m, part.s * decay, (part.u + Real(shift) * part.s) * decay};
}

// Statistics of a whole row. If the row is entirely -inf, or has NaN or +inf, log-prob and entropy are NaN.
struct RowStats {
    float log_prob, entropy, m, s;
};

template <class Real>
EPO_FN RowStats finish(const Moments<Real>& row, float y_token, float outer) {
    const Real log_s = log(row.s);
    return {float(Real(y_token - row.m) * Real(outer) - log_s), float(log_s - row.u / row.s), row.m, float(row.s)};
}

// Moments of a row's distribution about a mean that is known, Σ p (log p + H)² and Σ p², or a part of these sums.
template <class Real>
struct Spread {
    Real variance, collision;
};

// The mean of t = log(p s) over the distribution, from the row's statistics: log p + H = t - mean.
EPO_FN float mean_exponent(float sum, float entropy) { return logf(sum) - entropy; }

// From Σ e^t (t - mean)² and Σ e^2t.
template <class Real>
EPO_FN Spread<Real> normalized(const Spread<Real>& sums, Real s) {
    return {sums.variance / s, sums.collision / s / s};
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of a row's logits

// ∂ℓ/∂x_v = e^t * (constant + linear * t), with softcap times 1 - y²; token_gradient is for the token's own logit.
struct GradientLine {
    float constant, linear;
};

// a, b: ∂ℓ/∂logp and ∂ℓ/∂H, with every factor included. If b = 0, the entropy is unused.
EPO_FN GradientLine gradient_line(float a, float b, const RowStats& row, const Transform& transform) {
    const float scale = -transform.slope / row.s;
    const float about_entropy = b == 0.0f ? 0.0f : b * (row.entropy - logf(row.s));
    return {scale * (a + about_entropy), scale * b};
}

// The complete gradient of the sampled token's logit: -expm1 keeps 1 - p accurate for p near 1.
EPO_FN float token_gradient(float a, float b, const RowStats& row, const Transform& transform) {
    const float bonus = b == 0.0f ? 0.0f : b * expf(row.log_prob) * (above_lowest(row.log_prob) + row.entropy);
    return transform.slope * (-a * expm1f(row.log_prob) - bonus);
}

// ---------------------------------------------------------------------------------------------------------------------
// The loss of a token

// The parameters of a launch, common to all its tokens.
struct Choices {
    PolicyLoss policy_loss;
    Penalty penalty;
    KlType kl_type;
};

// The inputs of one token. Absent ones are indicated by on_policy, has_ref and has_band; is_weight is then 1.
struct TokenTerms {
    float weight, advantage, old_log_prob, ref_log_prob, is_weight, lower, upper;
    bool on_policy, has_ref, has_band;
};

// The policy loss of a token and its derivative by the log-prob, before is_weight; and its logged values.
struct PolicyValue {
    float pg, derivative;
    float ratio, log_ratio;
    bool clipped, dual_clipped;
};

struct TokenLoss {
    float total, pg, kl, penalty;  // pg: including is_weight
    float d_log_prob, d_entropy;   // of total, before the token's weight
    PolicyValue policy;
    bool below, above;
    bool invalid;  // the token's band is invalid: the loss is NaN
};

EPO_FN float clamp_keeping_nan(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// Ties, bounds and NaN: reference.py. `saturated`: the ratio is clamped, so its derivative is 0.
EPO_FN void ppo(PolicyValue& policy, float advantage, const Coefficients& c, bool saturated) {
    const float unclipped = -advantage * policy.ratio;
    const float bounded =
        -advantage * clamp_keeping_nan(policy.ratio, 1.0f - c.clip_ratio_low, 1.0f + c.clip_ratio_high);
    // Strict comparisons: at a tie the whole gradient is that of the unclipped ratio.
    policy.clipped = bounded > unclipped;
    policy.pg = policy.clipped ? bounded : unclipped;
    const float ceiling = -advantage * c.clip_ratio_c;
    policy.dual_clipped = advantage < 0.0f && ceiling < policy.pg;
    if (policy.dual_clipped) policy.pg = ceiling;
    policy.derivative = policy.clipped || policy.dual_clipped || saturated ? 0.0f : unclipped;
}

EPO_FN void cispo(PolicyValue& policy, float log_prob, float advantage, const Coefficients& c) {
    const float bounded = clamp_keeping_nan(policy.ratio, 1.0f - c.clip_ratio_low, 1.0f + c.clip_ratio_high);
    policy.clipped = bounded != policy.ratio;
    policy.derivative = -bounded * advantage;
    policy.pg = policy.derivative * log_prob;
}

EPO_FN float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

EPO_FN void sapo(PolicyValue& policy, float advantage, const Coefficients& c, bool saturated) {
    const float tau = advantage > 0.0f ? c.sapo_tau_pos : c.sapo_tau_neg;
    const float x = tau * (policy.ratio - 1.0f), gate = sigmoid(x);
    policy.pg = -advantage * (4.0f / tau) * gate;
    policy.derivative = saturated ? 0.0f : -advantage * 4.0f * gate * sigmoid(-x) * policy.ratio;
}

EPO_FN void reinforce(PolicyValue& policy, float log_prob, float advantage) {
    policy.derivative = -advantage;
    policy.pg = -advantage * log_prob;
}

// Whether the probability has left its trust region in the direction of the advantage.
EPO_FN bool outside_trust_region(float log_prob, float old_log_prob, float advantage, const Coefficients& c,
                                 bool by_kl) {
    const float p = expf(log_prob), o = expf(old_log_prob);
    const float moved = advantage > 0.0f ? p - o : o - p;
    const float limit = advantage > 0.0f ? c.clip_ratio_high : c.clip_ratio_low;
    if (!by_kl) return moved > limit;
    // Rounding can make a log-prob positive.
    const float not_o = clamp_keeping_nan(1.0f - o, 0.0f, 1.0f), not_p = clamp_keeping_nan(1.0f - p, 0.0f, 1.0f);
    const float others = not_o * logf((not_o + kDppoEpsilon) / (not_p + kDppoEpsilon));
    return o * (old_log_prob - log_prob) + others > limit && moved > 0.0f;
}

EPO_FN void dppo(PolicyValue& policy, float log_prob, float advantage, const Coefficients& c, bool outside) {
    const float bounded = policy.ratio > c.clip_ratio_c ? c.clip_ratio_c : policy.ratio;
    policy.clipped = outside;
    policy.dual_clipped = !outside && bounded < policy.ratio;
    policy.derivative = outside ? 0.0f : -bounded * advantage;
    policy.pg = outside ? 0.0f * advantage : policy.derivative * log_prob;  // NaN stays NaN outside as well
}

EPO_FN PolicyValue policy_loss(float log_prob, const TokenTerms& token, const Coefficients& c, PolicyLoss which) {
    const float old_log_prob = token.on_policy ? log_prob : token.old_log_prob;
    const float difference = log_prob - old_log_prob, advantage = token.advantage;
    const bool saturated = difference < -kLogRatioLimit || difference > kLogRatioLimit;
    PolicyValue policy{};
    policy.log_ratio = clamp_keeping_nan(difference, -kLogRatioLimit, kLogRatioLimit);
    policy.ratio = expf(policy.log_ratio);
    if (which == PolicyLoss::ppo) {
        ppo(policy, advantage, c, saturated);
    } else if (which == PolicyLoss::cispo) {
        cispo(policy, log_prob, advantage, c);
    } else if (which == PolicyLoss::sapo) {
        sapo(policy, advantage, c, saturated);
    } else if (which == PolicyLoss::reinforce) {
        reinforce(policy, log_prob, advantage);
    } else {
        const bool by_kl = which == PolicyLoss::dppo_kl;
        dppo(policy, log_prob, advantage, c, outside_trust_region(log_prob, old_log_prob, advantage, c, by_kl));
    }
    return policy;
}

struct KlValue {
    float value, derivative;
};

EPO_FN KlValue kl_penalty(float log_prob, float ref_log_prob, KlType type) {
    const float difference = log_prob - ref_log_prob;
    if (type == KlType::k1) return {difference, 1.0f};
    if (type == KlType::k2) return {0.5f * difference * difference, difference};
    if (type == KlType::abs) {
        const float sign = difference > 0.0f ? 1.0f : (difference < 0.0f ? -1.0f : 0.0f * difference);
        return {fabsf(difference), sign};
    }
    const float exponent = clamp_keeping_nan(-difference, -kLogRatioLimit, kLogRatioLimit);
    const float growth = expm1f(exponent);
    const float value = growth - exponent;
    const bool flat = exponent != -difference || value > kK3Limit;  // clamped; false for NaN
    return {clamp_keeping_nan(value, -kK3Limit, kK3Limit), flat && value == value ? 0.0f : -growth};
}

struct BandValue {
    float penalty, derivative, gate;
    bool below, above, invalid;
};

EPO_FN BandValue band_penalty(float entropy, float lower, float upper, const Coefficients& c, Penalty penalty) {
    const float alpha = c.penalty_alpha;
    BandValue band{0.0f, 0.0f, 1.0f, entropy < lower, entropy > upper, !(lower <= upper)};
    const bool outside = !(lower < entropy && entropy < upper);  // includes the bounds
    if (penalty == Penalty::gate) band.gate = outside ? alpha : 1.0f;
    if (penalty == Penalty::indicator) band.penalty = outside ? alpha : 0.0f;
    const float under = band.below ? lower - entropy : 0.0f;
    const float over = band.above ? entropy - upper : 0.0f;
    if (penalty == Penalty::hinge) {
        band.penalty = alpha * (under + over);
        band.derivative = alpha * ((band.above ? 1.0f : 0.0f) - (band.below ? 1.0f : 0.0f));
    } else if (penalty == Penalty::quadratic) {
        band.penalty = alpha * (under * under + over * over);
        band.derivative = 2.0f * alpha * (over - under);
    }
    return band;
}

// ℓ = is_weight pg - λ (gate H - βk P) + kl_coeff KL, and its derivatives.
EPO_FN TokenLoss token_loss(float log_prob, float entropy, const TokenTerms& token, const Coefficients& c,
                            const Choices& choices) {
    TokenLoss loss{};
    loss.policy = policy_loss(log_prob, token, c, choices.policy_loss);
    loss.pg = token.is_weight * loss.policy.pg;
    loss.d_log_prob = token.is_weight * loss.policy.derivative;
    loss.total = loss.pg;

    BandValue band{0.0f, 0.0f, 1.0f, false, false, false};
    if (token.has_band) band = band_penalty(entropy, token.lower, token.upper, c, choices.penalty);
    loss.penalty = band.penalty;
    loss.below = band.below;
    loss.above = band.above;
    loss.invalid = band.invalid;
    if (c.entropy_coeff != 0.0f) {
        float bonus = band.gate * entropy;
        loss.d_entropy = -c.entropy_coeff * band.gate;
        if (c.penalty_coeff != 0.0f) {
            bonus -= c.penalty_coeff * band.penalty;
            loss.d_entropy += c.entropy_coeff * c.penalty_coeff * band.derivative;
        }
        loss.total -= c.entropy_coeff * bonus;
    }
    if (token.has_ref) {
        const KlValue kl = kl_penalty(log_prob, token.ref_log_prob, choices.kl_type);
        loss.kl = kl.value;
        if (c.kl_coeff != 0.0f) {
            loss.total += c.kl_coeff * kl.value;
            loss.d_log_prob += c.kl_coeff * kl.derivative;
        }
    }
    if (band.invalid) loss.total = NAN;
    if (loss.total != loss.total) loss.d_log_prob = loss.total;  // NaN makes the whole row's gradient NaN
    return loss;
}

// Adds a counted token to the sums of a launch.
template <class Sum>
EPO_FN void add_sums(Sum* sums, const TokenLoss& loss, float log_prob, float entropy, float weight,
                     bool invalid_token) {
    const bool invalid = invalid_token || loss.invalid;
    const bool finite = is_finite(loss.total) && is_finite(entropy);
    sums[RowSums::tokens] += Sum(1);
    sums[RowSums::loss] += Sum(weight * loss.total);
    sums[RowSums::pg_loss] += Sum(weight * loss.pg);
    sums[RowSums::penalty] += Sum(weight * loss.penalty);
    sums[RowSums::kl_loss] += Sum(weight * loss.kl);
    sums[RowSums::entropy_sum] += Sum(entropy);
    sums[RowSums::log_prob_sum] += Sum(log_prob);
    sums[RowSums::ratio_sum] += Sum(loss.policy.ratio);
    sums[RowSums::ppo_kl_sum] += Sum(-loss.policy.log_ratio);
    sums[RowSums::clipped_tokens] += Sum(loss.policy.clipped);
    sums[RowSums::dual_clipped_tokens] += Sum(loss.policy.dual_clipped);
    sums[RowSums::below_band_tokens] += Sum(loss.below);
    sums[RowSums::above_band_tokens] += Sum(loss.above);
    sums[RowSums::nonfinite_tokens] += Sum(!finite && !invalid);
    sums[RowSums::invalid_tokens] += Sum(invalid);
}

}  // namespace epo
