"""EPO inside TRL 1.16: in a GRPO script, `EPOTrainer` for `GRPOTrainer` and `EPOTrainerConfig` for `GRPOConfig`.

TRL generates, scores rewards and makes advantages; this replaces its loss. Each micro-batch goes from the model's last
hidden states to the loss through `linear_epo_loss` (with a reference, beta > 0, `linear_log_probs_and_entropy`),
so logits never exist. With entropy_coef 0 the loss is TRL's own:

    loss = Σ w_i (importance ratio · pg_i + β KL_i) − entropy_coef · Σ u_i (H_i − phase · smooth_coeff · P_i)

w are the weights of TRL's loss_type. u are those of TRL's own entropy bonus, the mean over a micro-batch's tokens
whatever the loss_type, and the band's penalty has them too.

The history takes the entropies of every generation once, under the policy that sampled it. They come for free: from
TRL's pass over the old log-probs, or, where TRL makes none because no update comes between sampling and loss, from the
loss. A generation is a step of the history, summed over all ranks, and closes when its last micro-batch is through
(num_iterations and steps_per_generation included), so one band holds for all its updates and knows the generations
before. With history_includes_current it closes before the first loss, at the price of a pass where TRL makes none.

A turn is a run of 1s in the mask of tokens that the policy wrote: `env_mask` of a `rollout_func`, or what lies between
the answers of tools and environments. A completion without observations is one turn.
"""

import functools
import os
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

import epo_kernels as ek
from epo_kernels.config import BandScope, Penalty
from epo_kernels.defaults import BAND
from epo_kernels.heads import Head, check_head, head_of
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.integrations import require

require("trl", at_least="1.16", below="1.17")

