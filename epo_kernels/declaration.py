"""What a loss is built from, declared once: choices, coefficients and sums, by name and in order.

Everything that repeats these names takes them from here: `EPOConfig` its choices, the Triton kernels their constants,
and csrc/ a header that the build generates (`csrc/generate.py`: enums, `Coefficients`, the places of the sums). The
native module remembers the declaration that it was built from and is refused after a change (`backends/native.py`).

The build runs this file by itself: it imports nothing outside the standard library.
"""

from typing import Literal, get_args

PolicyLossName = Literal["ppo", "cispo", "sapo", "reinforce", "dppo", "gspo", "vespo", "gmpo"]
Penalty = Literal["none", "hinge", "quadratic", "indicator", "gate"]
KLType = Literal["k1", "k2", "k3", "abs"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

# The policy losses that row kernels compute, of a token alone; the others go through statistics and the reference.
RowPolicyLoss = Literal["ppo", "cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl"]

# The choices that row kernels know, by the name of their C++ enum. An enum's values follow the order here.
CHOICES: dict[str, tuple[str, ...]] = {
    "PolicyLoss": get_args(RowPolicyLoss),
    "Penalty": get_args(Penalty),
    "KlType": get_args(KLType),
    "AggMode": get_args(LossAggMode),
}

# The runtime coefficients of a loss, in the order in which they lie in `Terms.coefficients`. Each is a field of
# `EPOConfig`, except penalty_coeff = smooth_coeff * penalty_weight.
COEFFICIENTS = (
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_c",  # +inf: no dual clip
    "entropy_coeff",
    "penalty_coeff",
    "penalty_alpha",
    "kl_coeff",
    "sapo_tau_pos",
    "sapo_tau_neg",
)

# The sums over counted tokens that leave a loss launch, in this order.
ROW_SUMS = (
    "tokens",  # counted tokens
    "loss",  # Σ w ℓ: the returned loss
    "pg_loss",  # Σ w is_weight pg
    "penalty",  # Σ w P, before its coefficients
    "kl_loss",  # Σ w KL, before kl_coeff
    "entropy_sum",  # Σ H, unweighted, as are the sums below
    "log_prob_sum",  # Σ log-prob
    "ratio_sum",  # Σ r
    "ppo_kl_sum",  # Σ (old_log_prob - log_prob), exponent-clamped as the ratio is
    "clipped_tokens",  # the clipped ratio decides the loss
    "dual_clipped_tokens",  # the dual clip decides the loss
    "below_band_tokens",  # H (segment scope: the segment's mean) below its lower bound
    "above_band_tokens",
    "nonfinite_tokens",  # counted tokens whose loss or entropy is not finite
    "invalid_tokens",  # counted tokens with an id out of the vocabulary, a mask that is neither 0 nor 1, ...
)
# What no row knows.
CALL_SUMS = (
    "sequences",  # sequences with at least one counted token
    "recomputed_tokens",  # tokens whose logits linear_epo_loss computed twice (segment scope)
)
METRIC_NAMES = (*ROW_SUMS, *CALL_SUMS)

# What the native module is compared with at import.
NATIVE_NAMES: dict[str, tuple[str, ...]] = {**CHOICES, "Coefficients": COEFFICIENTS, "RowSums": ROW_SUMS}
