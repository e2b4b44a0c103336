"""Entropy-based advantage shaping, computed together with the old log-probs: REPO, AEM and EMPG. No gradient flows."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from epo_kernels.inputs import Scalar, TokenBatch, as_scalar, as_token_batch

ShapingRule = Literal["repo", "aem", "empg"]


@torch.no_grad()
def shape_advantages(
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    rule: ShapingRule,
    coeff: Scalar,
    log_probs: Tensor | None = None,
    clarity_coeff: Scalar = 1.0,
    clarity_weight: Scalar = 0.05,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    episode_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Advantages for the loss, shaped by the entropy of the policy that sampled.

    "repo" acts on tokens. The others act on turns: H is a turn's mean token entropy, H̃ = (H - min) / (max - min) over
    the turns it is normalised with (0 if all are equal), and `mean` is over those turns, with equal weight::

        repo    A - β (log π + H),                   β = coeff
        aem     A exp(-λ H̃) / mean exp(-λ H̃),        λ = coeff
        empg    A' - mean A',                        k = coeff, k' = clarity_coeff, ζ = clarity_weight
                A' = A exp(-k H̃) / mean exp(-k H̃) + ζ exp(-k' H̃ of the episode's next turn, if there is one)

    Sources: REPO, arXiv 2603.11682, in its basic form: log π + H has mean 0 under the policy, so for β > 0 likely
    tokens lose advantage and unlikely ones gain it. β is constant here; pass a different value each step to adapt it.
    AEM, arXiv 2605.00425: min-max and mean over the turns of a rollout group. EMPG, arXiv 2509.09265, equations 7 to
    12: min-max and means over the whole batch, k = k' = 1, and ζ = 0.05 or 0.1 in public implementations. The paper
    does not define `mean A'` for turns whose tokens have different advantages; here it is the mean over the turn's
    tokens.

    Args:
        advantages: like entropy, or one per sequence, float.
        entropy: H of each token under the sampling policy, (B, T) or packed (N,), float.
        mask: like entropy, bool or 0/1: 1 at tokens that the policy generated. No other argument is read where it is 0.
        rule: see above.
        coeff: β, λ or k; a finite number or a 0-d tensor.
        log_probs: log π of the sampled tokens, like entropy, float32 or float64. Required by "repo".
        clarity_coeff: k' of EMPG.
        clarity_weight: ζ of EMPG; 0 for no bonus.
        segment_ids: int, like entropy: the turn of each token, unique in the batch. None: each sequence is a turn.
        num_segments: exclusive upper limit of segment_ids; None: the number of tokens.
        cu_seqlens: int, (num_sequences + 1,), boundaries of packed sequences. Required for packed tokens if sequences
            must be known: for turns without segment_ids, episode_ids, group_ids, the bonus of "empg", or advantages
            given per sequence.
        episode_ids: int, (num_sequences,): sequences with the same id form one episode, in batch order. None: each
            sequence is an episode. Used only by the bonus of "empg".
        group_ids: int, (num_sequences,): turns are normalised within the sequences that have the same id. None: over
            all turns of the batch. Not used by "repo".

    Returns:
        The shaped advantages, float32 like entropy, detached, 0 where the mask is 0.

    Raises:
        ValueError: shapes differ, rule is unknown, or sequences or log_probs are missing; on the CPU also if values
            are out of range. On other devices the advantages of such tokens are NaN.
        TypeError: an argument has the wrong type, or log-probs are 16-bit.
    """
    if rule not in get_args(ShapingRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(ShapingRule))}, got {rule!r}")
    coeff = as_scalar("coeff", coeff)
    batch = as_token_batch(
        "entropy", entropy, mask, cu_seqlens=cu_seqlens, segment_ids=segment_ids, num_segments=num_segments
    )
    given = torch.where(batch.mask, batch.layout.floats("advantages", advantages, a_sequence=True), 0.0)
    entropies = torch.where(batch.mask, batch.layout.floats("entropy", entropy), 0.0)
    if rule == "repo":
        if log_probs is None:
            raise ValueError("log_probs must be given with rule='repo', got None")
        own = torch.where(batch.mask, batch.layout.log_probs("log_probs", log_probs), 0.0)
        return batch.result(given - coeff * (own + entropies))
    turns = _Turns(batch, group_ids)
    certainty = turns.normalized(turns.mean(entropies))
    scale = turns.over_mean(torch.exp(-coeff * certainty))
    if rule == "aem":
        return batch.result(given * turns.spread(scale))
    bonus = as_scalar("clarity_weight", clarity_weight) * torch.exp(
        -as_scalar("clarity_coeff", clarity_coeff) * certainty
    )
    modified = given * turns.spread(scale) + turns.spread(turns.of_next(bonus, episode_ids))
    return batch.result(modified - turns.spread(turns.group_mean(turns.mean(modified))))


