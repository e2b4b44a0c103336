"""EPO inside TRL 1.16: in a GRPO script, `EPOTrainer` for `GRPOTrainer` and `EPOTrainerConfig` for `GRPOConfig`.

TRL generates, scores rewards and computes advantages; this module replaces its loss. Each micro-batch goes from the
model's last hidden states to the loss through `linear_epo_loss`, so logits never exist whole. Where the loss needs
scores before its first gradient (a reference, top_entropy_quantile, off_policy_mask_threshold), it goes through
`linear_log_probs_and_entropy`, which computes the logits again in backward. `trl_loss` has the formula. With the band
off, loss, gradient and metrics are TRL's own.

The history receives the entropies of every generation once, under the policy that sampled it. They come for free: from
TRL's pass over the old log-probs, or, where TRL makes none because no update comes between sampling and loss, from the
loss. A generation is a step of the history, summed over all ranks, and closes when its last micro-batch is through
(num_iterations and steps_per_generation included), so one band holds for all its updates and knows the generations
before. With history_includes_current it closes before the first loss, at the price of a pass where TRL makes none.

A turn is a run of 1s in the mask of tokens that the policy wrote: `env_mask` of a `rollout_func`, or what lies between
the answers of tools and environments. A completion without observations is one turn.
"""

import functools
import os
import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

import epo_kernels as ek
from epo_kernels.heads import Head, check_head
from epo_kernels.integrations import require

require("trl", at_least="1.16", below="1.17")

