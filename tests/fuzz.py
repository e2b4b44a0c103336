"""Random calls of the public functions against float64: `make fuzz N=10000`.

A draw is a valid call or, one time in five, a call with one wrong argument, which must raise an error that names it.
A valid call is computed three times: by a backend, by eager PyTorch (`backend="reference"`) in the same dtype, and by
eager PyTorch in float64. The backend's error may be eager's plus a rounding, for every result and every gradient. What
no call may read is poisoned for the backend alone: all that masked tokens hold, and the padding of a wide head.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.config import (
    BandScope,
    Divergence,
    KLType,
    LossAggMode,
    Penalty,
    PolicyLossName,
    RatioGradient,
    RatioScope,
)

FORMS: dict[str, Callable[..., Any]] = {
    "loss": ek.epo_loss,
    "linear loss": ek.linear_epo_loss,
    "from log-probs": ek.epo_loss_from_log_probs,
    "statistics": ek.log_probs_and_entropy,
    "linear statistics": ek.linear_log_probs_and_entropy,
}
LOSSES = ("loss", "linear loss", "from log-probs")
LINEAR = ("linear loss", "linear statistics")
WITH_LOGITS = tuple(form for form in FORMS if form != "from log-probs")
TRANSFORM = ("vocab_size", "temperature", "logit_softcap", "logit_scale")
COUNTS = ("tokens", "clipped_tokens", "below_band_tokens", "above_band_tokens", "invalid_tokens")
LEAVES = ("logits", "hidden", "weight", "bias", "log_probs", "entropy")
PER_TOKEN = ("old_log_probs", "advantages", "ref_log_probs", "is_weights", "temperature", "log_probs", "entropy")
# Log-ratios of the samples. The large one overflows float16 unless it is scaled well.
SPREADS = (0.0, 0.3, 1.5, 9.0)


@dataclass
class Call:
    """A call of one form. `arguments` are keyed by name; `counted` is the mask, even if the call has none."""

    form: str
    dtype: torch.dtype
    arguments: dict[str, Any]
    counted: Tensor
    upstream: Tensor  # of the loss: 0-d; of statistics: like tokens, one for each
    rounding: float  # of a log-prob, where logits are rounded to the dtype of a product, and z to float32
    settings: dict[str, Any] = field(default_factory=dict)  # those that only fused backends have

    def __str__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{value.dtype}{tuple(value.shape)} strides {value.stride()}"
            return repr(value)

        lines = [f"    {name}={show(value)}" for name, value in {**self.arguments, **self.settings}.items()]
        return "\n".join([f"{self.form}, {self.dtype}:", *lines])


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    form = rng.choice(list(FORMS))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    packed = rng.random() < 0.3 and "statistics" not in form
    batch, time = rng.choice([(1, 1), (1, 7), (2, 3), (3, 5), (4, 2), (2, 0), (0, 3)])
    shape = (batch * time,) if packed else (batch, time)
    vocab = rng.choice([1, 2, 3, 7, 33, 64, 257, 1000, 4097])
    counted = torch.rand(shape) < rng.choice([0.0, 0.5, 0.8, 1.0])
    arguments: dict[str, Any] = {"tokens": torch.randint(vocab, shape)}
    transform = _transform(rng, shape, arguments["tokens"], vocab)
    logits = _logits(rng, form, dtype, shape, vocab, arguments, transform)
    arguments |= {name: value for name, value in transform.items() if form != "from log-probs"}
    rounding = _rounding(logits, transform, arguments.get("logits_dtype", dtype) if form in LINEAR else torch.float32)
    log_probs, entropy = ek.log_probs_and_entropy(
        logits.double(), arguments["tokens"], backend="reference", **_float64(transform)
    )
    if form == "from log-probs":
        arguments = {"log_probs": log_probs.float(), "entropy": entropy.float()}
        dtype = torch.float32
    if "statistics" in form:
        if rng.random() < 0.8:
            arguments["mask"] = _mask(rng, counted)
        else:
            counted = torch.ones_like(counted)
        upstream = torch.randn(2, *shape, dtype=torch.float64)
    else:
        smooth = form == "linear loss" and dtype != torch.float32
        arguments |= _loss_arguments(rng, log_probs, entropy, counted, (batch, time), packed, smooth)
        arguments["mask"] = _mask(rng, counted)
        upstream = torch.tensor(rng.choice([1.0, 0.3, -2.0, 1024.0]), dtype=torch.float64)
    settings: dict[str, Any] = {}
    if form.startswith("linear"):
        settings = {
            "max_chunk_bytes": rng.choice([1, 4096, 1 << 30]),
            "num_active": rng.choice([None, int(counted.sum())]),
        }
    elif form == "loss" and rng.random() < 0.2:
        settings = {"inplace": True}
    return Call(form, dtype, arguments, counted, upstream, rounding, settings)


def _transform(rng: random.Random, shape: tuple[int, ...], tokens: Tensor, vocab: int) -> dict[str, Any]:
    """The transform from logits to log-probs, and tokens inside the vocabulary."""
    transform: dict[str, Any] = {}
    if rng.random() < 0.3:
        transform["vocab_size"] = rng.randint(1, vocab)
        tokens.clamp_(max=transform["vocab_size"] - 1)
    if rng.random() < 0.4:
        by_token = 0.3 + 2 * torch.rand(shape)
        transform["temperature"] = rng.choice([0.05, 0.7, torch.tensor(1.3), by_token])
    if rng.random() < 0.2:
        transform["logit_softcap"] = rng.choice([2.5, 30.0])
    if rng.random() < 0.2:
        transform["logit_scale"] = rng.choice([0.25, -1.5])
    return transform


def _logits(
    rng: random.Random,
    form: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    vocab: int,
    arguments: dict[str, Any],
    transform: dict[str, Any],
) -> Tensor:
    """Logits, put into `arguments` by the form's own arguments."""
    if form.startswith("linear"):
        width = rng.choice([1, 5, 64])
        hidden = _strided(rng, torch.randn(*shape, width).to(dtype))
        weight = _strided(rng, (torch.randn(vocab, width) * 2 / math.sqrt(width)).to(dtype))
        arguments |= {"hidden": hidden, "weight": weight}
        logits = hidden.float() @ weight.float().T
        if rng.random() < 0.4:
            arguments["bias"] = torch.randn(vocab).to(dtype)
            logits = logits + arguments["bias"].float()
        if dtype != torch.float32 and rng.random() < 0.5:
            arguments["logits_dtype"] = torch.float32
        return logits
    logits = torch.randn(*shape, vocab) * rng.choice([0.0, 1.0, 5.0])  # 0: ties throughout
    impossible = torch.rand(logits.shape) < rng.choice([0.0, 0.0, 0.4])
    impossible.scatter_(-1, arguments["tokens"][..., None], False)
    hopeless = math.inf if transform.get("logit_scale", 1.0) < 0 else -math.inf
    if "logit_softcap" not in transform:
        logits.masked_fill_(impossible, hopeless)
    arguments["logits"] = _strided(rng, logits.to(dtype))
    return arguments["logits"].float()


