"""The one place that checks arguments, and the one form in which everything behind it sees them.

Padded (B, T) and packed (N,) batches come out alike: a packed batch is one row, (1, N), with `sequence_ids`. Canonical
arguments (float32, int64, bool) are only viewed here, never copied, so that a fused backend launches nothing but its
own kernels.

Checks of shapes, types and devices always run. Checks of values run where they are free: on CPU tensors, but not under
`torch.compile`, FakeTensorMode or a `torch.func` transform; on CUDA with EPO_KERNELS_CHECK=1, at the price of a sync.
Where they don't run, a bad value makes the loss NaN and is counted in `metrics.invalid_tokens`.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import os
import reprlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from epo_kernels.config import FLOAT32_LARGEST, FLOAT32_SMALLEST, BandScope, EPOConfig

if TYPE_CHECKING:
    from epo_kernels.fused.sharded import Shard

Scalar: TypeAlias = float | Tensor
INVALID_TOKEN = -1  # what an inconsistent mask or segment id is turned into where it can't raise
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LogitTransform:
    """How raw logits x become the z of the maths, over [0, vocab_size): softcap tanh(scale x / softcap) / temperature.

    Attributes:
        vocab_size: entries of a row that are vocabulary; the rest is padding of the head.
        temperature: number, 0-d tensor, or (B, T).
        softcap: Gemma's final logit soft-capping, or None.
        scale: Cohere's and Granite's logit scale (multiplier), or None.
    """

    vocab_size: int
    temperature: Scalar
    softcap: float | None
    scale: float | None


@dataclass(frozen=True)
class TokenInputs:
    """Everything the loss knows of its tokens beside their logits. (B, T) views; packed batches are (1, N).

    Attributes:
        shape: the caller's shape of `tokens`, in which results go back.
        tokens: int64; -1 where another argument of a counted token is inconsistent.
        mask: bool. Nothing else may be read where it is False.
        old_log_probs, advantages, ref_log_probs, is_weights: floats, or None where not given.
        lower, upper: band, (B, T) in token scope, (num_segments,) in segment scope, or None.
        segment_ids: int64, segment of each token, where the band's or the ratio's scope is the segment; else None, and
            where a row is a segment.
        num_segments: number of segments, 0 where nothing reads them.
        sequence_ids: int64, sequence of each token of a packed batch; None where a row is a sequence.
        num_sequences: B, or the number of packed sequences.
        max_length: length for "seq-mean-token-sum-norm", or None.
    """

    shape: torch.Size
    tokens: Tensor
    mask: Tensor
    old_log_probs: Tensor | None
    advantages: Tensor
    ref_log_probs: Tensor | None
    is_weights: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    segment_ids: Tensor | None
    num_segments: int
    sequence_ids: Tensor | None
    num_sequences: int
    max_length: int | None


@dataclass(frozen=True)
class Projection:
    """A language-model head: logits = hidden weightᵀ + bias.

    Attributes:
        hidden: (B, T, D), any strides; a packed batch is (1, N, D).
        weight: (V, D), any strides.
        bias: (V,) or None.
        product_dtype: dtype in which both enter a product: what they promote to, or that of autocast. Autocast leaves
            float64 alone, and products whose logits are asked for in another dtype than its own.
        logits_dtype: dtype in which logits are kept: the products' own, or a wider one.
        shard: the part of a vocabulary that weight and bias are; None where they are all of it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product_dtype: torch.dtype
    logits_dtype: torch.dtype
    shard: Shard | None = None