from accelerate.utils import is_peft_model  # noqa: E402  (the package, and what it brings, after the check)
from transformers import ProcessorMixin  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402  (every family's)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput, nanmax, nanmin  # noqa: E402

from epo_kernels.integrations import trl_loss  # noqa: E402
from epo_kernels.integrations.trl_config import EPOTrainerConfig  # noqa: E402
from epo_kernels.integrations.trl_head import add_loss_head  # noqa: E402
from epo_kernels.integrations.trl_loss import MicroBatch, MicroBatchLoss, loss_mask, turns_of  # noqa: E402

__all__ = ["HISTORY_FILE", "EPOTrainer", "EPOTrainerConfig"]

HISTORY_FILE = "epo_history.pt"


class EPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with the EPO loss; see the module's text. Takes what that takes, with `EPOTrainerConfig` as args.

    Logs what TRL logs, and: `epo/band_low_share`, `epo/band_high_share` (of tokens outside the band), `epo/penalty`
    (mean P; a gate has none), `epo/phase_weight`, `epo/history` (mean H̄ of the turns seen). Checkpoints hold the
    history.

    Raises:
        TypeError: args is another config.
        ValueError: the model or an option is not supported; the message says what to change.
    """

    _tag_names = [*GRPOTrainer._tag_names, "epo"]  # noqa: RUF012  (TRL's own form)
    _name = "EPO"
    _entropy_window_stats: Tensor | None  # TRL's: sum and number of the entropies of an update so far
    _paper = {  # noqa: RUF012
        "title": "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
        "id": "2509.22576",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: EPOTrainerConfig | None = None,
        *more: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = EPOTrainerConfig("EPO")
        if not isinstance(args, EPOTrainerConfig):
            raise TypeError(f"args must be an EPOTrainerConfig (in place of GRPOConfig), got {type(args).__name__}")
        self._loss_config = args.epo_config()  # again: fields may have been set since
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._refuse_model()
        self.history = args.new_history()
        self._banded = args.penalty != "none" and self._entropy_bonus_enabled
        self._controller = args.new_controller()
        self._load_controller()
        self._entropy_from_loss = False
        self._first_scored: tuple[Tensor, Tensor] | None = None
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._text_config = base.config.get_text_config()
        try:
            check_head(base)
        except ValueError as error:
            raise ValueError(f"{error}; trl.GRPOTrainer can train this model") from error
        add_loss_head(base, self._scores_of_head)
        if self.ref_model is not None:  # of the policy's class and config
            add_loss_head(self.accelerator.unwrap_model(self.ref_model), self._scores_of_head)

    def _refuse_model(self) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("EPOTrainer supports text only: pass a tokenizer as processing_class, not a processor")
        if is_deepspeed_zero3_enabled():
            raise ValueError("EPOTrainer needs the unsharded weight of the head: use DeepSpeed's stage 2, not stage 3")

    # --- The history ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._first_scored = None
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._banded:
            self._note_entropy(output)
        return output

    def _note_entropy(self, output: dict[str, Any]) -> None:
        """Add a new generation's entropies to the history, unless the loss is to."""
        old, entropy = output.get("old_per_token_logps"), None
        if old is not None and self._first_scored is not None and self._first_scored[0] is old:
            entropy = self._first_scored[1]
        elif old is not None or self.args.history_includes_current:
            entropy = self._score_entropy(output)
        self._first_scored = None
        self._entropy_from_loss = entropy is None
        if entropy is not None:
            mask = loss_mask(output)
            self.history.update(turns_of(mask), entropy, mask)
        if self.args.history_includes_current:
            self._commit()

    @torch.no_grad()
    def _score_entropy(self, output: dict[str, Any]) -> Tensor:
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            _, entropy, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        return entropy

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which scores old log-probs before any reference: of that pass the entropies are kept too."""
        keep = self._first_scored is None and self._banded and model is self.model and self.model.training
        if keep:
            kwargs["compute_entropy"] = True
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if keep:
            self._first_scored = result[:2]
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        last = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if last and self._banded and not self.args.history_includes_current:
            self._commit()
        return loss

    def _commit(self) -> None:
        self.history.commit(self._all_ranks())

    def _all_ranks(self) -> torch.distributed.ProcessGroup | None:
        return torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            # TRL repeats a generation that a checkpoint interrupts, so its open part will be counted then.
            state = {**self.history.state_dict(), "open": None}
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(state, os.path.join(self._get_output_dir(trial=trial), folder, HISTORY_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._load_controller()  # TRL has read what it saves of it
        path = os.path.join(checkpoint, HISTORY_FILE)
        if os.path.isfile(path):
            self.history.load_state_dict(torch.load(path, weights_only=True))
        else:
            warnings.warn(f"{checkpoint} has no {HISTORY_FILE}: the entropy history starts empty", stacklevel=2)

    # --- The adaptive entropy coefficient ---

    def _load_controller(self) -> None:
        """Set the controller to TRL's two attributes, which TRL saves in its checkpoints and loads from them."""
        if self._controller is not None:
            state = {"rule": "step", "coeff": self.entropy_coef, "entropy": self._last_world_entropy, "integral": 0.0}
            self._controller.load_state_dict(state)

    @torch.no_grad()
    def _adapt_coefficient(self, loss: MicroBatchLoss) -> None:
        """Count a micro-batch, and after the last of an update move the coefficient for the next one."""
        assert self._controller is not None
        counted = loss.bonus_mask.sum()
        stats = torch.stack([torch.where(loss.bonus_mask, loss.out.entropy, 0).sum(), counted])
        before = self._entropy_window_stats
        self._entropy_window_stats = stats if before is None else before + stats
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
        # As in TRL, an update without tokens has an entropy of 0.
        self._controller.update(total / count.clamp(min=1), group=self._all_ranks())
        state = self._controller.state_dict()
        self.entropy_coef, self._last_world_entropy = state["coeff"], state["entropy"]
        self._entropy_window_stats = None

    # --- The loss ---

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        batch = self._micro_batch(inputs)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            loss, router_logits = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=attention_mask,
                loss_head=functools.partial(self._loss_of_head, batch=batch),
                **({"output_router_logits": True} if self.aux_loss_enabled else {}),
            )
        if training and self._banded and self._entropy_from_loss:
            self.history.update(batch.turns, loss.out.entropy, batch.mask)
        if training and self._controller is not None:
            self._adapt_coefficient(loss)
        self._log_loss(batch, loss)
        if not self.aux_loss_enabled:
            return cast(Tensor, loss.out.loss)
        balance = self._expert_balance(router_logits, attention_mask)
        mean = self.accelerator.gather_for_metrics(balance.detach()).mean().item()
        self._metrics["train" if training else "eval"]["aux_loss"].append(mean)
        return loss.out.loss + self.router_aux_loss_coef * balance / batch.accumulated

    def _micro_batch(self, inputs: dict[str, Any]) -> MicroBatch:
        mask, advantages = loss_mask(inputs), inputs["advantages"]
        turns = turns_of(mask)
        is_weights = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            is_weights = inputs["importance_sampling_ratio"].expand(mask.shape)
        # num_items_in_batch spans a generation of all ranks, which may be several updates
        items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            items = items / self.args.steps_per_generation
        return MicroBatch(
            inputs,
            self.args,
            mask,
            turns,
            share=trl_loss.policy_share(self.loss_type, mask, self.max_completion_length, items),
            advantages=advantages if advantages.dim() == 2 else advantages[:, None],
            is_weights=is_weights,
            accumulated=self.current_gradient_accumulation_steps if self.model.training else 1,
            phase_weight=self.args.phase_weight(self.state.global_step, self.state.max_steps),
            # A copy, because the controller moves its own in place before the backward pass.
            entropy_coeff=self.entropy_coef if self._controller is None else self._controller.entropy_coeff.clone(),
            bounds=self.history.bounds(turns, self.args.band_low, self.args.band_high),
        )

    def _expert_balance(self, router_logits: Any, attention_mask: Tensor) -> Tensor:
        """The load-balancing loss of a mixture of experts, before its coefficient."""
        config = self._text_config
        return cast(
            Tensor,
            load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask),
        )

    def _loss_of_head(self, hidden: Tensor, head: Head, *, batch: MicroBatch) -> MicroBatchLoss:
        """The micro-batch's loss from the last hidden states (B, P + T, D) and the head."""
        tokens, cfg = batch.inputs["completion_ids"], self._loss_config
        hidden, context = self._head_precision(hidden[:, -tokens.shape[1] - 1 : -1])  # the one before predicts a token
        with context:
            if not self.args.needs_scores_first:
                terms = batch.policy_terms() | batch.entropy_terms()
                out = ek.linear_epo_loss(hidden, head.weight, tokens, cfg=cfg, **terms, **head.keywords)
                return MicroBatchLoss(out, batch.mask)
            log_probs, entropy = ek.linear_log_probs_and_entropy(
                hidden, head.weight, tokens, mask=batch.mask, temperature=cfg.temperature, **head.keywords
            )
        assert entropy is not None
        bonus_mask = batch.mask
        if self.top_entropy_quantile < 1.0:
            bonus_mask = self.get_high_entropy_mask(entropy.detach(), batch.mask, 1 - self.top_entropy_quantile)
        keep = bonus_mask & self._on_policy_mask(log_probs, batch)
        return trl_loss.loss_of_scores(log_probs, entropy, batch, cfg, keep, bonus_mask)

    @torch.no_grad()
    def _on_policy_mask(self, log_probs: Tensor, batch: MicroBatch) -> Tensor:
        """Where TRL's off_policy_mask_threshold lets the policy loss count, bool, (B, T) or (B, 1)."""
        if self.off_policy_mask_threshold is None:
            return batch.mask
        old = batch.inputs.get("old_per_token_logps", log_probs)
        sampling = torch.where(batch.mask, batch.inputs.get("sampling_per_token_logps", old), 0.0)
        return self.get_off_policy_mask(
            batch.advantages, log_probs, sampling, batch.mask, self.off_policy_mask_threshold
        )

    def _scores_of_head(self, hidden: Tensor, head: Head, *, labels: Tensor) -> FusedCausalLMOutput:
        """Log-probs and entropies of the labels (B, P + T) but the first, float32, 0 where a label is -100."""
        labels = labels[:, 1:]
        hidden, context = self._head_precision(hidden[:, :-1])
        with context:
            log_probs, entropy = ek.linear_log_probs_and_entropy(
                hidden,
                head.weight,
                labels,
                mask=labels != -100,
                temperature=self._loss_config.temperature,
                entropy_grad=False,
                **head.keywords,
            )
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    def _head_precision(self, hidden: Tensor) -> tuple[Tensor, Any]:
        """The hidden states, and the context for the head's product, by TRL's cast_lm_head_to_fp32."""
        if not self.args.cast_lm_head_to_fp32:
            return hidden, nullcontext()
        return hidden.float(), torch.autocast(hidden.device.type, enabled=False)

    @torch.no_grad()
    def _log_loss(self, batch: MicroBatch, loss: MicroBatchLoss) -> None:
        """TRL's metrics and ours, over all ranks."""
        mode = "train" if self.model.training else "eval"
        logged = self._reduced_means(self._totals(batch, loss))
        if self.args.family == "clipped":
            logged |= self._clip_extremes(batch, loss.out.log_probs)
        if self._entropy_bonus_enabled:
            policy_loss = loss.out.metrics.pg_loss.float()
            if self.beta != 0.0:
                policy_loss = policy_loss + batch.weighted_kl(loss.out.log_probs)
            if self.loss_type not in trl_loss.OVER_UPDATE:  # of the others TRL logs that of a micro-batch
                policy_loss = policy_loss * batch.accumulated
            logged["policy_loss"] = self.accelerator.gather(policy_loss).nanmean().item()
            if mode == "train" and self.accelerator.sync_gradients:
                logged["entropy_coef"] = self.entropy_coef
        if self._banded:
            logged["epo/phase_weight"] = batch.phase_weight
            logged["epo/history"] = self.history.means().nanmean().item()
        for name, value in logged.items():
            self._metrics[mode][name].append(value)

    def _totals(self, batch: MicroBatch, loss: MicroBatchLoss) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of what is logged as a mean over the counted tokens of all ranks."""
        log_probs = loss.out.log_probs
        values = {"entropy": loss.out.entropy} | self._policy_values(batch, log_probs)
        if self.beta != 0.0:
            values["kl"] = batch.kl(log_probs)
        totals = {name: trl_loss.total_and_count(value, batch.mask) for name, value in values.items()}
        if self._banded:
            metrics, count = loss.out.metrics, loss.bonus_mask.sum()
            totals["epo/band_low_share"] = metrics.below_band_tokens, count
            totals["epo/band_high_share"] = metrics.above_band_tokens, count
            if self.args.penalty != "gate":  # which has no value of its own
                totals["epo/penalty"] = metrics.penalty * count * batch.accumulated, count
        return totals

    def _policy_values(self, batch: MicroBatch, log_probs: Tensor) -> dict[str, Tensor]:
        """What TRL logs of a loss type, by name, (B, T), or (B, 1) where it is a sequence's."""
        args, family = self.args, self.args.family
        if family == "clipped":
            low, high = trl_loss.clipped(log_probs, batch)
            return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
        if family == "cispo":
            return {"cispo_clip_ratio": (batch.ratio(log_probs) > args.clip_high) & (batch.advantages > 0)}
        if family == "vespo":
            weights = None if batch.is_weights is None else torch.where(batch.mask, batch.is_weights, 1.0)
            names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
            settings = {name: getattr(args, f"vespo_{name}") for name in names}
            ratios = batch.log_ratio(log_probs)
            phi = self.get_gamma_weights(batch.advantages, ratios, batch.mask, weights, **settings)
            return {"vespo/phi_seq_mean": phi}
        return {}

    def _reduced_means(self, totals: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """The means over all ranks, with one reduction."""
        stacked = torch.stack([torch.stack([part.double() for part in pair]) for pair in totals.values()])
        reduced = self.accelerator.reduce(stacked, reduction="sum").tolist()
        return {name: total / max(count, 1.0) for name, (total, count) in zip(totals, reduced, strict=True)}

    def _clip_extremes(self, batch: MicroBatch, log_probs: Tensor) -> dict[str, float]:
        """The least and largest share of clipped tokens of any sequence of all ranks."""
        low, high = (
            self.accelerator.gather(trl_loss.sequence_means(clipped, batch.mask))
            for clipped in trl_loss.clipped(log_probs, batch)
        )
        return {"clip_ratio/low_min": nanmin(low).item(), "clip_ratio/high_max": nanmax(high).item()}
