"""The library's functions: check, choose a backend, call it."""

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

    `logits[:, t]` must predict `tokens[:, t]`. Slicing a causal model's output as `logits[:, :-1]` works, but makes
    PyTorch copy the whole gradient; roll the tokens instead and mask the last position::

        out = ek.epo_loss(model(ids).logits, ids.roll(-1, 1), old_log_probs, advantages, mask, cfg)

    Args:
        logits: (B, T, V), or packed (N, V), any strides; bfloat16, float16, float32 (float64 on the reference backend).
            A DTensor behaves as its whole: split by columns it is computed so (`group`), else it is gathered.
        tokens: (B, T) or (N,) int64, the sampled tokens.
        old_log_probs: like tokens, float32 or float64, log-probs under the policy that sampled; None: on-policy, where
            the ratio is 1 and has its gradient.
        advantages: like tokens, or one a sequence: (B,).
        mask: like tokens, bool or 0/1; 1 at tokens that the policy produced. Nothing is read where it is 0, in any
            argument: NaN and -100 may stand there.
        cfg: see `EPOConfig`.
        entropy_bounds: (lower, upper) of the entropy band in nats, like tokens, one a sequence, or, with segment_ids,
            one a segment: (num_segments,). lower <= upper; (-inf, +inf) where nothing is known. In segment scope the
            tightest bounds among a segment's tokens hold. In a packed batch of N tokens, (N,) is always read as like
            tokens: where there could be N segments too, give bounds[segment_ids].
        segment_ids: like tokens, int64 in [0, num_segments): tokens of one id make one segment, wherever they stand.
            For turns told apart by sequence, give `turns + num_turns * torch.arange(B)[:, None]` and
            `num_segments=B * num_turns`. None: a sequence is a segment. Micro-batches add up exactly when none of them
            cuts a segment.
        num_segments: number of segments; None: as many as entropy_bounds tells, else as there are tokens.
        cu_seqlens: (num_sequences + 1,) int32 or int64, borders of the sequences of a packed batch, from 0 to N.
        max_length: constant length of "seq-mean-token-sum-norm"; None: T of a padded batch.
        penalty_weight: phase weight β of the band penalty (`phase_weight`); number or 0-d tensor, as are the next two.
            Under `torch.compile` give tensors: a number is first compiled in as a constant.
        entropy_coeff: in place of the config's.
        kl_coeff: in place of the config's.
        ref_log_probs: like tokens, float32 or float64, log-probs under the reference policy; needed where kl_coeff
            isn't 0.
        is_weights: like tokens (or (B,)), float, factor of the policy loss, e.g. truncated importance weights against
            rollout mismatch.
        temperature: in place of the config's; number, 0-d tensor, like tokens, or (B,).
        normalizer: takes the place of the number of tokens (token-mean) or of sequences (other modes), scalar, in more
            than 16 bits. With the whole batch's number, the losses of unequal micro-batches add up to that of the
            batch.
        loss_scale: factor on the loss, scalar, folded into the token weights.
        vocab_size: entries of a row that are vocabulary, where a padded head has more.
        logit_softcap: c of c tanh(x / c), applied to scaled logits before the temperature.
        logit_scale: factor on the logits, not 0; None for none.
        inplace: allows a backend to overwrite logits with their gradient, which halves the memory; don't use the logits
            afterwards.
        backend: a name of `available_backends`, or "auto".
        group: ranks among which the vocabulary is split: logits are then this rank's columns, those that follow the
            columns of the rank before, in any number; all else is the same on every rank, and so is what is returned.
            Every rank must make the call. vocab_size is the whole vocabulary's. Not under `torch.compile`.

    Returns:
        `EPOOutput(loss, metrics, log_probs, entropy)`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it must be and what it is. Values of
            CUDA tensors aren't read: there a bad one makes the loss NaN, counts in `metrics.invalid_tokens`, and raises
            with the environment variable EPO_KERNELS_CHECK=1.
        RuntimeError: a backend asked for by name can't run here, or group= under `torch.compile`. Second derivatives,
            forward-mode AD, `torch.func` transforms and batched gradients, unless the reference backend computes them
            without group=.
    """
    arguments = LossArguments.of(locals())
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
    """`epo_loss` of the logits hidden weightᵀ + bias, which never exist whole (but on the reference backend).

    Tokens whose mask is 0 cost nothing: they are dropped before the first product. What remains goes by in chunks:
    logits, loss and their gradient, and the gradient's two products, 6·N·D·V operations for N counted tokens. Segment
    scope needs every entropy before the first gradient and computes the logits twice, 8·N·D·V, as does a graph made by
    `torch.compile`; those tokens are counted in `metrics.recomputed_tokens`.

    Args:
        hidden: (B, T, D), or packed (N, D), any strides: the last hidden states.
        weight: (V, D), any strides: `model.lm_head.weight`. Its gradient is added up in float32. DTensors behave as
            their whole (hidden and bias too): see `group`.
        bias: (V,) or None.
        logits_dtype: dtype of the logits; None: that of the products (autocast's, or what hidden and weight promote
            to). torch.float32 is the fp32 head of a bfloat16 model, also under autocast: products then take hidden and
            weight in the dtype that they promote to, and are added up in float32.
        num_active: number of tokens whose mask is 1, where the caller knows it; saves the one host sync. A wrong number
            raises where values are read (on the CPU), and elsewhere makes loss, metrics and gradients NaN.
        max_chunk_bytes: bound on the memory of a chunk of tokens, in bytes: logits, hidden states and their gradients.
        group: ranks among which the vocabulary is split: weight and bias are then this rank's rows, those that follow
            the rows of the rank before, in any number; all else is the same on every rank, and so are the results and
            the gradient of hidden; those of weight and bias are the rank's own. A weight that is a DTensor Shard(0)
            beside hidden states that are a DTensor Replicate of the same mesh is computed so too. Other DTensors are
            gathered: their gradients are averaged over the mesh where hidden is plain (a rank's own batch, as under
            FSDP), else every rank keeps its share.

    All other arguments, the result and the errors are those of `epo_loss`.
    """
    arguments = LossArguments.of(locals())
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
    """`epo_loss` where log-probs and entropy are there already, as a trainer's engine hands them to its loss.

    Eager PyTorch over these small tensors; what they cost was spent where they were made (`log_probs_and_entropy`,
    `linear_log_probs_and_entropy`). The config's temperature isn't read: it is in both already.

    Args:
        log_probs: (B, T), or packed (N,), float32 or float64, log-prob of each sampled token; differentiable.
        entropy: like log_probs, float, in nats; differentiable. Its gradient is the bonus' and the band's.

    All other arguments, the result and the errors are those of `epo_loss`, with log_probs in the place of tokens.
    """
    arguments = LossArguments.of(locals())
    for name, value in (("log_probs", log_probs), ("entropy", entropy)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating tensor, got {kind}")
    check_precise("log_probs", log_probs)
    if log_probs.dim() not in (1, 2):
        raise ValueError(f"log_probs must be (batch, time) or packed (tokens,), got {tuple(log_probs.shape)}")
    layout = as_layout(log_probs.shape, log_probs.device, log_probs.dtype, cu_seqlens, "log_probs")
    log_prob_rows, entropy_rows = (
        layout.per_token(name, value).to(layout.dtype)
        for name, value in (("log_probs", log_probs), ("entropy", entropy))
    )
    # Without logits there is no vocabulary to check tokens against: all are the one entry of a vocabulary of 1.
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
    """Log-probability of each token and entropy of its distribution, both differentiable in logits.

    Args:
        logits: (B, T, V), or packed (N, V); see `epo_loss`, as for the arguments not named here.
        tokens: (B, T) or (N,) int64.
        mask: like tokens; results are 0 and nothing is read where it is 0. None: every token counts.
        temperature: number, 0-d tensor, like tokens, or one a sequence: (B,).
        entropy: False: don't compute it, and return None in its place.
        entropy_grad: False: entropy comes detached, and costs backward nothing.

    Returns:
        (log_probs, entropy), float32 (float64 for float64 logits), shaped like tokens; entropy in nats.

    Raises:
        TypeError, ValueError, RuntimeError: as `epo_loss`.
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
    """`log_probs_and_entropy` of the logits hidden weightᵀ + bias, which never exist whole (but on the reference).

    Without gradient (under `torch.no_grad`, or where nothing requires it) it scores: one product, 2·N·D·V operations,
    one chunk alive. With gradient the logits are computed again in backward, 8·N·D·V in all.

    hidden, weight, bias, logits_dtype, num_active, max_chunk_bytes and group are those of `linear_epo_loss`; all other
    arguments, the result and the errors are those of `log_probs_and_entropy`.
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

    Without gradients, and not inside `torch.compile(fullgraph=True)`. It reads the logits twice: the losses compute
    none of this but the entropy.

    Args:
        logits: (B, T, V), or packed (N, V); see `epo_loss`, as for the arguments not named here.
        mask: (B, T) or (N,); results are 0 and nothing is read where it is 0. None: every token counts.
        temperature: number, 0-d tensor, like mask, or one a sequence: (B,).

    Returns:
        `DistributionStatistics`, each shaped like logits without their last dimension.

    Raises:
        TypeError, ValueError, RuntimeError: as `epo_loss`.
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
    """`distribution_statistics` of the logits hidden weightᵀ + bias: 2·N·D·V operations, one chunk of logits alive.

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
    """(backend, shard, width of the whole logits): as given, or of a vocabulary split over group.

    facts: what the ranks must agree on, so that none waits for what another never sends.
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
    """`check_replicated` for everything known of the tokens, and other tensors by name."""
    if shard is None:
        return
    arguments = {**others, **vars(inputs), "temperature": inputs.transform.temperature}
    if isinstance(inputs, LossInputs):
        arguments |= vars(inputs.aggregation)
    check_replicated(shard, **arguments)


def _like_tokens(
    layout: Layout, log_probs: Tensor, entropy: Tensor | None, entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    log_probs = log_probs.reshape(layout.shape)
    if entropy is None:
        return log_probs, None
    return log_probs, (entropy if entropy_grad else entropy.detach()).reshape(layout.shape)
