"""The Triton kernels. Host side, launch plan and byte model: `triton.py`. The maths in plain PyTorch: `reference.py`.

A program processes rows pid, pid + programs, ... of the logits in turn. A row is cut into tiles of
[DEPTH, LANES, VECTOR] elements:

- *First sweep*: every lane (a thread) keeps a running maximum m and, relative to it, s = Σ e^(z-m) and
  u = Σ (z-m) e^(z-m) of its own elements; lanes are reduced only at the end of the row. Each element costs one
  exponential, and each tile one more, which rescales s and u to the new maximum.
- *Per token*: log-prob, entropy, the loss and its derivatives a = ∂loss/∂log_prob and b = ∂loss/∂H, in scalars.
- *Second sweep*: ∂loss/∂z_v = a (1[v = y] - p_v) - b p_v (log p_v + H), from the row's last tile to its first, because
  the tiles read last are still in the L2 cache. A row of one tile (`ONE_TILE`) stays in registers and is not reread.

Everything is relative to the maximum of y = softcap(scale x), before the division by the temperature: (y - m) is exact
near the maximum, so an offset that the dtype represents exactly changes nothing. Exponentials and logarithms are in
base 2, as in hardware: log2(e) / temperature turns y - m into log2 of a weight.

An aligned two-sweep bf16 row costs 2 exponentials and 21.5 instructions per element (sm_90, disassembled).

For a masked row only zeros are written and nothing is read. -inf is an ordinary logit: a lane that saw nothing else
keeps m = -inf, s = 0. NaN, +inf or a row of -inf make s NaN or 0, and therefore log s, log-prob and gradient NaN.
"""

from collections import namedtuple

import triton
import triton.language as tl

from epo_kernels.declaration import COEFFICIENTS, ROW_SUMS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Replaces log2(0) where it is multiplied by a zero weight: -inf * 0 would be NaN.
LOWEST = tl.constexpr(-1e4)
LOG_RATIO_LIMIT = tl.constexpr(20.0)
K3_LIMIT = tl.constexpr(10.0)
DPPO_EPSILON = tl.constexpr(1e-8)
# Names joined in one string: a constant used by the kernels becomes part of Triton's cache key.
COEFFICIENT_NAMES = tl.constexpr(",".join(COEFFICIENTS))
SUM_NAMES = tl.constexpr(",".join(ROW_SUMS))
SUM_SLOTS = tl.constexpr(triton.next_power_of_2(len(ROW_SUMS)))
PARTIALS_AT_ONCE = tl.constexpr(32)


# The declaration ------------------------------------------------------------------------------------------------------

Coefficients = namedtuple("Coefficients", COEFFICIENTS)  # type: ignore[misc]


@triton.constexpr_function
def count(names):
    """Number of names in one of the strings above."""
    return len(names.split(","))


@triton.constexpr_function
def place(name, names):
    """Index of a name in one of them."""
    return names.split(",").index(name)


@triton.jit
def load_coefficients(pointer):
    """The coefficients by name, read once per launch."""
    values = ()
    for i in tl.static_range(count(COEFFICIENT_NAMES)):
        values += (tl.load(pointer + i),)  # type: ignore[assignment]
    return Coefficients(*values)


@triton.jit
def slot(sums, name: tl.constexpr, value):
    """sums [SUM_SLOTS] with value added to the named slot."""
    mine = tl.arange(0, SUM_SLOTS) == place(name, SUM_NAMES)
    return sums + tl.where(mine, value, 0.0).to(tl.float64)


# Rows: tiles, statistics, gradient ------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """tanh to a relative error of 1e-7: 1 - 2 / (e^2x + 1) for large |x|, without cancellation, else a polynomial."""
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    square = x * x
    series = 0.02080537 - 0.00590585 * square
    series = -0.05378668 + series * square
    series = 0.13331958 + series * square
    series = -0.33333299 + series * square
    small = x + x * square * series
    return tl.where(magnitude < 0.6, small, tl.where(x < 0.0, -large, large))


@triton.jit
def transformed(x, scale, softcap):
    """y of raw logits x, in float32: scaled and softcapped (None: skipped), before division by the temperature."""
    y = x.to(tl.float32)
    if scale is not None:
        y = y * scale
    if softcap is not None:
        y = softcap * tanh(y * (1.0 / softcap))
    return y