def _rounding(logits: Tensor, transform: dict[str, Any], dtype: torch.dtype) -> float:
    """Of the largest finite z: log-probs are differences of them."""
    z = logits.double().abs()[logits.isfinite()] * abs(transform.get("logit_scale", 1.0))
    if (softcap := transform.get("logit_softcap")) is not None:
        z = z.clamp(max=softcap)
    coldest = torch.as_tensor(transform.get("temperature", 1.0)).double().flatten().tolist()
    largest = max(1.0, _largest(z)) / min([1.0, *coldest])
    return 2 * torch.finfo(dtype).eps * largest


def _loss_arguments(
    rng: random.Random,
    log_probs: Tensor,
    entropy: Tensor,
    counted: Tensor,
    size: tuple[int, int],
    packed: bool,
    smooth: bool,
) -> dict[str, Any]:
    """The arguments of a loss besides its rows; `smooth`: no kinks, at which 16-bit rounding would decide."""
    batch, time = size
    shape = log_probs.shape
    clips = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9, "clip_ratio_c": None} if smooth else {}
    cfg = ek.EPOConfig(
        **clips,
        entropy_coeff=rng.choice([0.0, 1e-3, 0.5, -0.5]),
        kl_coeff=rng.choice([0.0, 0.3]),
        kl_type=rng.choice(["k1", "k2"] if smooth else get_args(KLType)),
        penalty="none" if smooth else rng.choice(get_args(Penalty)),
        penalty_alpha=rng.choice([0.0, 0.1, 2.0]),
        smooth_coeff=rng.choice([0.0, 1.0]),
        band_scope=rng.choice(get_args(BandScope)),
        loss_agg_mode=rng.choice(get_args(LossAggMode)),
    )
    if not smooth:
        cfg = replace(cfg, clip_ratio_c=rng.choice([None, 3.0]))
    if rng.random() < 0.5:
        cfg = replace(cfg, **_policy_loss(rng, smooth))
    arguments: dict[str, Any] = {"cfg": cfg}
    spread = rng.choice(SPREADS[:3] if smooth else SPREADS)
    old = (log_probs - spread * torch.randn(shape).clamp(-1, 1)).float()
    arguments["old_log_probs"] = rng.choice([old, old, None])
    arguments["advantages"] = torch.randn(shape) * rng.choice([1.0, 1.0, 0.0, 1e3])
    if packed:
        borders = sorted(rng.randint(0, batch * time) for _ in range(batch))
        arguments["cu_seqlens"] = torch.tensor(
            [0, *borders, batch * time], dtype=rng.choice([torch.int32, torch.int64])
        )
    elif rng.random() < 0.3 and batch > 0 and (batch,) != tuple(shape):
        arguments["advantages"] = torch.randn(batch)
    if cfg.kl_coeff != 0 or rng.random() < 0.2:
        arguments["ref_log_probs"] = (log_probs + torch.randn(shape)).float()
    if rng.random() < 0.3:
        arguments["is_weights"] = 2 * torch.rand(shape)
    if rng.random() < 0.5:
        arguments |= {"segment_ids": torch.randint(4, shape), "num_segments": 4}
    if cfg.penalty != "none":
        away = 0.05 + torch.rand(shape)  # of every token's entropy, so that no rounding decides the side
        lower, upper = (entropy + side * away * (1 if rng.random() < 0.7 else -1) for side in (-1, 1))
        lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
        if rng.random() < 0.3:
            lower.fill_(-math.inf), upper.fill_(math.inf)
        arguments["entropy_bounds"] = (lower.float(), upper.float())
    if cfg.loss_agg_mode == "seq-mean-token-sum-norm" and packed:
        arguments["max_length"] = 11
    for name, choices in {
        "penalty_weight": [0.0, 1.7, torch.tensor(1.7)],
        "entropy_coeff": [None, 0.2, torch.tensor(0.2)],
        "normalizer": [None, 7, torch.tensor(5.0)],
        "loss_scale": [1.0, -2.5, 1e-4],
    }.items():
        if rng.random() < 0.4:
            arguments[name] = rng.choice(choices)
    return arguments


