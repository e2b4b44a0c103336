"""The learner: scores samples with the current weights, then updates the weights with the EPO loss.

Both go from hidden states to scores and loss without materialising logits (`ek.linear_log_probs_and_entropy`,
`ek.linear_epo_loss`); tokens that the policy did not generate are dropped before the head.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import epo_kernels as ek
from epo_kernels.heads import check_head, head_of
from epo_kernels.metrics import METRIC_NAMES
from epo_kernels.train.config import ConfigError, TrainConfig, epo_config
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.io.progress import Report, ignore, part_of
from epo_kernels.train.io.stopwatch import Stopwatch
from epo_kernels.train.models.check import row_width_of
from epo_kernels.train.models.lora import without_adapters
from epo_kernels.train.models.policy import Policy, casts_kept, checkpointing, response_hidden
from epo_kernels.train.rl.optimizer import StepOptimizer
from epo_kernels.train.rl.post_mortem import Circumstances, NonFiniteError


class RowFilling:
    """How well the rows of an update are filled, on this rank."""

    def __init__(self) -> None:
        self._places = self._padding = self._tokens = 0

    def add(self, batch: MiniBatch, samples: Sequence[Sample]) -> None:
        self._places += batch.input_ids.numel()
        self._padding += batch.num_padding
        self._tokens += sum(sample.length - 1 for sample in samples)

    def metrics(self) -> dict[str, float]:
        """`perf/padding_share` of the rows' tokens, and `perf/shared_prompt_share` of the samples' tokens."""
        computed = self._places - self._padding
        return {
            "perf/padding_share": self._padding / self._places,
            "perf/shared_prompt_share": 1 - computed / self._tokens,
        }


class Learner:
    """Owns the optimizer.

    Args:
        reference: frozen model of the KL term, required if the loss or the reward uses the KL. With adapters it is the
            policy's own model, used without them.

    Raises:
        ConfigError: the model's logits cannot be computed from its hidden states; see `check_head`.
    """

    def __init__(
        self, policy: Policy, reference: PreTrainedModel | None, config: TrainConfig, ranks: Ranks | None = None
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._config = config
        self._loss_config = epo_config(config)
        self._controller = config.loss.controller(policy.model.device)
        self._ranks = ranks or Ranks()
        try:
            check_head(policy.model)
        except ValueError as error:
            raise ConfigError(f"model.name_or_path={config.model.name_or_path}: {error}") from error
        self._row_width = row_width_of(policy, config)
        self._filling = RowFilling()
        self._ranks.shard(policy.model.get_decoder(), policy.model.device)
        # While the critic warms up, the policy takes no steps, so its schedule is shorter.
        steps = config.horizon - (config.critic.warmup_steps if config.algorithm.name == "ppo" else 0)
        self._optimizer = StepOptimizer(policy.model, config.optim, config.optim, max(steps, 1), self._ranks)

    def score(self, samples: Sequence[Sample], report: Report = ignore) -> None:
        """Set each sample's `old_log_probs` and `entropy` (and `ref_log_probs`), without gradients.

        `report` receives the number of samples scored; with a reference, each of the two passes counts half.
        """
        share = 1.0 if self._reference is None else 0.5
        with casts_kept(self._policy.model):
            own = self._scores(self._policy.model, samples, part_of(report, 0, share))
        for sample, scores in zip(samples, own, strict=True):
            sample.old_log_probs, sample.entropy = scores
        if self._reference is not None:
            adapted = self._reference is self._policy.model
            with without_adapters(self._reference) if adapted else nullcontext():
                others = self._scores(self._reference, samples, part_of(report, share * len(samples), share))
                for sample, scores in zip(samples, others, strict=True):
                    sample.ref_log_probs = scores[0]

    def update(
        self,
        samples: Sequence[Sample],
        history: ek.EntropyHistory,
        penalty_weight: float,
        seed: tuple[int, ...],
        report: Report = ignore,
    ) -> dict[str, float]:
        """All epochs and minibatches of a step. Returns the metrics `actor/*` and `epo/*`, means over the updates.

        An update whose loss or gradient is not finite is skipped and counted. `report` receives the number of samples
        used, counted in each epoch.

        Raises:
            NonFiniteError: optim.max_skipped_updates consecutive updates were skipped.
        """
        watch = Stopwatch(self._policy.model.device)
        self._filling = RowFilling()
        sums: list[ek.LossMetrics] = []
        done = 0
        with watch.timed("update"):
            for minibatch in self._optimizer.minibatches(samples, seed):
                with casts_kept(self._policy.model):
                    sums.append(self._backward(minibatch, history, penalty_weight, watch, part_of(report, done)))
                done += len(minibatch)
                norm = self._optimizer.apply(sums[-1].loss)
                if self._controller:
                    self._controller.update(sums[-1], group=self._ranks.group)
                if (skipped := self._optimizer.skipped_in_row) >= self._config.optim.max_skipped_updates:
                    loss, tokens = sums[-1].loss, int(sums[-1].nonfinite_tokens)
                    raise NonFiniteError(
                        minibatch,
                        Circumstances.of("policy", self._policy.model, skipped, loss, norm, tokens, penalty_weight),
                    )
        named = self._named(sum(sums[1:], start=sums[0]).to_floats(), len(sums))
        seconds = watch.read()
        named["timing_s/loss"] = seconds["loss"]
        named["perf/loss_share"] = seconds["loss"] / seconds["update"]
        return named | self._filling.metrics() | self._optimizer.metrics("actor")

    def state_dict(self) -> dict[str, Any]:
        controller = self._controller.state_dict() if self._controller else None
        return {**self._optimizer.state_dict(), "entropy_controller": controller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore optimizer and entropy controller. In a branch with another rule, the controller is reset."""
        self._optimizer.load_state_dict(state)
        saved = state.get("entropy_controller")
        if self._controller and saved and saved["rule"] == self._controller.rule:
            self._controller.load_state_dict(saved)

    def _backward(
        self,
        samples: list[Sample],
        history: ek.EntropyHistory,
        penalty_weight: float,
        watch: Stopwatch,
        report: Report = ignore,
    ) -> ek.LossMetrics:
        """Add the gradient of one minibatch, by micro-batches whose losses add up to it exactly."""
        per_token = self._config.loss.loss_agg_mode == "token-mean"
        normalizer = float(sum(s.num_sampled for s in samples) if per_token else len(samples))
        model = self._policy.model
        sums = ek.LossMetrics(torch.zeros(len(METRIC_NAMES), dtype=torch.float64, device=model.device))
        for indices, counts in self._ranks.deal(self._micro_batches(samples), report):
            batch = self._batch([samples[i] for i in indices])
            self._filling.add(batch, [samples[i] for i in indices])
            with checkpointing(model, self._config.model.gradient_checkpointing):
                hidden = response_hidden(model.get_decoder(), batch)
                with watch.timed("loss"):  # detached from the graph so that it can be timed: same gradients
                    leaf = hidden.detach().requires_grad_()
                    out = self._loss(leaf, batch, history, penalty_weight, normalizer)
                    (out.loss if counts else 0.0 * out.loss).backward()
                hidden.backward(leaf.grad)
            sums = sums + out.metrics if counts else sums
        return sums.all_reduce() if self._ranks.size > 1 else sums

    def _loss(
        self,
        hidden: Tensor,
        batch: MiniBatch,
        history: ek.EntropyHistory,
        penalty_weight: float,
        normalizer: float,
    ) -> ek.EPOOutput:
        config, loss, head = self._config, self._config.loss, head_of(self._policy.model)
        assert batch.advantages is not None
        segments: dict[str, Any] = {}
        if "segment" in (loss.band_scope, self._loss_config.ratio_unit):  # a turn of a sequence
            rows = torch.arange(len(batch.turns), device=batch.turns.device)[:, None]
            segments = {
                "segment_ids": batch.turns.clamp(min=0) + rows * history.num_turns,
                "num_segments": len(batch.turns) * history.num_turns,
            }
        longest = config.rollout.max_response_tokens
        if config.rollout.layout == "episode":
            longest *= history.num_turns
        return ek.linear_epo_loss(
            hidden,
            head.weight,
            batch.tokens,
            batch.old_log_probs,
            batch.advantages,
            batch.mask,
            self._loss_config,
            **head.keywords,
            num_active=batch.num_sampled,
            entropy_bounds=history.bounds(batch.turns, loss.band_low, loss.band_high),
            **segments,
            penalty_weight=penalty_weight,
            entropy_coeff=self._controller.entropy_coeff if self._controller else None,
            ref_log_probs=batch.ref_log_probs if loss.kl_coeff else None,
            is_weights=batch.is_weights,
            normalizer=normalizer,
            # A constant, because the padded width differs between micro-batches.
            max_length=longest,
        )

    @torch.no_grad()
    def _scores(self, model: PreTrainedModel, samples: Sequence[Sample], report: Report) -> list[tuple[Tensor, Tensor]]:
        """(log-probs, entropies) per sample, (R,) float32 each; 0 at tokens that the policy did not generate."""
        scores: dict[int, tuple[Tensor, Tensor]] = {}
        head = head_of(model)
        for indices, _ in self._ranks.deal(self._micro_batches(samples), report):
            batch = self._batch([samples[i] for i in indices])
            log_probs, entropy = ek.linear_log_probs_and_entropy(
                response_hidden(model.get_decoder(), batch),
                head.weight,
                batch.tokens,
                **head.keywords,
                num_active=batch.num_sampled,
                mask=batch.mask,
                temperature=self._loss_config.temperature,
                entropy_grad=False,
            )
            assert entropy is not None
            log_probs, entropy = log_probs.cpu(), entropy.cpu()
            for row, index in enumerate(indices):
                length = len(samples[index].response_ids)
                scores[index] = log_probs[row, :length].clone(), entropy[row, :length].clone()
        for others in self._ranks.gather(scores):
            scores |= others
        return [scores[i] for i in range(len(samples))]

    def _micro_batches(self, samples: Sequence[Sample]) -> list[list[int]]:
        return list(micro_batches(samples, self._config.optim.micro_batch_tokens, self._row_width))

    def _batch(self, samples: Sequence[Sample]) -> MiniBatch:
        return MiniBatch.of(samples, self._policy.pad_id, self._policy.model.device, self._row_width)

    def _named(self, sums: dict[str, float], updates: int) -> dict[str, float]:
        named = {
            "actor/loss": sums["loss"] / updates,
            "actor/pg_loss": sums["pg_loss"] / updates,
            "actor/pg_clipfrac": sums["pg_clipfrac"],
            "actor/pg_clipfrac_lower": sums["pg_clipfrac_lower"],
            "actor/ppo_kl": sums["ppo_kl"],
            "epo/band_low_share": sums["below_band_fraction"],
            "epo/band_high_share": sums["above_band_fraction"],
        }
        if self._loss_config.penalty not in ("none", "gate"):  # a gate has no penalty value
            named["epo/penalty"] = sums["penalty"] / updates
        if self._loss_config.kl_coeff:
            named["actor/kl_loss"] = sums["kl_loss"] / updates
        if self._controller:  # used by the next update
            named["actor/entropy_coeff"] = float(self._controller.entropy_coeff)
        return named