@triton.jit
def tile_columns(start, DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile, [DEPTH, LANES, VECTOR]: neighbours are in one lane's vector, then in the next lane."""
    step, lane, place = tl.arange(0, DEPTH), tl.arange(0, LANES), tl.arange(0, VECTOR)
    return start + (step[:, None, None] * LANES + lane[None, :, None]) * VECTOR + place[None, None, :]


@triton.jit
def offsets_of(columns, stride, UNIT_STRIDE: tl.constexpr):
    """Element offsets within a row; 64-bit if the stride could exceed 2^31."""
    return columns if UNIT_STRIDE else columns.to(tl.int64) * stride


@triton.jit
def load_tile(
    row, columns, stride, width, vocab_size, scale, softcap,
    WHOLE: tl.constexpr, UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """y of a tile; -inf past the vocabulary. WHOLE: the tile ends before it.

    Loads end at the row, not at the vocabulary, because row ends are more often aligned, and aligned loads are wide.
    """
    offsets = offsets_of(columns, stride, UNIT_STRIDE)
    if WHOLE:
        y = transformed(tl.load(row + offsets, eviction_policy=POLICY), scale, softcap)
    else:
        x = tl.load(row + offsets, mask=columns < width, other=float("-inf"), eviction_policy=POLICY)
        y = transformed(x, scale, softcap)
        if PADDED or scale is not None or softcap is not None:  # the transform may change the fill value
            y = tl.where(columns < vocab_size, y, float("-inf"))
    return y


@triton.jit
def no_weights(LANES: tl.constexpr):
    """(m, s, u) of lanes that have read no elements."""
    return tl.full([LANES], float("-inf"), tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)


@triton.jit
def lane_sums(values):
    """[DEPTH, LANES, VECTOR] -> [LANES], each sum within one thread."""
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def add_tile(m, s, u, y, inverse, ENTROPY: tl.constexpr):
    """(m, s, u) of lanes after a tile. u is in bits: Σ log2(e^(z-m)) e^(z-m). inverse: 1 / temperature."""
    to_bits = inverse * LOG2E
    new_m = tl.maximum(m, tl.max(tl.max(y, axis=2), axis=0))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)
    move = (m - base) * to_bits
    shrink = tl.exp2(move)
    bits = (y - base[None, :, None]) * to_bits
    weights = tl.exp2(bits)
    if ENTROPY:
        u = shrink * (u + tl.maximum(move, LOWEST) * s) + lane_sums(tl.maximum(bits, LOWEST) * weights)
    return new_m, shrink * s + lane_sums(weights), u


@triton.jit
def merge_lanes(m, s, u, inverse, ENTROPY: tl.constexpr):
    """Scalars (m, s, u) of the row."""
    row_m = tl.max(m, axis=0)
    base = tl.where(row_m == float("-inf"), 0.0, row_m)
    move = (m - base) * (inverse * LOG2E)
    shrink = tl.exp2(move)
    row_u = 0.0
    if ENTROPY:
        row_u = tl.sum(shrink * (u + tl.maximum(move, LOWEST) * s), axis=0)
    return row_m, tl.sum(shrink * s, axis=0), row_u


@triton.jit
def sweep_statistics(
    row, stride, width, vocab_size, scale, softcap, inverse, ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Scalars (m, s, u) of a row of any length."""
    m, s, u = no_weights(LANES)
    whole = vocab_size // (DEPTH * LANES * VECTOR) * (DEPTH * LANES * VECTOR)
    for start in tl.range(0, whole, DEPTH * LANES * VECTOR, num_stages=STAGES):
        columns = tile_columns(start, DEPTH, LANES, VECTOR)
        y = load_tile(row, columns, stride, width, vocab_size, scale, softcap, True, UNIT_STRIDE, PADDED, POLICY)
        m, s, u = add_tile(m, s, u, y, inverse, ENTROPY)
    if whole < vocab_size:
        columns = tile_columns(whole, DEPTH, LANES, VECTOR)
        y = load_tile(row, columns, stride, width, vocab_size, scale, softcap, False, UNIT_STRIDE, PADDED, POLICY)
        m, s, u = add_tile(m, s, u, y, inverse, ENTROPY)
    return merge_lanes(m, s, u, inverse, ENTROPY)


@triton.jit
def log_prob_and_entropy(sampled, m, s, u, inverse, ENTROPY: tl.constexpr):
    """(log-prob of the sampled token, entropy in nats, log2 s) from the token's y and the row's scalars."""
    log2_s = tl.log2(s)
    entropy = 0.0
    if ENTROPY:
        entropy = (log2_s - u / s) * LN2
    return (sampled - m) * inverse - log2_s * LN2, entropy, log2_s


@triton.jit
def slope_of(inverse, scale):
    """∂z/∂x without a softcap."""
    slope = inverse
    if scale is not None:
        slope = slope * scale
    return slope


@triton.jit
def capped_slope(y, softcap):
    """∂y/∂(its value before the softcap)."""
    slope = 1.0
    if softcap is not None:
        capped = y * (1.0 / softcap)
        slope = 1.0 - capped * capped
    return slope


@triton.jit
def logit_gradient(y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy, ENTROPY: tl.constexpr):
    """∂loss/∂x of logits that aren't the token's: -p (a + b H + b log p), times ∂z/∂x."""
    slope = slope_of(inverse, scale)
    log2_p = (y - m) * (inverse * LOG2E) - log2_s
    pull = grad_log_prob * slope
    if ENTROPY:
        pull = (pull + grad_entropy * slope * entropy) + (grad_entropy * slope * LN2) * tl.maximum(log2_p, LOWEST)
    return -(tl.exp2(log2_p) * pull) * capped_slope(y, softcap)


@triton.jit
def store_tile(
    row, columns, stride, width, vocab_size, gradient,
    WHOLE: tl.constexpr, UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile, 0 past the vocabulary. WHOLE: the tile ends before it."""
    offsets = offsets_of(columns, stride, UNIT_STRIDE)
    if WHOLE:
        tl.store(row + offsets, gradient.to(row.dtype.element_ty), eviction_policy="evict_first")
    else:
        if PADDED:
            gradient = tl.where(columns < vocab_size, gradient, 0.0)
        tl.store(row + offsets, gradient.to(row.dtype.element_ty), mask=columns < width, eviction_policy="evict_first")


@triton.jit
def store_token(
    row, stride, token, valid, y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Overwrite the gradient of the sampled token, whose y is given: a more than the others'."""
    gradient = logit_gradient(y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy, ENTROPY)
    slope = slope_of(inverse, scale)
    gradient += grad_log_prob * slope * capped_slope(y, softcap)
    tl.debug_barrier()  # after the tile that contains it
    tl.store(row + token.to(tl.int64) * stride, gradient.to(row.dtype.element_ty), mask=valid)


@triton.jit
def sweep_gradient(
    row, stride, out_row, out_stride, width, vocab_size, m, log2_s, inverse, scale, softcap,
    entropy, grad_log_prob, grad_entropy, ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Read a row and write its gradient, except the sampled token's; backwards if the row has just been read."""
    whole = vocab_size // (DEPTH * LANES * VECTOR)
    for tile in range(whole, tl.cdiv(width, DEPTH * LANES * VECTOR)):
        columns = tile_columns(tile * (DEPTH * LANES * VECTOR), DEPTH, LANES, VECTOR)
        y = load_tile(
            row, columns, stride, width, vocab_size, scale, softcap, False, UNIT_STRIDE, PADDED, "evict_first"
        )
        gradient = logit_gradient(y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy, ENTROPY)
        store_tile(out_row, columns, out_stride, width, vocab_size, gradient, False, UNIT_STRIDE, PADDED)
    for i in tl.range(0, whole, num_stages=STAGES):
        tile = whole - 1 - i if BACKWARDS else i
        columns = tile_columns(tile * (DEPTH * LANES * VECTOR), DEPTH, LANES, VECTOR)
        y = load_tile(row, columns, stride, width, vocab_size, scale, softcap, True, UNIT_STRIDE, PADDED, "evict_first")
        gradient = logit_gradient(y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy, ENTROPY)
        store_tile(out_row, columns, out_stride, width, vocab_size, gradient, True, UNIT_STRIDE, PADDED)


@triton.jit
def store_zeros(
    row, stride, width, DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNIT_STRIDE: tl.constexpr
):
    """The gradient of a masked row."""
    zeros = tl.zeros([DEPTH, LANES, VECTOR], row.dtype.element_ty)
    for start in range(0, width, DEPTH * LANES * VECTOR):
        columns = tile_columns(start, DEPTH, LANES, VECTOR)
        offsets = offsets_of(columns, stride, UNIT_STRIDE)
        tl.store(row + offsets, zeros, mask=columns < width, eviction_policy="evict_first")


@triton.jit
def at(pointer, batch, time, batch_stride, time_stride):
    """Address of the token (batch, time)."""
    return pointer + batch.to(tl.int64) * batch_stride + time.to(tl.int64) * time_stride


@triton.jit
def inverse_of(temperature, temperatures, batch, time, batch_stride, time_stride):
    """1 / temperature: the token's own, or the common one."""
    if temperatures is not None:
        temperature = tl.load(at(temperatures, batch, time, batch_stride, time_stride)).to(tl.float32)
    return 1.0 / temperature


@triton.jit
def load_sampled(row, stride, token_address, vocab_size):
    """(the sampled token, whether it is in the vocabulary, its raw logit, or NaN if it is not)."""
    token = tl.load(token_address)
    valid = (token >= 0) & (token < vocab_size)
    sampled = tl.load(row + token * stride, mask=valid, other=float("nan"))
    return token.to(tl.int32), valid, sampled


# The loss of a token --------------------------------------------------------------------------------------------------


@triton.jit
def clamped(x, limit):
    """x within [-limit, limit]; NaN stays NaN, which tl.clamp does not guarantee."""
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit
def clipped_ratio(ratio, c):
    """ratio within its bounds; NaN stays NaN."""
    low, high = 1.0 - c.clip_ratio_low, 1.0 + c.clip_ratio_high
    return tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))


@triton.jit
def ppo(ratio, saturated, advantage, c):
    """(pg, ∂pg/∂log_prob, clipped, dual_clipped), like the next three. saturated: the ratio is clamped, gradient 0.

    Ties, bounds and NaN: reference.py.
    """
    unclipped = -advantage * ratio
    bounded = -advantage * clipped_ratio(ratio, c)
    clipped = bounded > unclipped
    pg = tl.where(clipped, bounded, unclipped)
    ceiling = -advantage * c.clip_ratio_c
    dual_clipped = (advantage < 0.0) & (ceiling < pg)
    pg = tl.where(dual_clipped, ceiling, pg)
    return pg, tl.where(saturated | clipped | dual_clipped, 0.0, unclipped), clipped, dual_clipped


@triton.jit
def cispo(log_prob, ratio, advantage, c):
    bounded = clipped_ratio(ratio, c)
    slope = -bounded * advantage
    return slope * log_prob, slope, bounded != ratio, False


@triton.jit
def sapo(ratio, saturated, advantage, c):
    tau = tl.where(advantage > 0.0, c.sapo_tau_pos, c.sapo_tau_neg)
    x = tau * (ratio - 1.0)
    gate = 1.0 / (1.0 + tl.exp(-x))
    slope = -advantage * 4.0 * gate * (1.0 / (1.0 + tl.exp(x))) * ratio
    return -advantage * (4.0 / tau) * gate, tl.where(saturated, 0.0, slope), False, False


@triton.jit
def dppo(log_prob, old_log_prob, ratio, advantage, c, BY_KL: tl.constexpr):
    p, o = tl.exp(log_prob), tl.exp(old_log_prob)
    moved = tl.where(advantage > 0.0, p - o, o - p)
    limit = tl.where(advantage > 0.0, c.clip_ratio_high, c.clip_ratio_low)
    if BY_KL:
        # Rounding can make a log-prob positive.
        not_o, not_p = tl.where(o > 1.0, 0.0, 1.0 - o), tl.where(p > 1.0, 0.0, 1.0 - p)
        others = not_o * tl.log((not_o + DPPO_EPSILON) / (not_p + DPPO_EPSILON))
        outside = (o * (old_log_prob - log_prob) + others > limit) & (moved > 0.0)
    else:
        outside = moved > limit
    bounded = tl.where(ratio > c.clip_ratio_c, c.clip_ratio_c, ratio)
    slope = -bounded * advantage
    pg = tl.where(outside, 0.0 * advantage, slope * log_prob)
    return pg, tl.where(outside, 0.0, slope), outside, (outside == 0) & (bounded < ratio)


@triton.jit
def policy_loss(log_prob, old_log_prob, advantage, c, POLICY_LOSS: tl.constexpr):
    """(pg, ∂pg/∂log_prob, log_ratio, ratio, clipped, dual_clipped); old_log_prob None: on-policy."""
    old = log_prob if old_log_prob is None else old_log_prob
    difference = log_prob - old
    log_ratio = clamped(difference, LOG_RATIO_LIMIT)
    ratio = tl.exp(log_ratio)
    saturated = tl.abs(difference) > LOG_RATIO_LIMIT  # False for NaN
    if POLICY_LOSS == "ppo":
        pg, slope, clipped, dual_clipped = ppo(ratio, saturated, advantage, c)
    elif POLICY_LOSS == "cispo":
        pg, slope, clipped, dual_clipped = cispo(log_prob, ratio, advantage, c)
    elif POLICY_LOSS == "sapo":
        pg, slope, clipped, dual_clipped = sapo(ratio, saturated, advantage, c)
    elif POLICY_LOSS == "reinforce":
        pg, slope, clipped, dual_clipped = -advantage * log_prob, -advantage, False, False
    else:
        tl.static_assert(POLICY_LOSS == "dppo_tv" or POLICY_LOSS == "dppo_kl")
        pg, slope, clipped, dual_clipped = dppo(log_prob, old, ratio, advantage, c, POLICY_LOSS == "dppo_kl")
    return pg, tl.where(pg == pg, slope, float("nan")), log_ratio, ratio, clipped, dual_clipped


@triton.jit
def kl_penalty(log_prob, ref_log_prob, KL_TYPE: tl.constexpr):
    """(KL, ∂KL/∂log_prob)."""
    difference = log_prob - ref_log_prob
    if KL_TYPE == "k1":
        return difference, tl.where(difference == difference, 1.0, difference)
    elif KL_TYPE == "abs":
        sign = tl.where(difference > 0.0, 1.0, 0.0) - tl.where(difference < 0.0, 1.0, 0.0)
        return tl.abs(difference), tl.where(difference == difference, sign, difference)
    elif KL_TYPE == "k2":
        return 0.5 * difference * difference, difference
    else:
        exponent = clamped(-difference, LOG_RATIO_LIMIT)
        ratio = tl.exp(exponent)
        value = ratio - exponent - 1.0
        stops = (tl.abs(difference) > LOG_RATIO_LIMIT) | (tl.abs(value) > K3_LIMIT)
        return clamped(value, K3_LIMIT), tl.where(stops, 0.0, 1.0 - ratio)


@triton.jit
def band_penalty(entropy, lower, upper, c, PENALTY: tl.constexpr):
    """(P, ∂P/∂H, factor of the bonus)."""
    alpha = c.penalty_alpha
    inside = (lower < entropy) & (entropy < upper)
    below = tl.where(entropy < lower, lower - entropy, 0.0)
    above = tl.where(entropy > upper, entropy - upper, 0.0)
    if PENALTY == "hinge":
        side = tl.where(entropy > upper, 1.0, 0.0) - tl.where(entropy < lower, 1.0, 0.0)
        return alpha * (below + above), alpha * side, 1.0
    elif PENALTY == "quadratic":
        return alpha * (below * below + above * above), 2.0 * alpha * (above - below), 1.0
    elif PENALTY == "indicator":
        return tl.where(inside, 0.0, alpha), 0.0, 1.0
    elif PENALTY == "gate":
        return 0.0, 0.0, tl.where(inside, 1.0, alpha)
    else:
        return 0.0, 0.0, 1.0


@triton.jit
def token_loss(
    sums, log_prob, entropy, valid, weight, advantage, old_log_prob, ref_log_prob, is_weight, lower, upper, c,
    POLICY_LOSS: tl.constexpr, PENALTY: tl.constexpr, KL_TYPE: tl.constexpr,
):  # fmt: skip
    """The loss of one token: (sums including its own, ∂loss/∂log_prob, ∂loss/∂H). Absent arguments are None."""
    pg, grad_log_prob, log_ratio, ratio, clipped, dual_clipped = policy_loss(
        log_prob, old_log_prob, advantage, c, POLICY_LOSS
    )
    if is_weight is not None:
        pg, grad_log_prob = is_weight * pg, is_weight * grad_log_prob

    penalty, penalty_slope, gate = 0.0, 0.0, 1.0
    if lower is not None:
        penalty, penalty_slope, gate = band_penalty(entropy, lower, upper, c, PENALTY)
        sums = slot(sums, "below_band_tokens", (entropy < lower).to(tl.float32))
        sums = slot(sums, "above_band_tokens", (entropy > upper).to(tl.float32))
        valid = valid & (lower <= upper)
    # A term whose coefficient is 0 is skipped, not multiplied: its value may be infinite.
    punished = c.penalty_coeff != 0.0
    bonus = gate * entropy - tl.where(punished, c.penalty_coeff * penalty, 0.0)
    bonus_slope = gate - tl.where(punished, c.penalty_coeff * penalty_slope, 0.0)
    rewarded = c.entropy_coeff != 0.0
    loss = pg - tl.where(rewarded, c.entropy_coeff * bonus, 0.0)
    grad_entropy = tl.where(rewarded, -c.entropy_coeff * bonus_slope, 0.0)
    if ref_log_prob is not None:
        kl, kl_slope = kl_penalty(log_prob, ref_log_prob, KL_TYPE)
        loss = loss + tl.where(c.kl_coeff != 0.0, c.kl_coeff * kl, 0.0)
        grad_log_prob = grad_log_prob + tl.where(c.kl_coeff != 0.0, c.kl_coeff * kl_slope, 0.0)
        sums = slot(sums, "kl_loss", weight * kl)
    loss = tl.where(valid, loss, float("nan"))
    # Clamps and zero factors block the gradient of NaN too; here it must reach the row.
    grad_log_prob = tl.where(loss == loss, grad_log_prob, float("nan"))

    finite = (tl.abs(loss) < float("inf")) & (tl.abs(entropy) < float("inf"))
    sums = slot(sums, "tokens", 1.0)
    sums = slot(sums, "loss", weight * loss)
    sums = slot(sums, "pg_loss", weight * pg)
    sums = slot(sums, "penalty", weight * penalty)
    sums = slot(sums, "entropy_sum", entropy)
    sums = slot(sums, "log_prob_sum", log_prob)
    sums = slot(sums, "ratio_sum", ratio)
    sums = slot(sums, "ppo_kl_sum", -log_ratio)
    sums = slot(sums, "clipped_tokens", tl.where(clipped, 1.0, 0.0))
    sums = slot(sums, "dual_clipped_tokens", tl.where(dual_clipped, 1.0, 0.0))
    sums = slot(sums, "nonfinite_tokens", (valid & (finite == 0)).to(tl.float32))
    sums = slot(sums, "invalid_tokens", (valid == 0).to(tl.float32))
    return sums, weight * grad_log_prob, weight * grad_entropy


@triton.jit
def sum_partials(sums, partials_ptr, ticket_ptr, sums_ptr, loss_ptr):
    """Add up the sums of all programs: the last program to finish does it, always in program order."""
    slots = tl.arange(0, SUM_SLOTS)
    programs = tl.num_programs(0)
    tl.store(partials_ptr + tl.program_id(0) * SUM_SLOTS + slots, sums)
    tl.debug_barrier()  # all threads must have stored before one of them signals it
    done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if done == programs - 1:
        total = tl.zeros([SUM_SLOTS], tl.float64)
        for first in range(0, programs, PARTIALS_AT_ONCE):
            program = first + tl.arange(0, PARTIALS_AT_ONCE)[:, None]
            partials = tl.load(
                partials_ptr + program * SUM_SLOTS + slots[None, :],
                mask=program < programs,
                other=0.0,
                cache_modifier=".cg",  # bypasses the L1 cache, which may be stale for stores of other SMs
            )
            total += tl.sum(partials, axis=0)
        tl.store(sums_ptr + slots, total, mask=slots < count(SUM_NAMES))
        tl.store(loss_ptr, tl.sum(tl.where(slots == place("loss", SUM_NAMES), total, 0.0), axis=0).to(tl.float32))
        tl.store(ticket_ptr, 0)


# The three modes ------------------------------------------------------------------------------------------------------

# Shapes change from batch to batch; arguments that only address tokens must not specialise the kernel.
_TOKEN_ARGUMENTS = [
    "rows", "length", "tokens_b", "tokens_t", "mask_b", "mask_t", "temperature_b", "temperature_t",
]  # fmt: skip
_LOSS_ARGUMENTS = [
    "advantages_b", "advantages_t", "old_b", "old_t", "ref_b", "ref_t", "is_b", "is_t", "lower_b", "lower_t",
    "upper_b", "upper_t",
]  # fmt: skip


@triton.jit(do_not_specialize=_TOKEN_ARGUMENTS)
def row_statistics_kernel(
    logits, logits_b, logits_t, logits_v,  # (B, T, V)
    tokens, tokens_b, tokens_t,  # (B, T) int64
    mask, mask_b, mask_t,  # (B, T) uint8
    temperature, temperatures, temperature_b, temperature_t,  # a number; in its place (B, T) floats, or None
    scale, softcap,  # numbers or None
    rows, length, width, vocab_size,  # B * T, T, V
    log_probs, entropies, maximums, totals,  # (B, T) float32, contiguous; entropies may be None
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr,  # V strides are 1; the vocabulary is narrower than a row
):  # fmt: skip
    """Statistics of every row: one read of the logits."""
    ENTROPY: tl.constexpr = entropies is not None
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        batch, time = i // length, i % length
        log_prob, entropy, m, s = 0.0, 0.0, 0.0, 0.0
        if tl.load(at(mask, batch, time, mask_b, mask_t)) != 0:
            row = at(logits, batch, time, logits_b, logits_t)
            _, _, sampled = load_sampled(row, logits_v, at(tokens, batch, time, tokens_b, tokens_t), vocab_size)
            inverse = inverse_of(temperature, temperatures, batch, time, temperature_b, temperature_t)
            m, s, u = sweep_statistics(
                row, logits_v, width, vocab_size, scale, softcap, inverse, ENTROPY,
                DEPTH, LANES, VECTOR, STAGES, UNIT_STRIDE, PADDED, "evict_first",
            )  # fmt: skip
            sampled = transformed(sampled, scale, softcap)
            log_prob, entropy, _ = log_prob_and_entropy(sampled, m, s, u, inverse, ENTROPY)
        tl.store(log_probs + i, log_prob)
        tl.store(maximums + i, m)
        tl.store(totals + i, s)
        if ENTROPY:
            tl.store(entropies + i, entropy)


@triton.jit(do_not_specialize=_TOKEN_ARGUMENTS)
def row_spread_kernel(
    logits, logits_b, logits_t, logits_v,  # (B, T, V)
    tokens, tokens_b, tokens_t,  # unused
    mask, mask_b, mask_t,  # (B, T) uint8
    temperature, temperatures, temperature_b, temperature_t,  # a number; in its place (B, T) floats, or None
    scale, softcap,  # numbers or None
    rows, length, width, vocab_size,  # B * T, T, V
    entropies, maximums, totals,  # (B, T) float32, contiguous, of the whole rows
    variances, collisions,  # (B, T) float32, contiguous
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr,  # V strides are 1; the vocabulary is narrower than a row
):  # fmt: skip
    """Σ p (log p + H)² and Σ p² of every row whose statistics are known: one read of the logits."""
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        batch, time = i // length, i % length
        variance, collision = 0.0, 0.0
        if tl.load(at(mask, batch, time, mask_b, mask_t)) != 0:
            row = at(logits, batch, time, logits_b, logits_t)
            to_bits = inverse_of(temperature, temperatures, batch, time, temperature_b, temperature_t) * LOG2E
            m, s = tl.load(maximums + i), tl.load(totals + i)
            mean = tl.log2(s) * LN2 - tl.load(entropies + i)  # of log(p s)
            variance_sums, collision_sums = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
            for start in tl.range(0, vocab_size, DEPTH * LANES * VECTOR, num_stages=STAGES):
                columns = tile_columns(start, DEPTH, LANES, VECTOR)
                y = load_tile(
                    row, columns, logits_v, width, vocab_size, scale, softcap, False, UNIT_STRIDE, PADDED, "evict_first"
                )
                bits = (y - m) * to_bits
                weights = tl.exp2(bits)
                distance = tl.maximum(bits, LOWEST) * LN2 - mean
                variance_sums += lane_sums(weights * distance * distance)
                collision_sums += lane_sums(weights * weights)
            variance = tl.sum(variance_sums, axis=0) / s
            collision = tl.sum(collision_sums, axis=0) / s / s
        tl.store(variances + i, variance)
        tl.store(collisions + i, collision)


@triton.jit(do_not_specialize=_TOKEN_ARGUMENTS)
def row_gradient_kernel(
    logits, logits_b, logits_t, logits_v,  # (B, T, V)
    tokens, tokens_b, tokens_t,  # (B, T) int64
    mask, mask_b, mask_t,  # (B, T) uint8
    temperature, temperatures, temperature_b, temperature_t,  # a number; in its place (B, T) floats, or None
    scale, softcap,  # numbers or None
    rows, length, width, vocab_size,  # B * T, T, V
    log_probs, entropies, maximums, totals,  # (B, T) float32, contiguous, of the whole rows; entropies may be None
    grad_log_probs, grad_entropies,  # (B, T) float32, contiguous; None: none flows to the entropy
    out, out_b, out_t, out_v,  # (B, T, V)
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr,  # V strides are 1; the vocabulary is narrower than a row
):  # fmt: skip
    """Gradient of the logits from the gradients of log-prob and entropy: one read, one write."""
    ENTROPY: tl.constexpr = grad_entropies is not None
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        batch, time = i // length, i % length
        out_row = at(out, batch, time, out_b, out_t)
        if tl.load(at(mask, batch, time, mask_b, mask_t)) != 0:
            row = at(logits, batch, time, logits_b, logits_t)
            token, valid, sampled = load_sampled(row, logits_v, at(tokens, batch, time, tokens_b, tokens_t), vocab_size)
            log_prob = tl.load(log_probs + i)
            grad_log_prob = tl.where(log_prob == log_prob, tl.load(grad_log_probs + i), float("nan"))
            grad_entropy, entropy = 0.0, 0.0
            if ENTROPY:
                grad_entropy, entropy = tl.load(grad_entropies + i), tl.load(entropies + i)
            inverse = inverse_of(temperature, temperatures, batch, time, temperature_b, temperature_t)
            m, log2_s = tl.load(maximums + i), tl.log2(tl.load(totals + i))
            sampled = transformed(sampled, scale, softcap)
            tl.debug_barrier()  # every thread has read the token's logit, which the gradient may overwrite
            sweep_gradient(
                row, logits_v, out_row, out_v, width, vocab_size, m, log2_s, inverse, scale, softcap,
                entropy, grad_log_prob, grad_entropy, ENTROPY,
                DEPTH, LANES, VECTOR, STAGES, UNIT_STRIDE, PADDED, False,
            )  # fmt: skip
            store_token(
                out_row, out_v, token, valid, sampled, m, log2_s, inverse, scale, softcap,
                entropy, grad_log_prob, grad_entropy, ENTROPY,
            )  # fmt: skip
        else:
            store_zeros(out_row, out_v, width, DEPTH, LANES, VECTOR, UNIT_STRIDE)


@triton.jit(do_not_specialize=_TOKEN_ARGUMENTS + _LOSS_ARGUMENTS)
def row_loss_kernel(
    logits, logits_b, logits_t, logits_v,  # (B, T, V)
    tokens, tokens_b, tokens_t,  # (B, T) int64
    mask, mask_b, mask_t,  # (B, T) uint8
    temperature, temperatures, temperature_b, temperature_t,  # a number; in its place (B, T) floats, or None
    scale, softcap,  # numbers or None
    rows, length, width, vocab_size,  # B * T, T, V
    weights,  # (B, T) float32, contiguous
    advantages, advantages_b, advantages_t,  # (B, T) float32; the next five are the same, or None
    old_log_probs, old_b, old_t,
    ref_log_probs, ref_b, ref_t,
    is_weights, is_b, is_t,
    lowers, lower_b, lower_t,
    uppers, upper_b, upper_t,
    coefficients,  # (len(COEFFICIENTS),) float32
    log_probs, entropies,  # (B, T) float32, contiguous
    partials, ticket,  # (programs, SUM_SLOTS) float64, (1,) int32
    sums_out, loss_out,  # (len(ROW_SUMS),) float64, 0-d float32
    out, out_b, out_t, out_v,  # (B, T, V), or None: no gradient
    POLICY_LOSS: tl.constexpr, PENALTY: tl.constexpr, KL_TYPE: tl.constexpr, ONE_TILE: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, PADDED: tl.constexpr,  # V strides are 1; the vocabulary is narrower than a row
):  # fmt: skip
    """The whole loss with its gradient: the logits are read once (ONE_TILE) or twice, the gradient is written once."""
    c = load_coefficients(coefficients)
    sums = tl.zeros([SUM_SLOTS], tl.float64)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        batch, time = i // length, i % length
        log_prob, entropy = 0.0, 0.0
        if tl.load(at(mask, batch, time, mask_b, mask_t)) != 0:
            # The token's arguments are loaded before the sweep, to hide their latency.
            row = at(logits, batch, time, logits_b, logits_t)
            token, valid, sampled = load_sampled(row, logits_v, at(tokens, batch, time, tokens_b, tokens_t), vocab_size)
            inverse = inverse_of(temperature, temperatures, batch, time, temperature_b, temperature_t)
            weight = tl.load(weights + i)
            advantage = tl.load(at(advantages, batch, time, advantages_b, advantages_t))
            old = None if old_log_probs is None else tl.load(at(old_log_probs, batch, time, old_b, old_t))
            ref = None if ref_log_probs is None else tl.load(at(ref_log_probs, batch, time, ref_b, ref_t))
            is_weight = None if is_weights is None else tl.load(at(is_weights, batch, time, is_b, is_t))
            lower = None if lowers is None else tl.load(at(lowers, batch, time, lower_b, lower_t))
            upper = None if uppers is None else tl.load(at(uppers, batch, time, upper_b, upper_t))

            if ONE_TILE:
                columns = tile_columns(0, DEPTH, LANES, VECTOR)
                y = load_tile(
                    row, columns, logits_v, width, vocab_size, scale, softcap, False, UNIT_STRIDE, PADDED, "evict_first"
                )
                m, s, u = no_weights(LANES)
                m, s, u = add_tile(m, s, u, y, inverse, True)
                m, s, u = merge_lanes(m, s, u, inverse, True)
            else:
                m, s, u = sweep_statistics(
                    row, logits_v, width, vocab_size, scale, softcap, inverse, True,
                    DEPTH, LANES, VECTOR, STAGES, UNIT_STRIDE, PADDED, "evict_first" if out is None else "evict_last",
                )  # fmt: skip
            sampled = transformed(sampled, scale, softcap)
            log_prob, entropy, log2_s = log_prob_and_entropy(sampled, m, s, u, inverse, True)
            sums, grad_log_prob, grad_entropy = token_loss(
                sums, log_prob, entropy, valid, weight, advantage, old, ref, is_weight, lower, upper, c,
                POLICY_LOSS, PENALTY, KL_TYPE,
            )  # fmt: skip

            if out is not None:
                out_row = at(out, batch, time, out_b, out_t)
                if ONE_TILE:
                    gradient = logit_gradient(
                        y, m, log2_s, inverse, scale, softcap, entropy, grad_log_prob, grad_entropy, True
                    )
                    store_tile(out_row, columns, out_v, width, vocab_size, gradient, False, UNIT_STRIDE, PADDED)
                else:
                    sweep_gradient(
                        row, logits_v, out_row, out_v, width, vocab_size, m, log2_s, inverse, scale, softcap,
                        entropy, grad_log_prob, grad_entropy, True,
                        DEPTH, LANES, VECTOR, STAGES, UNIT_STRIDE, PADDED, True,
                    )  # fmt: skip
                store_token(
                    out_row, out_v, token, valid, sampled, m, log2_s, inverse, scale, softcap,
                    entropy, grad_log_prob, grad_entropy, True,
                )  # fmt: skip
        elif out is not None:
            store_zeros(at(out, batch, time, out_b, out_t), out_v, width, DEPTH, LANES, VECTOR, UNIT_STRIDE)
        tl.store(log_probs + i, log_prob)
        tl.store(entropies + i, entropy)
    sum_partials(sums, partials, ticket, sums_out, loss_out)


# Beside the rows ------------------------------------------------------------------------------------------------------


@triton.jit
def number(value, pointer):
    """A float32 scalar: the value at the pointer, or `value` if the pointer is None."""
    if pointer is not None:
        value = tl.load(pointer).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["batch", "length", "mask_b", "mask_t", "ids_t", "num_sequences", "max_length"])
def token_weights_kernel(
    mask, mask_b, mask_t, batch, length,  # (B, T) uint8
    lengths, sequence_ids, ids_t, num_sequences,  # packed: (num_sequences,) int64, (1, T) int64; padded: None
    # Numbers, each followed by the 0-d tensor that replaces it, or None. The coefficients are tuples of them.
    normalizer, normalizer_ptr, loss_scale, loss_scale_ptr, numbers, pointers,
    max_length,  # a number
    weights,  # (B, T) float32, contiguous
    coefficients,  # (len(COEFFICIENTS),) float32
    ticket, extras,  # (1,) int32, (2,) float64
    MODE: tl.constexpr, NORMALIZED: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Token weights, and every number that the loss launch reads. A program counts all tokens, then weights its own."""
    total, sequences = count_tokens(mask, mask_b, mask_t, batch, length, lengths, num_sequences, SEQUENCES, TOKENS)
    if NORMALIZED:
        denominator = number(normalizer, normalizer_ptr)
    elif MODE == "token-mean":
        denominator = tl.maximum(total, 1).to(tl.float32)
    else:
        denominator = tl.maximum(sequences, 1).to(tl.float32)
    if MODE == "seq-mean-token-sum-norm":
        denominator = denominator * max_length
    numerator = number(loss_scale, loss_scale_ptr)

    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    own_lengths = tl.zeros([SEQUENCES], tl.int64)
    if MODE == "seq-mean-token-mean" and lengths is None:
        own_lengths = lengths_of(mask, mask_b, mask_t, sequence, batch, length, SEQUENCES, TOKENS)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (sequence < batch)[:, None] & (token < length)[None, :]
        counted = load_mask(mask, mask_b, mask_t, sequence, token, inside)
        share = denominator
        if MODE == "seq-mean-token-mean":
            if lengths is None:
                share = denominator * tl.maximum(own_lengths, 1).to(tl.float32)[:, None]
            else:
                ids = tl.load(sequence_ids + token.to(tl.int64) * ids_t, mask=token < length, other=0)
                share = denominator * tl.maximum(tl.load(lengths + ids), 1).to(tl.float32)[None, :]
        weight = tl.where(counted != 0, tl.math.div_rn(numerator, share), 0.0)
        tl.store(weights + sequence.to(tl.int64)[:, None] * length + token[None, :], weight, mask=inside)

    if tl.program_id(0) == 0:
        for i in tl.static_range(count(COEFFICIENT_NAMES)):
            tl.store(coefficients + i, number(numbers[i], pointers[i]))
        tl.store(ticket, 0)
        tl.store(extras, sequences.to(tl.float64))
        tl.store(extras + 1, 0.0)


@triton.jit
def load_mask(mask, mask_b, mask_t, sequence, token, inside):
    offsets = sequence.to(tl.int64)[:, None] * mask_b + token.to(tl.int64)[None, :] * mask_t
    return tl.load(mask + offsets, mask=inside, other=0)


@triton.jit
def lengths_of(mask, mask_b, mask_t, sequence, batch, length, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr):
    """Counted tokens per row, for some rows of a padded batch, [SEQUENCES] int64."""
    counts = tl.zeros([SEQUENCES, TOKENS], tl.int32)
    for start in range(0, length, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (sequence < batch)[:, None] & (token < length)[None, :]
        counts += (load_mask(mask, mask_b, mask_t, sequence, token, inside) != 0).to(tl.int32)
    return tl.sum(counts, axis=1).to(tl.int64)


@triton.jit
def count_tokens(
    mask, mask_b, mask_t, batch, length, lengths, num_sequences, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr
):
    """(counted tokens, nonempty sequences), int64."""
    total = tl.zeros([SEQUENCES], tl.int64)
    sequences = tl.zeros([SEQUENCES], tl.int64)
    for first in range(0, num_sequences, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        if lengths is None:
            counts = lengths_of(mask, mask_b, mask_t, sequence, batch, length, SEQUENCES, TOKENS)
        else:
            counts = tl.load(lengths + sequence, mask=sequence < num_sequences, other=0)
        total += counts
        sequences += (counts > 0).to(tl.int64)
    return tl.sum(total, axis=0), tl.sum(sequences, axis=0)


@triton.jit(do_not_specialize=["rows", "length"])
def scale_kernel(
    gradient, gradient_b, gradient_t, gradient_v,  # (B, T, V)
    factor,  # 0-d
    out, out_b, out_t, out_v,  # the gradient itself if IN_PLACE
    rows, length, width,
    BLOCK: tl.constexpr, UNIT_STRIDE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """out = gradient * factor; in place with a factor of 1, programs exit before touching the gradient."""
    value = tl.load(factor).to(tl.float32)
    per_row = tl.cdiv(width, BLOCK)
    blocks = per_row.to(tl.int64) * rows
    if IN_PLACE:
        blocks = tl.where(value == 1.0, 0, blocks)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        row, columns = block // per_row, (block % per_row).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
        batch, time = row // length, row % length
        sources = at(gradient, batch, time, gradient_b, gradient_t) + offsets_of(columns, gradient_v, UNIT_STRIDE)
        targets = at(out, batch, time, out_b, out_t) + offsets_of(columns, out_v, UNIT_STRIDE)
        scaled = tl.load(sources, mask=columns < width).to(tl.float32) * value
        tl.store(targets, scaled.to(out.dtype.element_ty), mask=columns < width)