@dataclass(frozen=True)
class Layout:
    """How the caller's per-token arguments lie, and how they become (B, T).

    Attributes:
        shape: the caller's shape of tokens: (B, T), or (N,) packed.
        device, dtype: where the rows are, and the dtype of their statistics.
        sequence_ids, num_sequences: as in `TokenInputs`.
        in_order: 0-d bool, whether cu_seqlens makes sense, where that can't be read; else None.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    sequence_ids: Tensor | None
    num_sequences: int
    in_order: Tensor | None

    @property
    def packed(self) -> bool:
        return len(self.shape) == 1

    def check(self, name: str, value: Tensor) -> Tensor:
        """A tensor argument like tokens, viewed as (B, T)."""
        check_tensor(name, value, self.shape, self.device)
        return value[None] if self.packed else value

    def floats(self, name: str, value: Tensor, *, a_sequence: bool = False) -> Tensor:
        """A float argument like tokens, or one a sequence where allowed, as (B, T) of the layout's dtype, detached."""
        by_sequence = a_sequence and isinstance(value, Tensor) and value.shape == (self.num_sequences,) != self.shape
        if by_sequence and self.packed and self.sequence_ids is None:
            raise ValueError(f"cu_seqlens must be given to spread {name} {tuple(value.shape)} over packed tokens")
        if isinstance(value, Tensor) and value.shape != self.shape and not by_sequence:
            otherwise = f", or one value a sequence ({self.num_sequences},)" if a_sequence else ""
            raise ValueError(
                f"{name} must have the shape of tokens {tuple(self.shape)}{otherwise}, got {tuple(value.shape)}"
                f"{_squeeze_hint(name, value, self.shape)}"
            )
        check_tensor(name, value, value.shape if by_sequence else self.shape, self.device)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        value = value.detach().to(self.dtype)
        if not by_sequence:
            return value[None] if self.packed else value
        return value[self.sequence_ids] if self.packed else value[:, None].expand(self.shape)

    def log_probs(self, name: str, value: Tensor) -> Tensor:
        """`floats` for log-probs, whose differences are taken."""
        check_precise(name, value)
        return self.floats(name, value)


@dataclass(frozen=True)
class Coefficients:
    """The numbers a schedule moves: floats or 0-d tensors on the device. `penalty` is smooth_coeff * penalty_weight."""

    entropy: Scalar
    penalty: Scalar
    kl: Scalar
    normalizer: Scalar | None
    loss_scale: Scalar