def _policy_loss(rng: random.Random, smooth: bool) -> dict[str, Any]:
    """Settings of a policy loss; `smooth`: without a kink, and without a power of a sum of log-ratios."""
    names = ["cispo", "sapo", "reinforce", "gspo"] if smooth else get_args(PolicyLossName)
    settings: dict[str, Any] = {"policy_loss": rng.choice(names), "kl_bias_correction": rng.random() < 0.2}
    scopes = {"cispo": get_args(RatioScope), "sapo": get_args(RatioScope)}
    scopes |= dict.fromkeys(("gspo", "vespo", "gmpo"), ("sequence", "segment"))
    settings["ratio_scope"] = rng.choice([None, *scopes.get(settings["policy_loss"], ())])
    if settings["policy_loss"] == "gspo":
        settings["ratio_gradient"] = rng.choice(get_args(RatioGradient))
    settings["sapo_tau_pos"] = rng.choice([0.5, 1.0, 5.0])
    settings["dppo_divergence"] = rng.choice(get_args(Divergence))
    return settings


def _mask(rng: random.Random, counted: Tensor) -> Tensor:
    return rng.choice([counted, counted.long(), counted.float()])


def _strided(rng: random.Random, values: Tensor) -> Tensor:
    """The same values, in memory layouts that callers use."""
    kind = rng.choice(["contiguous", "slice", "last dimension", "transposed"])
    if kind == "slice":
        wide = values.new_full([size + 2 for size in values.shape], math.nan)
        return wide[tuple(slice(1, size + 1) for size in values.shape)].copy_(values)
    if kind == "last dimension":
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "transposed":
        return values.transpose(0, -2).contiguous().transpose(0, -2)
    return values


# ---- computing -------------------------------------------------------------------------------------------------------