from accelerate.utils import is_peft_model  # noqa: E402  (the package, and what it brings, after the check)
from transformers import PreTrainedModel, ProcessorMixin  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402  (every family's)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput, nanmax, nanmin  # noqa: E402

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
HISTORY_FILE = "epo_history.pt"
MAX_TURNS = 1024  # told apart; a turn costs the history 16 bytes

# How EPOConfig's fields are called in TRL, for error messages.
_TRL_NAMES = {
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "delta",
    "entropy_coeff": "entropy_coef",
}

LossHead = Callable[[Tensor, Head], ek.EPOOutput]


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EPOTrainerConfig(GRPOConfig):
    """`GRPOConfig` with the settings of the entropy band.

    What TRL names keeps its name and meaning: epsilon, epsilon_high, delta (the dual clip), beta, loss_type,
    temperature and entropy_coef, which is λ of bonus and penalty. The fields added here configure the band and its
    history; their defaults are `epo_kernels.defaults.BandDefaults`, the paper's hinge. docs/entropy_control.md compares
    the penalties.

    Raises:
        ValueError: an option that this loss doesn't serve, or a value out of range; the message names the cure.
    """

    entropy_coef: float = _setting(
        BAND.entropy_coeff, "Weight of the entropy bonus and the band penalty. 0 disables both."
    )
    penalty: str = _setting(
        BAND.penalty,
        "Penalty for entropy outside the band: none, hinge, quadratic, indicator or gate; see EPOConfig.",
    )
    penalty_alpha: float = _setting(
        BAND.penalty_alpha, "Size of the penalty; for gate, the factor of the entropy bonus outside the band."
    )
    smooth_coeff: float = _setting(BAND.smooth_coeff, "Weight of the penalty within the entropy term.")
    band_scope: str = _setting(
        BAND.band_scope, "What is compared with the band: token (each token's entropy) or segment (a turn's mean)."
    )
    band_low: float = _setting(BAND.band_low, "Lower bound of the band, as a multiple of the historical mean entropy.")
    band_high: float = _setting(
        BAND.band_high, "Upper bound of the band, as a multiple of the historical mean entropy."
    )
    history_scope: str = _setting(
        BAND.history_scope, "Historical mean of each turn index (turn), or of all turns (global)."
    )
    history_weighting: str = _setting(
        BAND.history_weighting, "What has equal weight in the historical mean: token, or step (a generation)."
    )
    history_window: int | None = _setting(
        BAND.history_window, "Number of most recent generations in the history; None for all."
    )
    history_includes_current: bool = _setting(
        BAND.history_includes_current,
        "Include the current generation in the history; costs a scoring pass where TRL makes none.",
    )
    phase_schedule: str = _setting(
        BAND.phase_schedule, "Schedule of the penalty weight over training: constant, paper or official."
    )
    phase_horizon: int | None = _setting(
        BAND.phase_horizon, "Optimizer steps that phase_schedule spans; None for the whole run."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epo_config()
        self.new_history().bounds(torch.zeros(1, dtype=torch.int64), self.band_low, self.band_high)
        self.phase_weight(0, 1)

    def epo_config(self) -> ek.EPOConfig:
        """The loss as the library knows it; `token-mean`, because TRL's loss_type enters by weights.

        Raises:
            ValueError: see above.
        """
        for wrong, message in self._refusals():
            if wrong:
                raise ValueError(message)
        try:
            return ek.EPOConfig(
                clip_ratio_low=self.epsilon,
                clip_ratio_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
                clip_ratio_c=self.delta,
                entropy_coeff=self.entropy_coef,
                penalty=cast(Penalty, self.penalty),
                penalty_alpha=self.penalty_alpha,
                smooth_coeff=self.smooth_coeff,
                band_scope=cast(BandScope, self.band_scope),
                temperature=self.temperature,
            )
        except (TypeError, ValueError) as error:
            message = str(error)
            for name, trl_name in _TRL_NAMES.items():
                message = message.replace(f"EPOConfig.{name} ", f"{trl_name} ")
            raise type(error)(message) from error

    def new_history(self) -> ek.EntropyHistory:
        return ek.EntropyHistory(
            MAX_TURNS,
            self.history_window,
            cast(HistoryScope, self.history_scope),
            cast(HistoryWeighting, self.history_weighting),
        )

    def phase_weight(self, step: int, total_steps: int) -> float:
        """β of the penalty at an optimizer step of a run of that many."""
        return ek.phase_weight(step, self.phase_horizon or max(total_steps, 1), self.phase_schedule)

    def _refusals(self) -> list[tuple[bool, str]]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return [
            (
                self.loss_type not in LOSS_TYPES,
                f"EPOTrainer serves loss_type {', '.join(LOSS_TYPES)}, whose policy loss is the clipped ratio of a "
                f"token; got {self.loss_type!r}. Choose one of them, or train with trl.GRPOTrainer",
            ),
            (
                self.importance_sampling_level != "token",
                "EPOTrainer's ratio is a token's: set importance_sampling_level='token' (GSPO needs trl.GRPOTrainer), "
                f"got {self.importance_sampling_level!r}",
            ),
            (
                self.delta is not None and self.delta < 1 + high,
                f"delta must be at least 1 + epsilon_high = {1 + high:g} (below, it would undo the clip), "
                f"got {self.delta}",
            ),
            (
                self.top_entropy_quantile != 1.0,
                "EPOTrainer doesn't choose tokens by entropy: set top_entropy_quantile=1.0, and let the band do it "
                f"(penalty='gate'); got {self.top_entropy_quantile}",
            ),
            (
                self.use_adaptive_entropy,
                "the entropy band takes the place of TRL's adaptive coefficient: set use_adaptive_entropy=False",
            ),
            (
                self.off_policy_mask_threshold is not None,
                "EPOTrainer doesn't mask off-policy sequences: set off_policy_mask_threshold=None (delta bounds their "
                f"loss), got {self.off_policy_mask_threshold}",
            ),
            (self.torch_compile, "EPOTrainer's loss runs inside the model's forward: set torch_compile=False"),
        ]


@dataclass(frozen=True)
class _MicroBatch:
    """What the loss knows of a micro-batch of B completions, padded to T.

    Attributes:
        inputs: TRL's.
        mask: (B, T) bool, tokens that count.
        turns: (B, T) int64.
        share: (B,), weight of a sequence's tokens in the policy loss over that in the entropy term.
        accumulated: micro-batches to an update.
        normalizer: 0-d; a token's weight in the entropy term is 1 / normalizer.
        phase_weight: β of the penalty.
    """

    inputs: dict[str, Any]
    mask: Tensor
    turns: Tensor
    share: Tensor
    accumulated: int
    normalizer: Tensor
    phase_weight: float


class EPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with the EPO loss; see the module's text. Takes what that takes, with `EPOTrainerConfig` as args.

    Logs what TRL logs, and: `epo/band_low_share`, `epo/band_high_share` (of tokens outside the band), `epo/penalty`
    (mean P; a gate has none), `epo/phase_weight`, `epo/history` (mean H̄ of the turns seen). Checkpoints hold the
    history.

    Raises:
        TypeError: args is another config.
        ValueError: the model or an option isn't served; the message names the cure.
    """

    _tag_names = [*GRPOTrainer._tag_names, "epo"]  # noqa: RUF012  (TRL's own form)
    _name = "EPO"
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
        self._banded = args.penalty != "none" and args.entropy_coef != 0.0
        self._entropy_from_loss = False
        self._first_scored: tuple[Tensor, Tensor] | None = None
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._text_config = base.config.get_text_config()
        try:
            check_head(base)
        except ValueError as error:
            raise ValueError(f"{error}; trl.GRPOTrainer can train this model") from error
        _add_loss_head(base, self._scores_of_head)
        if self.ref_model is not None:  # of the policy's class and config
            _add_loss_head(self.accelerator.unwrap_model(self.ref_model), self._scores_of_head)

    def _refuse_model(self) -> None:
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("EPOTrainer serves text alone: give a tokenizer as processing_class, not a processor")
        if is_deepspeed_zero3_enabled():
            raise ValueError("EPOTrainer needs the head's weight whole: take DeepSpeed's stage 2 or FSDP, not stage 3")

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
            mask = _loss_mask(output)
            self.history.update(_turns(mask), entropy, mask)
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
        self.history.commit(torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            # TRL samples anew a generation that a checkpoint cuts: what is open of it counts then.
            state = {**self.history.state_dict(), "open": None}
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(state, os.path.join(self._get_output_dir(trial=trial), folder, HISTORY_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, HISTORY_FILE)
        if os.path.isfile(path):
            self.history.load_state_dict(torch.load(path, weights_only=True))
        else:
            warnings.warn(f"{checkpoint} holds no {HISTORY_FILE}: the entropy history begins anew", stacklevel=2)

    # --- The loss ---

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        mask = _loss_mask(inputs)
        accumulated = self.current_gradient_accumulation_steps if training else 1
        batch = _MicroBatch(
            inputs,
            mask,
            turns=_turns(mask),
            share=self._policy_share(inputs, mask),
            accumulated=accumulated,
            normalizer=mask.sum().clamp(min=1) * accumulated,
            phase_weight=self.args.phase_weight(self.state.global_step, self.state.max_steps),
        )
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            out, router_logits = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=attention_mask,
                loss_head=functools.partial(self._loss_of_head, batch=batch),
                **({"output_router_logits": True} if self.aux_loss_enabled else {}),
            )
        if training and self._banded and self._entropy_from_loss:
            self.history.update(batch.turns, out.entropy, mask)
        self._log_loss(batch, out)
        if not self.aux_loss_enabled:
            return out.loss
        balance = self._expert_balance(router_logits, attention_mask)
        mean = self.accelerator.gather_for_metrics(balance.detach()).mean().item()
        self._metrics["train" if training else "eval"]["aux_loss"].append(mean)
        return out.loss + self.router_aux_loss_coef * balance / accumulated

    def _expert_balance(self, router_logits: Any, attention_mask: Tensor) -> Tensor:
        """The load-balancing loss of a mixture of experts, before its coefficient."""
        config = self._text_config
        return cast(
            Tensor,
            load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask),
        )

    def _policy_share(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """w / u: what a token weighs in TRL's loss_type over what it weighs in the mean over the micro-batch, (B,)."""
        sequences, tokens = mask.shape[0], mask.sum().clamp(min=1)
        if self.loss_type == "grpo":
            return tokens / (sequences * mask.sum(dim=1).clamp(min=1))
        if self.loss_type == "bnpo":
            share = torch.ones((), device=mask.device)
        elif self.loss_type == "dr_grpo":
            share = tokens / (sequences * self.max_completion_length)
        elif self.loss_type == "luspo":
            share = tokens / sequences
        else:  # dapo: num_items_in_batch spans a generation of all ranks, which may be several updates
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            share = tokens / (items / self.args.steps_per_generation if self.model.training else items)
        return share.float().expand(sequences)

    def _loss_of_head(self, hidden: Tensor, head: Head, *, batch: _MicroBatch) -> ek.EPOOutput:
        """The micro-batch's loss from the last hidden states (B, P + T, D) and the head."""
        inputs, mask, turns = batch.inputs, batch.mask, batch.turns
        tokens = inputs["completion_ids"]
        sequences, length = tokens.shape
        is_weights = batch.share[:, None].expand(mask.shape)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            is_weights = is_weights * inputs["importance_sampling_ratio"]
        terms: dict[str, Any] = {
            "old_log_probs": inputs.get("old_per_token_logps"),
            "advantages": inputs["advantages"],
            "mask": mask,
            "cfg": self._loss_config,
            "entropy_bounds": self.history.bounds(turns, self.args.band_low, self.args.band_high),
            "segment_ids": turns + length * torch.arange(sequences, device=turns.device)[:, None],
            "num_segments": sequences * length,
            "penalty_weight": batch.phase_weight,
            "is_weights": is_weights,
            "normalizer": batch.normalizer,
        }
        hidden, context = self._head_precision(hidden[:, -length - 1 : -1])  # the one before a token predicts it
        with context:
            if self.beta == 0.0:
                return ek.linear_epo_loss(hidden, head.weight, tokens, **terms, **head.keywords)
            # TRL's KL isn't the library's: unclamped, with the policy's weights, and times the ratio unless asked
            # otherwise. It is added to the loss of log-probs, whose logits are computed again in backward.
            log_probs, entropy = ek.linear_log_probs_and_entropy(
                hidden, head.weight, tokens, mask=mask, temperature=self._loss_config.temperature, **head.keywords
            )
        assert entropy is not None
        out = ek.epo_loss_from_log_probs(log_probs, entropy, **terms)
        return out._replace(loss=out.loss + self.beta * self._weighted_kl(log_probs, batch))

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

    def _weighted_kl(self, log_probs: Tensor, batch: _MicroBatch) -> Tensor:
        return (batch.share[:, None] * self._kl(log_probs, batch)).sum() / batch.normalizer

    def _kl(self, log_probs: Tensor, batch: _MicroBatch) -> Tensor:
        """TRL's KL to the reference (k3), times the ratio where use_bias_correction_kl is set; 0 at masked tokens."""
        difference = torch.where(batch.mask, batch.inputs["ref_per_token_logps"] - log_probs, 0.0)
        kl = difference.exp() - difference - 1
        return kl * _ratio(log_probs, batch) if self.args.use_bias_correction_kl else kl

    @torch.no_grad()
    def _log_loss(self, batch: _MicroBatch, out: ek.EPOOutput) -> None:
        """TRL's metrics and ours, over all ranks."""
        inputs, mask = batch.inputs, batch.mask
        mode = "train" if self.model.training else "eval"
        advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"][:, None]
        ratio = _ratio(out.log_probs, batch)
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        values = {
            "entropy": out.entropy,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
        }
        if self.beta != 0.0:
            values["kl"] = self._kl(out.log_probs, batch)
        sums = {name: torch.where(mask, value, 0).sum() for name, value in values.items()}
        if self._banded:
            sums |= {
                "epo/band_low_share": out.metrics.below_band_tokens,
                "epo/band_high_share": out.metrics.above_band_tokens,
            }
            if self.args.penalty != "gate":  # which has no value to tell
                sums["epo/penalty"] = out.metrics.penalty * batch.normalizer
        totals = torch.stack([total.double() for total in (*sums.values(), mask.sum())])
        *totals, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        logged = {name: total / max(count, 1.0) for name, total in zip(sums, totals, strict=True)}
        gather, lengths = self.accelerator.gather, mask.sum(dim=1)
        logged["clip_ratio/low_min"] = nanmin(gather((low & mask).sum(dim=1) / lengths)).item()
        logged["clip_ratio/high_max"] = nanmax(gather((high & mask).sum(dim=1) / lengths)).item()
        if self._entropy_bonus_enabled:
            policy_loss = out.metrics.pg_loss.float()
            if self.beta != 0.0:
                policy_loss = policy_loss + self.beta * self._weighted_kl(out.log_probs, batch)
            if self.loss_type != "dapo":  # TRL's is that of a micro-batch, but for this type
                policy_loss = policy_loss * batch.accumulated
            logged["policy_loss"] = gather(policy_loss).nanmean().item()
            if mode == "train" and self.accelerator.sync_gradients:
                logged["entropy_coef"] = self.entropy_coef
        if self._banded:
            logged["epo/phase_weight"] = batch.phase_weight
            logged["epo/history"] = self.history.means().nanmean().item()
        for name, value in logged.items():
            self._metrics[mode][name].append(value)


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Tokens that the policy wrote and that count, (B, T) bool."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


def _ratio(log_probs: Tensor, batch: _MicroBatch) -> Tensor:
    """Importance ratio of each token, (B, T), 1 at masked ones."""
    old = batch.inputs.get("old_per_token_logps", log_probs.detach())
    return torch.where(batch.mask, log_probs - old, 0.0).exp()


def _turns(mask: Tensor) -> Tensor:
    """Number of the run of 1s that a token lies in, from 0 in each sequence, (B, T) int64; any where the mask is 0."""
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return ((mask & ~before).cumsum(dim=1) - 1).clamp(min=0)


def _add_loss_head(model: PreTrainedModel, score: Callable[..., FusedCausalLMOutput]) -> None:
    """Let `model(..., loss_head=f)` return f(last hidden states, head), and not project by itself.

    Beside it come the router's logits of a mixture of experts, or None. All within the model's own forward, because
    wrappers (DDP, FSDP, PEFT, autocast) do their work around it. `score` answers TRL's `model(..., labels=labels,
    fused_lm_head=True)`, so that old and reference log-probs are of the same head as the loss; TRL's own fused head
    knows fewer transforms.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: Any, *args: Any, loss_head: LossHead | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if loss_head is None and not fused_lm_head:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels", None)  # PEFT hands them on
        outputs, head = self.base_model(*args, **{**kwargs, "use_cache": False}), head_of(self)
        hidden = outputs.last_hidden_state.to(head.weight.device)
        if loss_head is None:
            return score(hidden, head, labels=labels.to(head.weight.device))
        return loss_head(hidden, head), getattr(outputs, "router_logits", None)

    model.forward = types.MethodType(forward, model)