def tracing() -> bool:
    """Whether a graph is traced here, by `torch.compile` or a FakeTensorMode: tensors have no memory to read."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def checks_values(device: torch.device) -> bool:
    """Whether values may be read here: free on the CPU, on request elsewhere, never where there are none to read."""
    if tracing() or device.type == "meta" or torch._C._are_functorch_transforms_active():
        return False
    return device.type == "cpu" or os.environ.get("EPO_KERNELS_CHECK", "0") == "1"


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the dtypes of a product's operands are its own; nothing on devices without autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts products to, None where it is off."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all statistics: float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raises TypeError or ValueError unless value is a tensor of that shape on that device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor; give {name}.full_tensor()")
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}{_squeeze_hint(name, value, shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where logits or hidden states are, got {value.device}")


def _squeeze_hint(name: str, value: Tensor, shape: torch.Size) -> str:
    return f"; give {name}.squeeze(0)" if value.shape == (1, *shape) else ""


def check_integer(name: str, value: SupportsIndex, low: int, high: int | None = None, meaning: str = "") -> int:
    """An int, or what stands for one (a NumPy integer, not a bool), of at least low and at most high.

    Raises:
        ValueError: naming the argument, its range (with its meaning, if one is given) and what it is.
    """
    given = value
    if not isinstance(value, (bool, int)) and hasattr(value, "__index__"):
        with contextlib.suppress(TypeError):  # of a tensor that isn't an integer
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an int {wanted}{meaning}, got {reprlib.repr(given)}")
    return value


def check_precise(name: str, value: Any) -> None:
    """Raises TypeError where value is a tensor of 16-bit floats."""
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}, in which rounding alone moves importance ratios by "
            "up to 3 % and counts by 0.4 %. Keep it in float32 from where it is computed; casting it back restores "
            "nothing. FSDP's mixed precision casts what a module with the loss inside is given: set "
            "MixedPrecisionPolicy(cast_forward_inputs=False) (FSDP1: MixedPrecision(cast_root_forward_inputs=False))"
        )


def check_scalar(name: str, value: Scalar, low: float = -math.inf, open_low: bool = False) -> Scalar:
    """A finite number in range, or a 0-d tensor (whose value isn't read)."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {reprlib.repr(value)} ({type(value).__name__})")
    if torch.compiler.is_compiling():  # a guard on the value would recompile at every step of a schedule
        return value
    if not math.isfinite(value) or value < low or (open_low and value == low):
        wanted = f" and {'>' if open_low else '>='} {low:g}" if low > -math.inf else ""
        raise ValueError(f"{name} must be finite{wanted}, got {value}")
    return float(value)


def check_rows(
    rows: Tensor, tokens: Tensor, cu_seqlens: Tensor | None, name: str = "logits", *, least_width: int = 1
) -> tuple[Tensor, Layout]:
    """Logits (or hidden states) as (B, T, width), a view, and the layout of everything that goes with them.

    least_width: 0 where a rank may hold no column of a vocabulary.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    for label, value in ((name, rows), ("tokens", tokens)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
    if rows.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {rows.dtype}")
    if rows.dim() not in (2, 3) or rows.shape[-1] < least_width:
        raise ValueError(
            f"{name} must be (batch, time, width) or packed (tokens, width) with width > 0, got {tuple(rows.shape)}"
        )
    if cu_seqlens is not None and rows.dim() == 3:
        cure = (
            f"give {name}.squeeze(0), and squeeze(0) of every argument shaped like tokens"
            if rows.shape[0] == 1
            else "pack the rows into one, or leave cu_seqlens out"
        )
        raise ValueError(f"cu_seqlens goes with packed {name}, got a padded batch of {rows.shape[0]}; {cure}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 (or int32), got {tokens.dtype}")
    check_tensor("tokens", tokens, rows.shape[:-1], rows.device)
    layout = Layout(tokens.shape, rows.device, compute_dtype(rows.dtype), *_sequences(tokens, cu_seqlens))
    return rows if rows.dim() == 3 else rows[None], layout


@dataclass(frozen=True)
class TokenBatch:
    """Per-token values that come without logits, and the segments their statistics are taken over.

    Attributes:
        layout: how the caller's arguments lie; its dtype is float64.
        mask: (B, T) bool. Nothing else may be read where it is False.
        marks: (B, T) int64: -1 where a mask or segment id is inconsistent and can't raise, else 0.
        segment_ids: (B, T) int64 in range everywhere: of each token, a sequence's where no segments were given. None
            for packed values without cu_seqlens and segments.
        num_segments: number of segments.
    """

    layout: Layout
    mask: Tensor
    marks: Tensor
    segment_ids: Tensor | None
    num_segments: int

    def result(self, values: Tensor) -> Tensor:
        """(B, T) values as float32 in the caller's shape: 0 where the mask is False, NaN where a token is invalid."""
        values = torch.where(self.mask, values, 0.0).float()
        values = torch.where(self.marks >= 0, values, math.nan)
        return values.reshape(self.layout.shape)


def check_batch(
    name: str,
    values: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> TokenBatch:
    """A batch of per-token values, (B, T) or packed (N,), with its mask and segments.

    Args:
        name: the argument that the shape is taken from, for messages.
        values: that argument.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dim() not in (1, 2):
        raise ValueError(f"{name} must be (batch, time) or packed (tokens,), got {tuple(values.shape)}")
    if cu_seqlens is not None and values.dim() == 2:
        raise ValueError(f"cu_seqlens goes with packed {name} (tokens,), got a padded batch {tuple(values.shape)}")
    layout = Layout(values.shape, values.device, torch.float64, *_sequences(values, cu_seqlens))
    rows = layout.check("mask", mask)
    counted = rows if rows.dtype == torch.bool else rows != 0
    marks = torch.zeros(rows.shape, dtype=torch.int64, device=values.device)
    if rows.dtype != torch.bool:
        marks = _reject(marks, counted & (rows != 1), rows, "mask must be bool, or hold only 0 and 1")
    if layout.in_order is not None:
        marks = torch.where(layout.in_order, marks, INVALID_TOKEN)
    if segment_ids is not None:
        limit = counted.numel() if num_segments is None else check_integer("num_segments", num_segments, 1)
        marks, ids, limit = _segments(layout, marks, counted, segment_ids, limit)
    else:
        ids, limit = layout.sequence_ids, layout.num_sequences
        if not layout.packed:
            ids = torch.arange(limit, device=values.device)[:, None].expand(layout.shape)
    return TokenBatch(layout, counted, marks, ids, limit)


def check_projection(
    layout: Layout, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> tuple[Projection, Layout]:
    """The head, with hidden already checked as rows (B, T, D), and the layout with the dtype of its logits' statistics.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    width = hidden.shape[-1]
    if not isinstance(weight, Tensor) or weight.dtype not in LOGIT_DTYPES:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a float32, float16, bfloat16 or float64 tensor, got {kind}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight must be (vocabulary, {width}) beside hidden's width {width}, got {tuple(weight.shape)}"
        )
    check_tensor("weight", weight, weight.shape, hidden.device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], hidden.device)
    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    cast_to = autocast_dtype(hidden.device)
    if cast_to is not None and product_dtype != torch.float64 and logits_dtype in (None, cast_to):
        product_dtype = cast_to
    allowed = dict.fromkeys((product_dtype, torch.promote_types(product_dtype, torch.float32)))
    if logits_dtype is None:
        logits_dtype = product_dtype
    if logits_dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"logits_dtype must be {names} where products are in {product_dtype}, got {logits_dtype}")
    projection = Projection(hidden, weight, bias, product_dtype, logits_dtype)
    return projection, replace(layout, dtype=compute_dtype(logits_dtype))


