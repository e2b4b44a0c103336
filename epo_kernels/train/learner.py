"""The learner: scores sampled turns with the current weights, then updates the weights with the EPO loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import epo_kernels as ek
from epo_kernels.train.config import TrainConfig, epo_config
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.policies.policy import Policy, response_logits


def cosine_with_warmup(update: int, total: int, warmup_ratio: float, min_ratio: float) -> float:
    """Factor on the learning rate: linear to 1 over the first `warmup_ratio` of all updates, then cosine."""
    warmup = round(warmup_ratio * total)
    if update < warmup:
        return (update + 1) / warmup
    progress = min((update - warmup) / max(total - 1 - warmup, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + float(np.cos(np.pi * progress)))


class Learner:
    """Owns optimizer and learning-rate schedule.

    Args:
        policy: trained in place.
        reference: frozen model of the KL term; needed where loss.kl_coeff isn't 0.
    """

    def __init__(self, policy: Policy, reference: PreTrainedModel | None, config: TrainConfig) -> None:
        self._policy = policy
        self._reference = reference
        self._config = config
        self._loss_config = epo_config(config)
        optim = config.optim
        self._optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )
        total = max(config.steps * optim.epochs * optim.minibatches, 1)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda update: cosine_with_warmup(update, total, optim.warmup_ratio, optim.min_lr_ratio),
        )

    def score(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Set each sample's `old_log_probs` (and `ref_log_probs`); return the entropy of each response token.

        One pass without gradient; entropies are (len(response_ids),) float32 each.
        """
        log_probs, entropies = self._log_probs_and_entropy(self._policy.model, samples)
        for sample, own in zip(samples, log_probs, strict=True):
            sample.old_log_probs = own
        if self._reference is not None:
            for sample, own in zip(samples, self._log_probs_and_entropy(self._reference, samples)[0], strict=True):
                sample.ref_log_probs = own
        return entropies

    def update(
        self, samples: Sequence[Sample], history: ek.EntropyHistory, penalty_weight: float, seed: tuple[int, ...]
    ) -> dict[str, float]:
        """All epochs and minibatches of a step. Returns the metrics `actor/*` and `epo/*`, means over the updates.

        An update whose loss or gradient isn't finite is left out and counted.
        """
        model, optim = self._policy.model, self._config.optim
        sums: ek.LossMetrics | None = None
        norms: list[float] = []
        skipped = 0
        for epoch in range(optim.epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(samples))
            for indices in np.array_split(order, min(optim.minibatches, len(samples))):
                metrics = self._backward([samples[i] for i in indices], history, penalty_weight)
                sums = metrics if sums is None else sums + metrics
                norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm))
                if np.isfinite(norm) and bool(metrics.loss.isfinite()):
                    self._optimizer.step()
                    norms.append(norm)
                else:
                    skipped += 1
                self._optimizer.zero_grad(set_to_none=True)
                lr = float(self._scheduler.get_last_lr()[0])
                self._scheduler.step()
        assert sums is not None
        return self._named(sums.to_floats(), norms, skipped, lr)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    def _backward(self, samples: list[Sample], history: ek.EntropyHistory, penalty_weight: float) -> ek.LossMetrics:
        """Add the gradient of one minibatch, by micro-batches whose losses add up to it exactly."""
        config, loss = self._config, self._config.loss
        per_token = loss.loss_agg_mode == "token-mean"
        normalizer = float(sum(len(s.response_ids) for s in samples) if per_token else len(samples))
        sums: ek.LossMetrics | None = None
        for indices in micro_batches(samples, config.optim.micro_batch_tokens):
            batch = MiniBatch.of([samples[i] for i in indices], self._policy.pad_id, self._policy.model.device)
            out = ek.epo_loss(
                response_logits(self._policy.model, batch),
                batch.tokens,
                batch.old_log_probs,
                batch.advantages,
                batch.mask,
                self._loss_config,
                entropy_bounds=history.bounds(batch.turns, loss.band_low, loss.band_high),
                penalty_weight=penalty_weight,
                ref_log_probs=batch.ref_log_probs,
                normalizer=normalizer,
                # Constant: the padded width differs from micro-batch to micro-batch.
                max_length=config.rollout.max_response_tokens,
            )
            out.loss.backward()
            sums = out.metrics if sums is None else sums + out.metrics
        assert sums is not None
        return sums

    @torch.no_grad()
    def _log_probs_and_entropy(
        self, model: PreTrainedModel, samples: Sequence[Sample]
    ) -> tuple[list[Tensor], list[Tensor]]:
        log_probs: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        for indices in micro_batches(samples, self._config.optim.micro_batch_tokens):
            batch = MiniBatch.of([samples[i] for i in indices], self._policy.pad_id, model.device)
            log_prob, entropy = ek.log_probs_and_entropy(
                response_logits(model, batch),
                batch.tokens,
                mask=batch.mask,
                temperature=self._loss_config.temperature,
                entropy_grad=False,
            )
            assert entropy is not None
            for row, index in enumerate(indices):
                length = len(samples[index].response_ids)
                log_probs[index], entropies[index] = log_prob[row, :length].cpu(), entropy[row, :length].cpu()
        return [log_probs[i] for i in range(len(samples))], [entropies[i] for i in range(len(samples))]

    def _named(self, sums: dict[str, float], norms: list[float], skipped: int, lr: float) -> dict[str, float]:
        updates = len(norms) + skipped
        named = {
            "actor/loss": sums["loss"] / updates,
            "actor/pg_loss": sums["pg_loss"] / updates,
            "actor/pg_clipfrac": sums["pg_clipfrac"],
            "actor/pg_clipfrac_lower": sums["pg_clipfrac_lower"],
            "actor/ppo_kl": sums["ppo_kl"],
            "actor/lr": lr,
            "actor/skipped_updates": skipped,
            "epo/band_low_share": sums["below_band_fraction"],
            "epo/band_high_share": sums["above_band_fraction"],
        }
        if norms:
            named["actor/grad_norm"] = sum(norms) / len(norms)
        if self._loss_config.penalty not in ("none", "gate"):  # a gate has no value to tell
            named["epo/penalty"] = sums["penalty"] / updates
        if self._loss_config.kl_coeff:
            named["actor/kl_loss"] = sums["kl_loss"] / updates
        return named
