"""TRL's loss of a micro-batch on top of the library's: weights, masks, KL and what is logged.

With M the mean over the micro-batch's counted tokens:

    loss = M(w · is_weight · pg) + β M(w · KL) - entropy_coef · M'(H - phase · smooth_coeff · P)

w are the weights of TRL's loss_type, relative to those of that mean. M' is M, or with top_entropy_quantile the mean
over the tokens it selects. All is divided by the number of accumulated micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import epo_kernels as ek
from epo_kernels.integrations.trl_config import EPOTrainerConfig

# The types that divide by the tokens of a whole update, num_items_in_batch, instead of by micro-batch.
OVER_UPDATE = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class MicroBatch:
    """What the loss reads of a micro-batch of B completions, padded to T.

    Attributes:
        inputs: TRL's.
        args: the trainer's.
        mask: (B, T) bool, tokens that count.
        turns: (B, T) int64.
        share: (B,), w above.
        advantages: (B, T), or (B, 1) for one per sequence.
        is_weights: (B, T) float, TRL's importance_sampling_ratio of vLLM's tokens, or None.
        accumulated: micro-batches to an update.
        phase_weight: β of the penalty.
        entropy_coeff: λ, number or 0-d tensor.
        bounds: lower and upper bound of the band at each token, (B, T) each.
    """

    inputs: dict[str, Any]
    args: EPOTrainerConfig
    mask: Tensor
    turns: Tensor
    share: Tensor
    advantages: Tensor
    is_weights: Tensor | None
    accumulated: int
    phase_weight: float
    entropy_coeff: float | Tensor
    bounds: tuple[Tensor, Tensor]

    @property
    def normalizer(self) -> Tensor:
        """0-d; a counted token's weight in the mean above is 1 / normalizer."""
        return self.mask.sum().clamp(min=1) * self.accumulated

    def policy_terms(self) -> dict[str, Any]:
        """Arguments of the library's loss for the policy loss alone."""
        return {
            "old_log_probs": self.inputs.get("old_per_token_logps"),
            "advantages": self.share[:, None] * self.advantages.expand(self.mask.shape),
            "is_weights": self.is_weights,
            "mask": self.mask,
            "normalizer": self.normalizer,
        }

    def entropy_terms(self) -> dict[str, Any]:
        """Arguments of the library's loss for bonus and band."""
        sequences, length = self.mask.shape
        rows = torch.arange(sequences, device=self.turns.device)[:, None]
        return {
            "entropy_coeff": self.entropy_coeff,
            "entropy_bounds": self.bounds,
            "segment_ids": self.turns + length * rows,
            "num_segments": sequences * length,
            "penalty_weight": self.phase_weight,
        }

    def log_ratio(self, log_probs: Tensor) -> Tensor:
        """log_prob - old_log_prob, (B, T), 0 at masked tokens."""
        old = self.inputs.get("old_per_token_logps", log_probs.detach())
        return torch.where(self.mask, log_probs - old, 0.0)

    def ratio(self, log_probs: Tensor) -> Tensor:
        """Importance ratio of each token, (B, T), or at the sequence level of each sequence, (B, 1)."""
        log_ratio = self.log_ratio(log_probs)
        if self.args.sequence_level:
            log_ratio = log_ratio.sum(dim=1, keepdim=True) / self.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return log_ratio.exp()

    def kl(self, log_probs: Tensor) -> Tensor:
        """TRL's KL to the reference, (B, T), 0 at masked tokens.

        Not the library's k3, which is bounded as verl's is.
        """
        difference = torch.where(self.mask, self.inputs["ref_per_token_logps"] - log_probs, 0.0)
        kl = difference.exp() - difference - 1
        return kl * self.ratio(log_probs) if self.args.use_bias_correction_kl else kl

    def weighted_kl(self, log_probs: Tensor) -> Tensor:
        """β M(w · KL) above, 0-d."""
        return self.args.beta * (self.share[:, None] * self.kl(log_probs)).sum() / self.normalizer