def check_transform(
    layout: Layout,
    *,
    width: int,
    temperature: Scalar,
    vocab_size: int | None,
    logit_softcap: float | None,
    logit_scale: float | None,
) -> LogitTransform:
    """The transform of logits of that width.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    if width < 1:
        raise ValueError("weight must have a row for each entry of the vocabulary, it has none")
    if vocab_size is None:
        vocab_size = width
    vocab_size = check_integer("vocab_size", vocab_size, 1, width, " (the logits' width)")
    for name, value, low in (("logit_softcap", logit_softcap, 0.0), ("logit_scale", logit_scale, -math.inf)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number or None, got a tensor")
        if value is not None:
            check_scalar(name, value, low, open_low=True)
            if not FLOAT32_SMALLEST <= abs(value) <= FLOAT32_LARGEST:
                limits = f"{FLOAT32_SMALLEST:.3g} and {FLOAT32_LARGEST:.3g}"
                raise ValueError(f"{name} must be None, or between {limits} in size, got {value}")
    if logit_softcap is not None and abs(logit_scale or 1.0) / logit_softcap > FLOAT32_LARGEST:
        raise ValueError(f"logit_softcap must be large enough to divide logit_scale by, got {logit_softcap}")
    transform = LogitTransform(vocab_size, temperature, logit_softcap, logit_scale)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        return replace(transform, temperature=layout.floats("temperature", temperature, a_sequence=True))
    temperature = check_scalar("temperature", temperature, low=0.0, open_low=True)
    if not isinstance(temperature, Tensor) and not torch.compiler.is_compiling():
        lowest = _lowest_temperature(transform)
        if not lowest <= temperature <= FLOAT32_LARGEST:
            raise ValueError(f"temperature must be between {lowest:.3g} and {FLOAT32_LARGEST:.3g}, got {temperature}")
    return replace(transform, temperature=temperature)


def _lowest_temperature(transform: LogitTransform) -> float:
    """The lowest one by which float32 can divide everything that the transform multiplies by."""
    return FLOAT32_SMALLEST * max(1.0, abs(transform.scale or 1.0), transform.softcap or 1.0)


def check_tokens(
    layout: Layout, tokens: Tensor, mask: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """(tokens, mask) as (B, T) int64 and bool; mask None counts every token.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    tokens = layout.check("tokens", tokens).to(torch.int64)
    if mask is None:
        counted = torch.ones_like(tokens, dtype=torch.bool)
    else:
        mask = layout.check("mask", mask)
        counted = mask if mask.dtype == torch.bool else mask != 0
        if mask.dtype != torch.bool:
            odd = counted & (mask != 1)
            tokens = _reject(tokens, odd, mask, "mask must be bool, or hold only 0 and 1")
    temperature = transform.temperature
    if isinstance(temperature, Tensor):
        sound = (temperature >= _lowest_temperature(transform)) & (temperature <= FLOAT32_LARGEST)
        advice = "temperature must be > 0, finite, and large enough for float32 to divide by where the mask is 1"
        tokens = _reject(tokens, counted & ~sound, temperature.expand(counted.shape), advice)
    if layout.in_order is not None:
        tokens = torch.where(layout.in_order, tokens, INVALID_TOKEN)
    if checks_values(layout.device):  # elsewhere the kernels see for themselves
        outside = counted & ((tokens < 0) | (tokens >= transform.vocab_size))
        advice = "tokens must be in [0, {limit}) where the mask is 1 (mask out padding and -100 labels)"
        _reject(tokens, outside, tokens, advice, limit=transform.vocab_size)
    return tokens, counted