def compute(call: Call, backend: str, dtype: torch.dtype | None = None, poison: bool = False) -> dict[str, Tensor]:
    """Every result and gradient by name; with dtype, for the arguments cast to it."""
    arguments = dict(call.arguments)
    if dtype is not None:
        arguments = _float64(arguments)
        arguments.pop("logits_dtype", None)
    if poison:
        arguments = _poisoned(call, arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES if name in arguments}
    arguments |= leaves
    if call.form != "from log-probs":
        arguments["backend"] = backend
    if backend != "reference":
        arguments |= call.settings
    if arguments.get("inplace"):
        arguments["logits"] = arguments["logits"] * 1
    out = FORMS[call.form](**arguments)
    if "statistics" in call.form:
        results = dict(zip(("log_probs", "entropy"), out, strict=True))
        total = sum((value * upstream).sum() for value, upstream in zip(out, call.upstream, strict=True))
    else:
        results = {"loss": out.loss, "log_probs": out.log_probs, "entropy": out.entropy}
        results |= {name: getattr(out.metrics, name) for name in COUNTS}
        total = out.loss * call.upstream
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results | {f"∂{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _float64(arguments: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: value if name == "mask" else convert(value) for name, value in arguments.items()}


def _poisoned(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with all values that must not be read replaced."""
    poisoned, ignored = dict(arguments), ~call.counted
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name in PER_TOKEN and value.shape == ignored.shape:
            poisoned[name] = value.masked_fill(ignored, math.nan)
        elif name in ("tokens", "segment_ids"):
            poisoned[name] = value.masked_fill(ignored, -100)
        elif name == "entropy_bounds":
            poisoned[name] = tuple(bound.masked_fill(ignored, math.nan) for bound in value)
        elif name in ("logits", "hidden"):
            value = value.clone()  # keeps the strides
            value[ignored] = math.nan
            poisoned[name] = value
    if (size := arguments.get("vocab_size")) is not None:
        for name, rows in (("logits", poisoned.get("logits")), ("weight", poisoned.get("weight"))):
            if rows is not None:
                poisoned[name] = rows.clone()
                (poisoned[name][..., size:] if name == "logits" else poisoned[name][size:]).fill_(math.inf)
        if "bias" in poisoned:
            poisoned["bias"] = poisoned["bias"].clone()
            poisoned["bias"][size:] = math.nan
    return poisoned


def check(call: Call, backend: str) -> None:
    """Raises AssertionError if the backend is less accurate than eager PyTorch."""
    truth = compute(call, "reference", torch.float64)
    eager = compute(call, "reference")
    fused = compute(call, backend, poison=True)
    for name, expected in truth.items():
        is_gradient = name.startswith("∂")
        ours, theirs = fused[name].detach(), eager[name].detach()
        assert ours.shape == expected.shape, f"{name}: shape {tuple(ours.shape)}"
        assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, eager's {theirs.dtype}"
        expected = expected.detach()
        representable = expected.to(ours.dtype).isfinite() & theirs.isfinite()
        assert ours[representable].isfinite().all(), f"{name}: not finite where eager's is"
        assert ours[~expected.isfinite()].isfinite().sum() == 0, f"{name}: finite where the truth isn't"
        if not representable.any():
            continue
        ours, theirs, expected = (value[representable].double() for value in (ours, theirs, expected))
        own, others = ((value - expected).abs().max().item() for value in (ours, theirs))
        size = max(expected.abs().max().item(), _size_of_terms(call, truth, name))
        # An error of a log-prob is one of its ratio, and of a gradient, relative to it.
        relative = max(torch.finfo(call.dtype).eps, call.rounding) if is_gradient else call.rounding
        if name in ("loss", "∂hidden", "∂weight"):  # sums of thousands of terms: a few roundings in 20,000 draws
            relative *= 4
        allowed = others + relative * max(size, 0.0 if is_gradient else 1.0) + torch.finfo(torch.float32).tiny
        if is_gradient and call.dtype == torch.float16:
            allowed += 2.0**-24 * max(1.0, _largest(call.upstream))  # a subnormal's step
        assert own <= allowed, f"{name}: error {own:.3g}, eager's {others:.3g}, allowed {allowed:.3g}, size {size:.3g}"


def _size_of_terms(call: Call, truth: dict[str, Tensor], name: str) -> float:
    """The largest terms of a sum, which may cancel: ∂L/∂log π (1 - p) and ∂L/∂H p (log p + H) in a gradient."""
    if call.form == "from log-probs" or name in ("log_probs", "entropy", *COUNTS):
        return 0.0
    if "statistics" in call.form:
        by_log_prob, by_entropy = call.upstream * call.counted
    else:
        statistics = [truth[key].detach().requires_grad_() for key in ("log_probs", "entropy")]
        skipped = (*LEAVES, *TRANSFORM, "tokens", "logits_dtype")
        arguments = {key: value for key, value in _float64(call.arguments).items() if key not in skipped}
        out = ek.epo_loss_from_log_probs(*statistics, **arguments)
        by_log_prob, by_entropy = torch.autograd.grad(out.loss * call.upstream, statistics, materialize_grads=True)
    terms = (by_log_prob.abs() + by_entropy.abs()).nan_to_num(0.0, 0.0, 0.0)
    if name == "loss":
        return (terms.sum() / call.upstream.abs()).item()
    slope = abs(call.arguments.get("logit_scale", 1.0)) / torch.as_tensor(call.arguments.get("temperature", 1.0))
    largest = _largest(terms * slope)
    if name in ("∂hidden", "∂weight"):
        return largest * _largest(call.arguments["weight" if name == "∂hidden" else "hidden"])
    return largest


def _largest(values: Tensor) -> float:
    return max([0.0, *values.abs().flatten().tolist()])


# ---- wrong arguments -------------------------------------------------------------------------------------------------


def _replaced(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: changes


def _first(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`name` with its first element replaced by `value`."""

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        wrong = arguments[name].clone()
        wrong.view(-1)[0] = value
        return {name: wrong}

    return change


def _bounds(change: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {"entropy_bounds": change(*arguments["entropy_bounds"])}


BY_SEGMENT = ek.EPOConfig(penalty="hinge", band_scope="segment")
# The name in the error, the forms that have the argument, and the change that makes it invalid.
WRONG: tuple[tuple[str, tuple[str, ...], Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
    ("tokens", WITH_LOGITS, _first("tokens", -1)),
    ("tokens", WITH_LOGITS, _first("tokens", 10**6)),
    ("tokens", WITH_LOGITS, lambda a: {"tokens": a["tokens"].float()}),
    ("tokens", WITH_LOGITS, lambda a: {"tokens": a["tokens"][:, :-1]}),
    ("temperature", WITH_LOGITS, _replaced(temperature=0.0)),
    ("temperature", WITH_LOGITS, _replaced(temperature=math.nan)),
    ("temperature", WITH_LOGITS, _replaced(temperature=1e-45)),
    ("temperature", WITH_LOGITS, lambda a: {"temperature": torch.zeros(a["tokens"].shape)}),
    ("logit_scale", WITH_LOGITS, _replaced(logit_scale=0.0)),
    ("logit_scale", WITH_LOGITS, _replaced(logit_scale=math.inf)),
    ("logit_softcap", WITH_LOGITS, _replaced(logit_softcap=0)),
    ("logit_softcap", WITH_LOGITS, _replaced(logit_softcap=-1.0)),
    ("vocab_size", WITH_LOGITS, _replaced(vocab_size=0)),
    ("vocab_size", WITH_LOGITS, _replaced(vocab_size=10**6)),
    ("vocab_size", WITH_LOGITS, _replaced(vocab_size=True)),
    ("backend", WITH_LOGITS, _replaced(backend="cudnn")),
    ("weight", LINEAR, lambda a: {"weight": a["weight"][:, :-1]}),
    ("bias", LINEAR, lambda a: {"bias": a["weight"][:-1, 0]}),
    ("max_chunk_bytes", LINEAR, _replaced(max_chunk_bytes=0)),
    ("num_active", LINEAR, _replaced(num_active=10**6)),
    ("logits_dtype", LINEAR, _replaced(logits_dtype=torch.int8)),
    ("cfg", LOSSES, _replaced(cfg={"entropy_coeff": 0.1})),
    ("old_log_probs", LOSSES, lambda a: {"old_log_probs": a["advantages"][:1]}),
    ("old_log_probs", LOSSES, lambda a: {"old_log_probs": torch.zeros(a["mask"].shape, dtype=torch.int64)}),
    ("advantages", LOSSES, _replaced(advantages=None)),
    ("advantages", LOSSES, _replaced(advantages=1.0)),
    ("mask", LOSSES, lambda a: {"mask": torch.full(a["mask"].shape, 0.5)}),
    ("mask", LOSSES, _replaced(mask=None)),
    ("ref_log_probs", LOSSES, _replaced(ref_log_probs=None, kl_coeff=0.1)),
    ("is_weights", LOSSES, lambda a: {"is_weights": torch.ones(7, 9)}),
    ("segment_ids", LOSSES, lambda a: {"segment_ids": torch.full(a["mask"].shape, -3), "cfg": BY_SEGMENT}),
    ("segment_ids", LOSSES, lambda a: {"segment_ids": torch.full(a["mask"].shape, 0.5), "cfg": BY_SEGMENT}),
    ("num_segments", LOSSES, lambda a: {"segment_ids": None, "num_segments": 0}),
    ("entropy_bounds", LOSSES, _bounds(lambda low, high: (torch.full_like(low, math.nan), high))),
    ("entropy_bounds", LOSSES, _bounds(lambda low, high: (low, torch.full_like(high, math.nan)))),
    ("entropy_bounds", LOSSES, _bounds(lambda low, high: (high + 1.0, low))),
    ("entropy_bounds", LOSSES, _bounds(lambda low, high: (low, high[:-1]))),
    ("entropy_bounds", LOSSES, _bounds(lambda low, high: (low,))),
    ("entropy_bounds", LOSSES, _replaced(entropy_bounds=None)),
    ("normalizer", LOSSES, _replaced(normalizer=-1.0)),
    ("normalizer", LOSSES, _replaced(normalizer=0)),
    ("loss_scale", LOSSES, _replaced(loss_scale=math.nan)),
    ("entropy_coeff", LOSSES, _replaced(entropy_coeff="0.1")),
    ("penalty_weight", LOSSES, _replaced(penalty_weight=torch.ones(2))),
    ("cu_seqlens", LOSSES, _replaced(cu_seqlens=torch.tensor([0, 3]))),
)


def check_wrong(seed: int, backend: str) -> None:
    """Raises AssertionError unless one invalid argument in an otherwise valid call raises an error that names it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    wrong, forms, change = rng.choice(WRONG)
    form = rng.choice(forms)
    shape, vocab, width = (3, 4), 9, 5
    arguments: dict[str, Any] = {"mask": torch.ones(shape)}
    if form in WITH_LOGITS:
        arguments |= {"tokens": torch.randint(vocab, shape), "backend": backend}
    else:
        arguments |= {"log_probs": -torch.rand(shape), "entropy": torch.rand(shape)}
    if form in LINEAR:
        arguments |= {"hidden": torch.randn(*shape, width), "weight": torch.randn(vocab, width)}
    elif form in WITH_LOGITS:
        arguments["logits"] = torch.randn(*shape, vocab)
    if form in LOSSES:
        cfg = ek.EPOConfig(
            penalty=rng.choice(["hinge", "quadratic", "indicator", "gate"]),
            penalty_alpha=0.5,
            band_scope=rng.choice(get_args(BandScope)),
        )
        arguments |= {
            "cfg": cfg,
            "old_log_probs": -torch.rand(shape),
            "advantages": torch.randn(shape),
            "entropy_bounds": (torch.full(shape, 0.5), torch.full(shape, 1.5)),
        }
    label = f"{form}, backend={backend!r}, {change(arguments)}"
    try:
        FORMS[form](**arguments | change(arguments))
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        raise AssertionError(f"{label}: accepted")
    assert wrong in message, f"{label}: the error doesn't name {wrong}: {message}"
    assert len(message) < 500, f"{label}: an error of {len(message)} characters"


# ---- running ---------------------------------------------------------------------------------------------------------


def fuzz(seed: int, backend: str) -> None:
    """One draw. Raises AssertionError with the call if it fails for any reason."""
    if seed % 5 == 0:
        check_wrong(seed, backend)
        return
    call = draw(seed)
    try:
        check(call, backend)
    except Exception as error:
        raise AssertionError(f"seed {seed}, backend {backend}: {error}\n{call}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1000, help="number of draws")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--backends", nargs="+", default=["cpu"], help="those to test, such as cpu triton")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for seed in range(options.start, options.start + options.n):
        for backend in options.backends:
            try:
                fuzz(seed, backend)
            except AssertionError as error:
                failures += 1
                print(error, "\n", file=sys.stderr)
    print(f"{options.n} draws on {', '.join(options.backends)}: {failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
