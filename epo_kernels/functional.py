"""The library's functions: each checks its arguments, chooses a backend and calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epo_kernels.backends import Backend, choose_backend
from epo_kernels.config import EPOConfig
from epo_kernels.inputs import (
    Layout,
    LossArguments,
    LossInputs,
    Scalar,
    TokenInputs,
    as_chunking,
    as_layout,
    as_loss_inputs,
    as_projection,
    as_rows,
    as_token_inputs,
    as_transform,
    check_precise,
)
from epo_kernels.placements import local_head, local_logits
from epo_kernels.reference import DistributionStatistics, EPOOutput, loss_of_given_statistics
from epo_kernels.shard import Shard, check_replicated, find_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_CHUNK_BYTES = 1 << 30


def epo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    cfg: EPOConfig,
    *,
    entropy_bounds: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    penalty_weight: Scalar = 1.0,
    entropy_coeff: Scalar | None = None,
    kl_coeff: Scalar | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    temperature: Scalar | None = None,
    normalizer: Scalar | None = None,
    loss_scale: Scalar = 1.0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    inplace: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> EPOOutput:
    """Clipped policy-gradient loss with entropy bonus, entropy band and KL, in one pass over the logits.

    `logits[:, t]` must predict `tokens[:, t]`. Slicing a causal model's output as `logits[:, :-1]` works, but forces
    PyTorch to copy the whole gradient; roll the tokens and mask the last position instead::

        out = ek.epo_loss(model(ids).logits, ids.roll(-1, 1), old_log_probs, advantages, mask, cfg)

    Args:
        logits: (B, T, V), or packed (N, V), any strides; bfloat16, float16 or float32 (float64 on the reference
            backend). A DTensor split by columns is computed without gathering (see `group`); any other is gathered.
        tokens: (B, T) or (N,) int64, the sampled tokens.
        old_log_probs: like tokens, float32 or float64, log-probs under the policy that sampled. None: on-policy, where
            the ratio is 1 but keeps its gradient.
        advantages: like tokens, or one per sequence: (B,).
        mask: like tokens, bool or 0/1; 1 at tokens that the policy generated. No argument is read where it is 0, so
            NaN and -100 are allowed there.
        cfg: see `EPOConfig`.
        entropy_bounds: (lower, upper) of the entropy band in nats: like tokens, one per sequence, or, with
            segment_ids, one per segment (num_segments,). lower <= upper; (-inf, +inf) where the band is unknown. In
            segment scope the tightest bounds among a segment's tokens apply. For a packed batch of N tokens, (N,) is
            always read as one per token: if there could also be N segments, pass bounds[segment_ids].
        segment_ids: like tokens, int64 in [0, num_segments): tokens with the same id form one segment, wherever they
            are. To keep the turns of different sequences separate, pass
            `turns + num_turns * torch.arange(B)[:, None]` and `num_segments=B * num_turns`. None: each sequence is a
            segment. Micro-batches add up exactly if none of them splits a segment.
        num_segments: number of segments. None: inferred from entropy_bounds, otherwise the number of tokens.
        cu_seqlens: (num_sequences + 1,) int32 or int64, sequence boundaries of a packed batch, from 0 to N.
        max_length: constant length of "seq-mean-token-sum-norm"; None: T of a padded batch.
        penalty_weight: phase weight β of the band penalty (`phase_weight`); number or 0-d tensor, like the next two.
            Under `torch.compile` pass tensors: a number is first compiled in as a constant.
        entropy_coeff: overrides the config.
        kl_coeff: overrides the config.
        ref_log_probs: like tokens, float32 or float64, log-probs under the reference policy; required unless kl_coeff
            is 0.
        is_weights: like tokens or (B,), float, multiplies the policy loss, e.g. truncated importance weights that
            correct rollout mismatch.
        temperature: overrides the config; number, 0-d tensor, like tokens, or (B,).
        normalizer: scalar that replaces the number of tokens (token-mean) or of sequences (other modes); not 16-bit.
            With the count of the whole batch, the losses of unequal micro-batches add up to the loss of the batch.
        loss_scale: scalar that multiplies the loss, folded into the token weights.
        vocab_size: number of real vocabulary entries, if the head is padded.
        logit_softcap: c in c tanh(x / c), applied to the scaled logits before the temperature.
        logit_scale: multiplies the logits, not 0; None for no scaling.
        inplace: lets a backend overwrite logits with their gradient, which halves the memory; do not use the logits
            afterwards.
        backend: a name from `available_backends`, or "auto".
        group: ranks across which the vocabulary is split. Logits are then this rank's columns, in rank order and of any
            number; all other arguments, and the results, are the same on every rank. Every rank must make the call.
            vocab_size refers to the whole vocabulary. Not supported under `torch.compile`.

    Returns:
        `EPOOutput(loss, metrics, log_probs, entropy)`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, the allowed values and the value given.
            Values of CUDA tensors are not read: an invalid one makes the loss NaN and is counted in
            `metrics.invalid_tokens`; with the environment variable EPO_KERNELS_CHECK=1 it raises.
        RuntimeError: the requested backend cannot run here, or group= under `torch.compile`. Second derivatives,
            forward-mode AD, `torch.func` transforms and batched gradients, except on the reference backend without
            group=.
    """
    arguments = LossArguments(
        old_log_probs, advantages, mask, cfg,
        entropy_bounds=entropy_bounds, segment_ids=segment_ids, num_segments=num_segments, max_length=max_length,
        penalty_weight=penalty_weight, entropy_coeff=entropy_coeff, kl_coeff=kl_coeff, ref_log_probs=ref_log_probs,
        is_weights=is_weights, temperature=temperature, normalizer=normalizer, loss_scale=loss_scale,
        vocab_size=vocab_size, logit_softcap=logit_softcap, logit_scale=logit_scale,
    )  # fmt: skip
    logits, group = local_logits(logits, group)
    rows, layout = as_rows(logits, tokens, cu_seqlens, least_width=1 if group is None else 0)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, rows.dtype), group, rows, rows.shape[-1], mask,
        function="epo_loss", vocab_size=vocab_size, cfg=cfg, bounds=entropy_bounds is not None,
    )  # fmt: skip
    inputs = as_loss_inputs(layout, tokens, arguments, width=width)
    _check_replicated(shard, inputs)
    return chosen.epo_loss(rows, inputs, inplace=inplace)


def linear_epo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    cfg: EPOConfig,
    *,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    entropy_bounds: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    penalty_weight: Scalar = 1.0,
    entropy_coeff: Scalar | None = None,
    kl_coeff: Scalar | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    temperature: Scalar | None = None,
    normalizer: Scalar | None = None,
    loss_scale: Scalar = 1.0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> EPOOutput:
    """`epo_loss` of the logits hidden weightᵀ + bias, never materialised in full (except on the reference backend).

    Tokens whose mask is 0 cost nothing: they are dropped before the first matrix product. The rest is processed in
    chunks: logits, loss and its gradient, and the gradient's two products, 6·N·D·V operations for N counted tokens.
    The logits are computed twice (8·N·D·V) by a band of segment scope, which needs every entropy before the first
    gradient; by "gspo", "vespo", "gmpo" and ratios of several tokens; by `kl_bias_correction`; and under
    `torch.compile`. `metrics.recomputed_tokens` counts those tokens.

    Args:
        hidden: (B, T, D), or packed (N, D), any strides: the last hidden states.
        weight: (V, D), any strides: `model.lm_head.weight`. Its gradient is accumulated in float32. For DTensors (also
            hidden and bias) see `group`.
        bias: (V,) or None.
        logits_dtype: dtype of the logits. None: the dtype of the products (autocast's, or the promoted dtype of hidden
            and weight). torch.float32 gives a bfloat16 model an fp32 head, also under autocast: products then take
            hidden and weight in their promoted dtype and accumulate in float32.
        num_active: number of tokens whose mask is 1, if known; saves the only host sync. A wrong number raises if
            values are read (on the CPU), and otherwise makes loss, metrics and gradients NaN.
        max_chunk_bytes: memory limit of a chunk of tokens, in bytes: logits, hidden states and their gradients.
        group: ranks across which the vocabulary is split. Weight and bias are then this rank's rows, in rank order and
            of any number; all other arguments are the same on every rank, as are the results and the gradient of
            hidden. The gradients of weight and bias belong to the rank. A DTensor weight with Shard(0) next to DTensor
            hidden states with Replicate on the same mesh is computed in the same way. Other DTensors are gathered:
            their gradients are averaged over the mesh if hidden is a plain tensor (each rank has its own batch, as
            under FSDP); otherwise every rank keeps its shard.

    All other arguments, the results and the errors are the same as for `epo_loss`.
    """
    arguments = LossArguments(
        old_log_probs, advantages, mask, cfg,
        entropy_bounds=entropy_bounds, segment_ids=segment_ids, num_segments=num_segments, max_length=max_length,
        penalty_weight=penalty_weight, entropy_coeff=entropy_coeff, kl_coeff=kl_coeff, ref_log_probs=ref_log_probs,
        is_weights=is_weights, temperature=temperature, normalizer=normalizer, loss_scale=loss_scale,
        vocab_size=vocab_size, logit_softcap=logit_softcap, logit_scale=logit_scale,
    )  # fmt: skip
    hidden, weight, bias, group = local_head(hidden, weight, bias, group)
    rows, layout = as_rows(hidden, tokens, cu_seqlens, name="hidden")
    projection, layout = as_projection(layout, rows, weight, bias, logits_dtype)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, projection.logits_dtype), group, rows, weight.shape[0], mask,
        function="linear_epo_loss", vocab_size=vocab_size, cfg=cfg, bounds=entropy_bounds is not None,
        dtype_of_logits=projection.logits_dtype, max_chunk_bytes=max_chunk_bytes,
    )  # fmt: skip
    inputs = as_loss_inputs(layout, tokens, arguments, width=width)
    chunking = as_chunking(num_active, max_chunk_bytes, inputs.mask, shard)
    _check_replicated(shard, inputs, hidden=rows)
    return chosen.linear_epo_loss(projection, inputs, chunking)


def epo_loss_from_log_probs(
    log_probs: Tensor,
    entropy: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    cfg: EPOConfig,
    *,
    entropy_bounds: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    penalty_weight: Scalar = 1.0,
    entropy_coeff: Scalar | None = None,
    kl_coeff: Scalar | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    normalizer: Scalar | None = None,
    loss_scale: Scalar = 1.0,
) -> EPOOutput:
    """`epo_loss` from precomputed log-probs and entropies, as a trainer's engine passes them to its loss.

    Runs in eager PyTorch on these small tensors; the expensive part is computing them (`log_probs_and_entropy`,
    `linear_log_probs_and_entropy`). The config's temperature is ignored: both tensors already include it.

    Args:
        log_probs: (B, T), or packed (N,), float32 or float64, log-prob of each sampled token; differentiable.
        entropy: like log_probs, float, in nats; differentiable. The bonus and the band send gradient into it.

    All other arguments, the results and the errors are the same as for `epo_loss`, with log_probs in place of tokens.
    """
    arguments = LossArguments(
        old_log_probs, advantages, mask, cfg,
        entropy_bounds=entropy_bounds, segment_ids=segment_ids, num_segments=num_segments, max_length=max_length,
        penalty_weight=penalty_weight, entropy_coeff=entropy_coeff, kl_coeff=kl_coeff, ref_log_probs=ref_log_probs,
        is_weights=is_weights, normalizer=normalizer, loss_scale=loss_scale,
    )  # fmt: skip
    for name, value in (("log_probs", log_probs), ("entropy", entropy)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    check_precise("log_probs", log_probs)
    if log_probs.dim() not in (1, 2):
        raise ValueError(f"log_probs must be (batch, time) or packed (tokens,), got {tuple(log_probs.shape)}")
    layout = as_layout(log_probs.shape, log_probs.device, log_probs.dtype, cu_seqlens, "log_probs")
    log_prob_rows, entropy_rows = (
        layout.per_token(name, value).to(layout.dtype)
        for name, value in (("log_probs", log_probs), ("entropy", entropy))
    )
    # There are no logits, so no vocabulary to check tokens against: use a vocabulary with a single entry.
    inputs = as_loss_inputs(layout, torch.zeros_like(log_probs, dtype=torch.int64), arguments, width=1)
    return loss_of_given_statistics(log_prob_rows, entropy_rows, inputs)


def log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    entropy: bool = True,
    entropy_grad: bool = True,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token and entropy of its distribution, both differentiable with respect to logits.

    Args:
        logits: (B, T, V), or packed (N, V); see `epo_loss`, also for arguments not listed here.
        tokens: (B, T) or (N,) int64.
        mask: like tokens; results are 0 and nothing is read where it is 0. None: every token counts.
        temperature: number, 0-d tensor, like tokens, or one per sequence: (B,).
        entropy: False skips the entropy and returns None in its place.
        entropy_grad: False returns a detached entropy, which adds no cost to backward.

    Returns:
        (log_probs, entropy), float32 (float64 for float64 logits), shaped like tokens; entropy in nats.

    Raises:
        TypeError, ValueError, RuntimeError: as for `epo_loss`.
    """
    logits, group = local_logits(logits, group)
    rows, layout = as_rows(logits, tokens, cu_seqlens=None, least_width=1 if group is None else 0)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, rows.dtype), group, rows, rows.shape[-1], mask,
        function="log_probs_and_entropy", vocab_size=vocab_size, entropy=entropy,
    )  # fmt: skip
    transform = as_transform(layout, width, temperature, vocab_size, logit_softcap, logit_scale)
    inputs = as_token_inputs(layout, tokens, mask, transform)
    _check_replicated(shard, inputs)
    log_probs, entropies = chosen.log_probs_and_entropy(rows, inputs, entropy=entropy)
    return _like_tokens(layout, log_probs, entropies, entropy_grad)


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    entropy: bool = True,
    entropy_grad: bool = True,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`log_probs_and_entropy` of the logits hidden weightᵀ + bias, never materialised (except on the reference).

    Without gradients (under `torch.no_grad`, or if no input requires one) it only scores: one product, 2·N·D·V
    operations, with one chunk in memory. With gradients, backward recomputes the logits, 8·N·D·V in total.

    hidden, weight, bias, logits_dtype, num_active, max_chunk_bytes and group are as in `linear_epo_loss`; all other
    arguments, the results and the errors are the same as for `log_probs_and_entropy`.
    """
    hidden, weight, bias, group = local_head(hidden, weight, bias, group)
    rows, layout = as_rows(hidden, tokens, cu_seqlens=None, name="hidden")
    projection, layout = as_projection(layout, rows, weight, bias, logits_dtype)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, projection.logits_dtype), group, rows, weight.shape[0], mask,
        function="linear_log_probs_and_entropy", vocab_size=vocab_size, entropy=entropy,
        dtype_of_logits=projection.logits_dtype, max_chunk_bytes=max_chunk_bytes,
    )  # fmt: skip
    transform = as_transform(layout, width, temperature, vocab_size, logit_softcap, logit_scale)
    inputs = as_token_inputs(layout, tokens, mask, transform)
    chunking = as_chunking(num_active, max_chunk_bytes, inputs.mask, shard)
    _check_replicated(shard, inputs, hidden=rows)
    log_probs, entropies = chosen.linear_log_probs_and_entropy(projection, inputs, chunking, entropy=entropy)
    return _like_tokens(layout, log_probs, entropies, entropy_grad)


@torch.no_grad()
def distribution_statistics(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> DistributionStatistics:
    """Entropy, varentropy, top-1 and collision probability of each token's distribution, for logs and filters.

    No gradients, and no support for `torch.compile(fullgraph=True)`. It reads the logits twice. Of these
    statistics, the losses compute only the entropy.

    Args:
        logits: (B, T, V), or packed (N, V); see `epo_loss`, also for the arguments not listed here.
        mask: (B, T) or (N,); results are 0 and nothing is read where it is 0. None: every token counts.
        temperature: number, 0-d tensor, like mask, or one per sequence: (B,).

    Returns:
        `DistributionStatistics`, each shaped like logits without their last dimension.

    Raises:
        TypeError, ValueError, RuntimeError: as for `epo_loss`.
    """
    logits, group = local_logits(logits, group)
    tokens = _first_tokens(logits, "logits")
    rows, layout = as_rows(logits, tokens, cu_seqlens=None, least_width=1 if group is None else 0)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, rows.dtype), group, rows, rows.shape[-1], mask,
        function="distribution_statistics", vocab_size=vocab_size,
    )  # fmt: skip
    transform = as_transform(layout, width, temperature, vocab_size, logit_softcap, logit_scale)
    inputs = as_token_inputs(layout, tokens, mask, transform)
    _check_replicated(shard, inputs)
    return _distribution(layout, chosen.distribution_statistics(rows, inputs))


@torch.no_grad()
def linear_distribution_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    num_active: int | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    mask: Tensor | None = None,
    temperature: Scalar = 1.0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> DistributionStatistics:
    """`distribution_statistics` of the logits hidden weightᵀ + bias: 2·N·D·V operations, one chunk in memory.

    hidden, weight, bias, logits_dtype, num_active, max_chunk_bytes and group are as in `linear_epo_loss`; all other
    arguments, the result and the errors are as in `distribution_statistics`.
    """
    hidden, weight, bias, group = local_head(hidden, weight, bias, group)
    tokens = _first_tokens(hidden, "hidden")
    rows, layout = as_rows(hidden, tokens, cu_seqlens=None, name="hidden")
    projection, layout = as_projection(layout, rows, weight, bias, logits_dtype)
    chosen, shard, width = _over_ranks(
        choose_backend(backend, rows.device, projection.logits_dtype), group, rows, weight.shape[0], mask,
        function="linear_distribution_statistics", vocab_size=vocab_size,
        dtype_of_logits=projection.logits_dtype, max_chunk_bytes=max_chunk_bytes,
    )  # fmt: skip
    transform = as_transform(layout, width, temperature, vocab_size, logit_softcap, logit_scale)
    inputs = as_token_inputs(layout, tokens, mask, transform)
    chunking = as_chunking(num_active, max_chunk_bytes, inputs.mask, shard)
    _check_replicated(shard, inputs, hidden=rows)
    return _distribution(layout, chosen.linear_distribution_statistics(projection, inputs, chunking))


def _first_tokens(rows: Tensor, name: str) -> Tensor:
    """Valid tokens for a function to which they make no difference."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    return torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device)