def check_coefficients(
    cfg: EPOConfig,
    *,
    penalty_weight: Scalar,
    entropy_coeff: Scalar | None,
    kl_coeff: Scalar | None,
    normalizer: Scalar | None,
    loss_scale: Scalar,
) -> Coefficients:
    """The coefficients of one call: those given, else the config's."""
    check_precise("normalizer", normalizer)
    return Coefficients(
        entropy=check_scalar("entropy_coeff", cfg.entropy_coeff if entropy_coeff is None else entropy_coeff),
        penalty=check_scalar("penalty_weight", penalty_weight) * cfg.smooth_coeff,
        kl=check_scalar("kl_coeff", cfg.kl_coeff if kl_coeff is None else kl_coeff),
        normalizer=None if normalizer is None else check_scalar("normalizer", normalizer, low=0.0),
        loss_scale=check_scalar("loss_scale", loss_scale),
    )


def check_loss(
    layout: Layout,
    cfg: EPOConfig,
    tokens: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    width: int,
    temperature: Scalar | None,
    vocab_size: int | None,
    logit_softcap: float | None,
    logit_scale: float | None,
    penalty_weight: Scalar,
    entropy_coeff: Scalar | None,
    kl_coeff: Scalar | None,
    normalizer: Scalar | None,
    loss_scale: Scalar,
    **per_token: Any,
) -> tuple[LogitTransform, TokenInputs, Coefficients]:
    """All that a loss call was given beside its rows: see `check_transform`, `check_loss_inputs`, `check_coefficients`.

    Args:
        width: width of the logits.
        per_token: the other arguments of `check_loss_inputs`.
    """
    if not isinstance(cfg, EPOConfig):
        raise TypeError(f"cfg must be an EPOConfig, got {type(cfg).__name__}")
    transform = check_transform(
        layout,
        width=width,
        temperature=cfg.temperature if temperature is None else temperature,
        vocab_size=vocab_size,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
    )
    coefficients = check_coefficients(
        cfg,
        penalty_weight=penalty_weight,
        entropy_coeff=entropy_coeff,
        kl_coeff=kl_coeff,
        normalizer=normalizer,
        loss_scale=loss_scale,
    )
    inputs = check_loss_inputs(
        layout,
        cfg,
        tokens,
        old_log_probs,
        advantages,
        mask,
        transform=transform,
        kl_coeff=coefficients.kl,
        **per_token,
    )
    zero = isinstance(coefficients.normalizer, float) and coefficients.normalizer == 0
    if zero and checks_values(layout.device) and bool(inputs.mask.any()):
        raise ValueError("normalizer must be > 0 where tokens count, got 0")
    return transform, inputs, coefficients


def check_chunking(num_active: int | None, max_chunk_bytes: int, mask: Tensor) -> tuple[int | None, int]:
    """(num_active, max_chunk_bytes) beside a checked mask (B, T).

    Raises:
        ValueError: one of them isn't an int, or makes no sense for the mask.
    """
    if num_active is not None:
        num_active = check_integer("num_active", num_active, 0, mask.numel(), " (the number of tokens)")
        if checks_values(mask.device) and int(mask.sum()) != num_active:
            raise ValueError(
                f"num_active must be {int(mask.sum())}, the number of tokens whose mask is 1, got {num_active}"
            )
    return num_active, check_integer("max_chunk_bytes", max_chunk_bytes, 1)