class MicroBatchLoss(NamedTuple):
    """The library's output for the whole loss, and the tokens that bonus and band act on, (B, T) bool."""

    out: ek.EPOOutput
    bonus_mask: Tensor


def loss_of_scores(
    log_probs: Tensor, entropy: Tensor, batch: MicroBatch, cfg: ek.EPOConfig, keep: Tensor, bonus_mask: Tensor
) -> MicroBatchLoss:
    """The loss from log-probs and entropies (B, T) on.

    keep: (B, T) bool, tokens whose policy loss counts. bonus_mask: those whose bonus and band count.
    """
    terms = batch.policy_terms()
    terms["advantages"] = terms["advantages"] * keep
    # Two calls: the policy loss needs the statistics of whole sequences, bonus and band act on the chosen tokens alone.
    policy_cfg = replace(cfg, penalty="none")
    policy = ek.epo_loss_from_log_probs(log_probs, entropy.detach(), cfg=policy_cfg, entropy_coeff=0.0, **terms)
    nothing = torch.zeros_like(log_probs)
    bonus = ek.epo_loss_from_log_probs(
        nothing,
        entropy,
        None,
        nothing,
        bonus_mask,
        cfg,
        normalizer=bonus_mask.sum().clamp(min=1) * batch.accumulated,
        **batch.entropy_terms(),
    )
    loss = policy.loss + bonus.loss
    if batch.args.beta != 0.0:
        loss = loss + batch.weighted_kl(log_probs)
    of_band = {name: getattr(bonus.metrics, name) for name in ("penalty", "below_band_tokens", "above_band_tokens")}
    return MicroBatchLoss(policy._replace(loss=loss, metrics=policy.metrics.replace(**of_band)), bonus_mask)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Tokens that the policy wrote and that count, (B, T) bool."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


def turns_of(mask: Tensor) -> Tensor:
    """Index of the run of 1s that a token lies in, from 0 in each sequence, (B, T) int64; unspecified at 0s."""
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return ((mask & ~before).cumsum(dim=1) - 1).clamp(min=0)


def policy_share(loss_type: str, mask: Tensor, max_length: int, items: Tensor) -> Tensor:
    """w: a token's weight in TRL's loss_type over its weight in the mean over the micro-batch, (B,) float32.

    max_length: TRL's max_completion_length. items: counted tokens of a micro-batch of this rank, on average over the
    generation, 0-d.
    """
    sequences, tokens, lengths = mask.shape[0], mask.sum().clamp(min=1), mask.sum(dim=1).clamp(min=1)
    divisors: dict[str, Tensor | int] = {
        "grpo": sequences * lengths,
        "sapo": sequences * lengths,
        "bnpo": tokens,
        "dr_grpo": sequences * max_length,
        "luspo": sequences,
        **dict.fromkeys(OVER_UPDATE, items),
    }
    return (tokens / divisors[loss_type]).float().expand(sequences)


def total_and_count(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over counted tokens of (B, T) and their number; of (B, 1), which TRL takes as a sequence's, over all rows."""
    if values.shape[1] == 1:
        return values.sum(), torch.tensor(values.shape[0], device=values.device)
    return torch.where(mask, values, 0).sum(), mask.sum()


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each sequence, (B,), NaN without counted tokens; (B, 1) has its mean already."""
    return values.squeeze(1).float() if values.shape[1] == 1 else (values & mask).sum(dim=1) / mask.sum(dim=1)


def clipped(log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Where TRL counts the ratio as clipped below and above, bool, (B, T) or (B, 1)."""
    args, ratio = batch.args, batch.ratio(log_probs)
    if args.delta is not None:
        ratio = ratio.clamp(max=args.delta)
    low = (ratio < 1 - args.epsilon) & (batch.advantages < 0)
    high = (ratio > 1 + args.clip_high) & (batch.advantages > 0)
    return low, high