class _Turns:
    """Statistics of the S turns of a batch, (S,) float64 each, and of the groups they are normalised within.

    Turns without counted tokens are ignored.
    """

    def __init__(self, batch: TokenBatch, group_ids: Tensor | None) -> None:
        if batch.segment_ids is None:
            raise ValueError("segment_ids or cu_seqlens must be given for packed tokens, to identify the turns")
        self._batch = batch
        self._ids = batch.segment_ids
        self._size = batch.num_segments
        self._counts = self._sum(batch.mask.double())
        self._seen = self._counts > 0
        self._groups = torch.zeros_like(self._counts, dtype=torch.int64)
        if group_ids is not None:
            _, self._groups = self._by_turn("group_ids", group_ids).unique(return_inverse=True)
        self._num_groups = self._size  # an upper limit

    def spread(self, values: Tensor) -> Tensor:
        """(S,) -> (B, T)."""
        return values[self._ids]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each turn's counted tokens, from (B, T) values that are 0 elsewhere."""
        return self._sum(torch.where(self._batch.mask, values, 0.0)) / self._counts.clamp(min=1)

    def group_mean(self, values: Tensor) -> Tensor:
        """The mean over each turn's group."""
        sums, counts = values.new_zeros(self._num_groups), values.new_zeros(self._num_groups)
        sums.index_add_(0, self._groups, torch.where(self._seen, values, 0.0))
        counts.index_add_(0, self._groups, self._seen.double())
        return (sums / counts.clamp(min=1))[self._groups]

    def over_mean(self, values: Tensor) -> Tensor:
        return values / torch.where(self._seen, self.group_mean(values), 1.0)

    def normalized(self, values: Tensor) -> Tensor:
        """Values min-max scaled to [0, 1] within the group; 0 if minimum and maximum are equal."""
        least = self._extreme(values, math.inf)
        width = self._extreme(values, -math.inf) - least
        # NaN compares unequal, so it stays NaN.
        return torch.where(self._seen & (width != 0), (values - least) / width, 0.0)

    def of_next(self, values: Tensor, episode_ids: Tensor | None) -> Tensor:
        """For each turn, the value of the next turn in its episode; 0 for the last."""
        episodes = self._sequence_of_turn() if episode_ids is None else self._by_turn("episode_ids", episode_ids)
        places = torch.arange(self._ids.numel(), device=self._ids.device)
        places = torch.where(self._batch.mask.reshape(-1), places, places.numel())
        first = torch.full((self._size,), places.numel(), dtype=torch.int64, device=self._ids.device)
        first = first.scatter_reduce(0, self._ids.reshape(-1), places, "amin")
        order = first.argsort(stable=True)  # turns without counted tokens come last
        order = order[episodes[order].argsort(stable=True)]
        following = order.roll(-1)
        goes_on = (episodes[order] == episodes[following]) & self._seen[following]
        goes_on[-1:] = False
        return torch.zeros_like(values).index_copy(0, order, torch.where(goes_on, values[following], 0.0))

    def _sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._size).index_add_(0, self._ids.reshape(-1), values.reshape(-1))

    def _extreme(self, values: Tensor, otherwise: float) -> Tensor:
        values = torch.where(self._seen, values, otherwise)
        start = torch.full((self._num_groups,), otherwise, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, self._groups, values, "amin" if otherwise > 0 else "amax")[self._groups]

    def _by_turn(self, name: str, ids: Tensor) -> Tensor:
        """(S,) from one id per sequence."""
        layout = self._batch.layout
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{name} must be an int64 (or int32) tensor, got {kind}")
        sequences = self._sequence_of_turn()
        if ids.shape != (layout.num_sequences,) or ids.device != layout.device:
            raise ValueError(
                f"{name} must have one id per sequence, ({layout.num_sequences},) on {layout.device}, got "
                f"{tuple(ids.shape)} on {ids.device}"
            )
        return ids.to(torch.int64)[sequences]

    def _sequence_of_turn(self) -> Tensor:
        """The sequence that contains each turn's first counted token, (S,) int64."""
        layout = self._batch.layout
        if layout.packed and layout.sequence_ids is None:
            raise ValueError("cu_seqlens must be given for packed tokens, to identify the sequences")
        own = layout.sequence_ids
        if own is None:
            own = torch.arange(layout.num_sequences, device=layout.device)[:, None].expand(layout.shape)
        own = torch.where(self._batch.mask, own, layout.num_sequences)
        start = torch.full((self._size,), layout.num_sequences, dtype=torch.int64, device=layout.device)
        first = start.scatter_reduce(0, self._ids.reshape(-1), own.reshape(-1), "amin")
        return first.clamp(max=max(layout.num_sequences - 1, 0))