def check_loss_inputs(
    layout: Layout,
    cfg: EPOConfig,
    tokens: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    transform: LogitTransform,
    kl_coeff: Scalar,
    entropy_bounds: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    num_segments: int | None,
    max_length: int | None,
    ref_log_probs: Tensor | None,
    is_weights: Tensor | None,
) -> TokenInputs:
    """Everything the loss knows of its tokens, checked and in one form.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    if cfg.penalty != "none" and entropy_bounds is None:
        raise ValueError(
            f"entropy_bounds must be (lower, upper) when penalty is {cfg.penalty!r}, got None; "
            "EntropyHistory.bounds makes them, (-inf, +inf) where nothing is known"
        )
    if ref_log_probs is None and (isinstance(kl_coeff, Tensor) or kl_coeff != 0):
        raise ValueError("ref_log_probs must be given when kl_coeff isn't 0, got None")
    if num_segments is not None:
        num_segments = check_integer("num_segments", num_segments, 1)
    by_segment = "segment" in (cfg.band_scope, cfg.ratio_unit)
    needs_sequences = (
        cfg.loss_agg_mode != "token-mean" or cfg.ratio_unit == "sequence" or (by_segment and segment_ids is None)
    )
    if layout.packed and layout.sequence_ids is None and needs_sequences:
        raise ValueError(
            f"cu_seqlens must be given for packed logits with loss_agg_mode={cfg.loss_agg_mode!r}, "
            f"band_scope={cfg.band_scope!r} and policy_loss={cfg.policy_loss!r}: the sequences must be known"
        )
    if mask is None:
        raise TypeError("mask must be a tensor, 1 at tokens that the policy produced, got None")
    token_rows, counted = check_tokens(layout, tokens, mask, transform)
    token_rows, segment_rows, segments, lower, upper = _check_bands(
        layout, cfg.band_scope, by_segment, token_rows, counted, entropy_bounds, segment_ids, num_segments
    )
    return TokenInputs(
        shape=layout.shape,
        tokens=token_rows,
        mask=counted,
        old_log_probs=None if old_log_probs is None else layout.log_probs("old_log_probs", old_log_probs),
        advantages=layout.floats("advantages", advantages, a_sequence=True),
        ref_log_probs=None if ref_log_probs is None else layout.log_probs("ref_log_probs", ref_log_probs),
        is_weights=None if is_weights is None else layout.floats("is_weights", is_weights, a_sequence=True),
        lower=lower,
        upper=upper,
        segment_ids=segment_rows,
        num_segments=segments,
        sequence_ids=layout.sequence_ids,
        num_sequences=layout.num_sequences,
        max_length=_check_max_length(layout, cfg, max_length),
    )


def _check_max_length(layout: Layout, cfg: EPOConfig, max_length: int | None) -> int | None:
    if cfg.loss_agg_mode != "seq-mean-token-sum-norm":
        return None
    if max_length is None:
        if layout.packed:
            raise ValueError(f"max_length must be given for packed logits with loss_agg_mode={cfg.loss_agg_mode!r}")
        return max(layout.shape[1], 1)
    return check_integer("max_length", max_length, 1)


def _sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int, Tensor | None]:
    """sequence_ids (1, N), number of sequences, in_order of a packed batch; None, B, None of a padded one."""
    if cu_seqlens is None:
        return None, tokens.shape[0] if tokens.dim() == 2 else 1, None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.device != tokens.device:
        raise ValueError(
            f"cu_seqlens must be (num_sequences + 1,) on {tokens.device}, got {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}{_squeeze_hint('cu_seqlens', cu_seqlens, cu_seqlens.shape[1:])}"
        )
    in_order: Tensor | None = None
    if not checks_values(tokens.device):
        rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        in_order = rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens.shape[0])
    else:
        _check_borders(cu_seqlens.tolist(), tokens.shape[0])
    num_sequences = cu_seqlens.shape[0] - 1
    positions = torch.arange(tokens.shape[0], device=tokens.device, dtype=cu_seqlens.dtype)
    # Tokens past the last border can only be there where values aren't read.
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True).clamp(max=num_sequences - 1)
    return ids[None], num_sequences, in_order


def _check_borders(borders: list[int], num_tokens: int) -> None:
    fall = next((place for place in range(1, len(borders)) if borders[place] < borders[place - 1]), None)
    if borders[0] != 0:
        got = f"{borders[0]} as its first border"
    elif fall is not None:
        got = f"{borders[fall]} after {borders[fall - 1]} at place {fall} of {len(borders)}"
    elif borders[-1] != num_tokens:
        got = f"{borders[-1]} as its last border"
    else:
        return
    raise ValueError(f"cu_seqlens must rise from 0 to the {num_tokens} tokens, got {got}")


def _check_bands(
    layout: Layout,
    scope: BandScope,
    keep_segments: bool,
    tokens: Tensor,
    counted: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    given_segments: int | None,
) -> tuple[Tensor, Tensor | None, int, Tensor | None, Tensor | None]:
    """tokens (-1 where the segment is out of range), segment_ids, num_segments, lower, upper; see `TokenInputs`."""
    if bounds is not None:
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not all(isinstance(b, Tensor) for b in bounds):
            raise TypeError(f"entropy_bounds must be a pair of tensors (lower, upper), got {type(bounds).__name__}")
        if bounds[0].shape != bounds[1].shape:
            shapes = f"{tuple(bounds[0].shape)} and {tuple(bounds[1].shape)}"
            raise ValueError(f"entropy_bounds must be a pair of one shape, got {shapes}")
        if bounds[0].numel() == 0 and layout.shape.numel() > 0:
            raise ValueError(f"entropy_bounds must hold at least one band, got shape {tuple(bounds[0].shape)}")
    by_segment = (
        bounds is not None and segment_ids is not None and bounds[0].dim() == 1 and bounds[0].shape != layout.shape
    )
    ids, num_segments = None, 0
    if by_segment or keep_segments:
        num_segments = counted.numel() if given_segments is None else given_segments
        if by_segment and bounds is not None:
            num_segments = bounds[0].shape[0]
        tokens, ids, num_segments = _segments(layout, tokens, counted, segment_ids, num_segments)

    def bound(name: str, value: Tensor) -> Tensor:
        if not by_segment:
            return layout.floats(name, value, a_sequence=True)
        check_tensor(name, value, torch.Size([num_segments]), layout.device)
        return value.detach().to(layout.dtype)

    def tightest(value: Tensor, unknown: float) -> Tensor:
        value = torch.where(counted, value, unknown)
        if ids is None:
            value = F.pad(value, (0, 1), value=unknown)  # rows of no tokens at all have no extremum
            return value.amax(dim=1) if unknown < 0 else value.amin(dim=1)
        result = torch.full((num_segments,), unknown, dtype=layout.dtype, device=layout.device)
        return result.scatter_reduce(0, ids.reshape(-1), value.reshape(-1), "amax" if unknown < 0 else "amin")

    lower = upper = None
    if bounds is not None:
        lower, upper = bound("entropy_bounds[0]", bounds[0]), bound("entropy_bounds[1]", bounds[1])
        if checks_values(layout.device):  # elsewhere the backends see for themselves
            pairs = torch.stack([lower, upper], dim=-1)
            pairs = pairs[ids] if by_segment else pairs
            bad = counted & ~(pairs[..., 0] <= pairs[..., 1])
            _reject(tokens, bad, pairs, "entropy_bounds must be (lower, upper), lower <= upper, where the mask is 1")
        if scope == "segment":
            # NaN outlives the tightening. Bands that are sound one by one may cross after it: both bounds then hold.
            lower = torch.where(lower <= upper, lower, math.nan)
            if not by_segment:
                lower, upper = tightest(lower, -math.inf), tightest(upper, math.inf)
        elif by_segment:
            lower, upper = lower[ids], upper[ids]
    return (tokens, ids, num_segments, lower, upper) if keep_segments else (tokens, None, 0, lower, upper)


def _segments(
    layout: Layout, tokens: Tensor, counted: Tensor, segment_ids: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor | None, int]:
    """tokens (-1 where the segment is out of range), segment_ids (B, T) in range everywhere, number of segments."""
    if segment_ids is None:
        return tokens, layout.sequence_ids, layout.num_sequences
    ids = layout.check("segment_ids", segment_ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segment_ids must be int64 (or int32), got {ids.dtype}")
    outside = counted & ((ids < 0) | (ids >= num_segments))
    advice = (
        "segment_ids must be in [0, {limit}) where the mask is 1: below the number of segments, which is that of "
        "entropy_bounds given a segment, else num_segments, else the number of tokens"
    )
    tokens = _reject(tokens, outside, ids, advice, limit=num_segments)
    return tokens, torch.where(counted & ~outside, ids, 0).to(torch.int64), num_segments


def _reject(tokens: Tensor, bad: Tensor, values: Tensor, message: str, limit: int | None = None) -> Tensor:
    """Raise where values may be read; elsewhere mark the tokens invalid: the loss becomes NaN and counts them.

    message holds {limit} unformatted: a size in a string would become a constant of the compiled graph.
    """
    if not checks_values(tokens.device):
        return torch.where(bad, INVALID_TOKEN, tokens)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = values[tuple(where)].tolist()
        raise ValueError(f"{message.format(limit=limit)}, got {value} at row {where[0]}, position {where[1]}")
    return tokens