def _distribution(layout: Layout, values: DistributionStatistics) -> DistributionStatistics:
    return DistributionStatistics(*(value.reshape(layout.shape) for value in values))


def _over_ranks(
    backend: Backend, group: ProcessGroup | None, rows: Tensor, width: int, mask: Tensor | None, **facts: object
) -> tuple[Backend, Shard | None, int]:
    """(backend, shard, full width of the logits): unchanged, or for a vocabulary split across group.

    facts: what the ranks must agree on; a disagreement would otherwise leave a rank waiting in a collective.
    """
    if group is None:
        return backend, None, width
    shard = find_shard(
        group,
        rows.device,
        width,
        mask if isinstance(mask, Tensor) else None,
        **facts,
        number_of_tokens=rows.shape[0] * rows.shape[1],
        dtype=rows.dtype,
        backend=backend.name,
        gradient=torch.is_grad_enabled() and rows.requires_grad,
    )
    return backend.sharded(shard), shard, shard.total


def _check_replicated(shard: Shard | None, inputs: TokenInputs, **others: Tensor) -> None:
    """`check_replicated` for all arguments of the call, and for other tensors by name."""
    if shard is None:
        return
    transform = inputs.transform
    arguments = {**others, **vars(inputs), "temperature": transform.temperature}
    arguments |= {"logit_softcap": transform.softcap, "logit_scale": transform.scale}
    if isinstance(inputs, LossInputs):
        of_call = inputs.coefficients
        arguments |= vars(inputs.aggregation)
        arguments |= {"entropy_coeff": of_call.entropy, "penalty_weight": of_call.penalty, "kl_coeff": of_call.kl}
    check_replicated(shard, **arguments)


def _like_tokens(
    layout: Layout, log_probs: Tensor, entropy: Tensor | None, entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    log_probs = log_probs.reshape(layout.shape)
    if entropy is None:
        return log_probs, None
    return log_probs, (entropy if entropy_grad else entropy.detach()).reshape(layout.shape)
