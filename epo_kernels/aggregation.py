"""Token weights for each aggregation mode. No other module interprets the modes.

loss = Σ_i w_i ℓ_i, so kernels need only w:

    token-mean                m / N                 N    = number of counted tokens
    seq-mean-token-sum        m / B                 B    = number of sequences with at least one counted token
    seq-mean-token-mean       m / (B n_s)           n_s  = number of counted tokens of the sequence
    seq-mean-token-sum-norm   m / (B max_length)

`normalizer` replaces N or B; verl's "token-sum" is token-mean with normalizer 1. Names and definitions follow verl 0.9
(`agg_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from epo_kernels.inputs import Aggregation


def sequence_lengths(mask: Tensor, sequence_ids: Tensor | None, num_sequences: int) -> Tensor:
    """Number of counted tokens per sequence, int64 (num_sequences,).
    Args:
        mask: (B, T) bool.
        sequence_ids: (B, T) int64 for packed batches; None if each row is one sequence.
        num_sequences: B, or the number of packed sequences.
    """
    if sequence_ids is None:
        return mask.sum(dim=1)
    lengths = torch.zeros(num_sequences, dtype=torch.int64, device=mask.device)
    return lengths.index_add(0, sequence_ids.reshape(-1), mask.reshape(-1).long())


def token_weights(
    mask: Tensor, aggregation: Aggregation, lengths: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Token weights w, (B, T) of `dtype`; exactly 0 where the mask is 0, even if no token counts.

    Args:
        mask: (B, T) bool.
        aggregation: the mode and its parameters.
        lengths: (num_sequences,) counted tokens per sequence.
        dtype: dtype of the weights.
    """
    mode, normalizer = aggregation.loss_agg_mode, aggregation.normalizer
    if normalizer is None:
        denominator = (lengths if mode == "token-mean" else lengths > 0).sum().clamp(min=1).to(dtype)
    elif isinstance(normalizer, Tensor):
        denominator = normalizer.to(mask.device, dtype)
    else:  # torch.full, because as_tensor would bake the number into the compiled graph
        denominator = torch.full((), normalizer, dtype=dtype, device=mask.device)
    if mode == "seq-mean-token-mean":
        ids, per_sequence = aggregation.sequence_ids, lengths.clamp(min=1).to(dtype)
        denominator = denominator * (per_sequence[:, None] if ids is None else per_sequence[ids])
    elif mode == "seq-mean-token-sum-norm":
        assert aggregation.max_length is not None, "inputs/loss.py sets max_length for this mode"
        denominator = denominator * aggregation.max_length
    return torch.where(mask, (aggregation.loss_scale / denominator).to(dtype), 0.0)
