"""EPO inside verl 0.9: `VERL_USE_EXTERNAL_MODULES=epo_kernels.integrations.verl` makes every verl process import it.

The import does four things, each through a hook that verl resolves at run time:

- `policy_loss.epo.*` becomes a group of keys in verl's config (`EPOSettings`), validated before any worker starts.
- The actor's worker becomes `EPOTrainingWorker`. With `policy_loss.loss_mode=epo` it gives the engine `EngineLoss`
  instead of verl's `ppo_loss`, closes the entropy history after each update, and saves it with verl's checkpoints.
- "epo" becomes a registered policy loss, for callers that have only log-probs. A registered loss receives no entropy
  and no turns, so a penalty raises there.
- "epo" becomes a backend of verl's fused head on the FSDP engines (`model.use_fused_kernels=true` with
  `model.fused_kernel_options.impl_backend=epo`): `linear_log_probs_and_entropy`, which never materialises the logits.

Clip, dual clip, entropy_coeff, KL, aggregation mode and rollout weights are verl's own keys, normalised over
micro-batches and data-parallel ranks as in verl. With penalty "none" the loss is verl's own policy loss named in
`policy_loss.epo.policy_loss`, by default "vanilla" (`epo_kernels.integrations.verl_policy`).

A training step is one call of verl's `update_actor`: its entropies, over every epoch and mini-batch as computed by the
update itself, form one step of the history, summed over the data-parallel group. The band of a step uses the steps
before it. Turns are the runs of 1s in verl's response_mask, or a field of the batch (`EPOSettings.turns`). Token-level
rejection (`rollout_correction`) splits runs, so use a field with it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from epo_kernels.functional import linear_log_probs_and_entropy
from epo_kernels.heads import Head, check_head, head_of
from epo_kernels.integrations.verl_keys import KEYS, LOSS_MODE, RESPONSE_MASK, EPOSettings, check_shares
from epo_kernels.schedule import phase_weight

try:
    import verl
    from verl.models.transformers import monkey_patch
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.utils import tensordict_utils
    from verl.utils.experimental import torch_functional
    from verl.utils.metric import AggregationType, Metric
    from verl.workers import config as verl_config
    from verl.workers import engine_workers
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    from epo_kernels.integrations.verl_policy import PolicyBatch, VerlLoss, verl_loss

    if tuple(map(int, verl.__version__.split(".")[:2])) < (0, 9):
        raise ImportError(f"this is verl {verl.__version__}")
except ImportError as error:
    raise ImportError(
        f"epo_kernels.integrations.verl needs verl 0.9 ({error}). Install: pip install 'epo-kernels[verl]'"
    ) from error

logger = logging.getLogger(__name__)

FUSED_BACKEND = "epo"
HISTORY_FILE = "epo_entropy_history.pt"

_head: ContextVar[Head | None] = ContextVar("head", default=None)  # of the model whose forward is running


@dataclass
class EPOPolicyLossConfig(verl_config.PolicyLossConfig):
    """verl's `policy_loss` section with an additional optional key, `epo`: the settings of `EPOSettings`."""

    epo: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        settings = EPOSettings.of(self.epo)
        if self.loss_mode == LOSS_MODE and settings.verl_policy_loss in ("clip_cov", "kl_cov"):
            check_shares(self)
        if self.epo and self.loss_mode != LOSS_MODE:
            raise ValueError(
                f"{KEYS} is set, but not used: actor_rollout_ref.actor.policy_loss.loss_mode is {self.loss_mode!r}, "
                f"it must be {LOSS_MODE!r}"
            )


class EngineLoss:
    """The loss that verl's engine calls for every micro-batch, instead of `ppo_loss`.

    Args:
        actor: verl's ActorConfig.

    Raises:
        ValueError: unsupported settings.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.settings = EPOSettings.of(actor.policy_loss.get("epo"))
        self._config = self.settings.loss_config(actor, actor.loss_agg_mode)
        self.history = self.settings.make_history() if self.settings.penalty != "none" else None
        horizon = self.settings.phase_horizon
        self._horizon = actor.optim.total_training_steps if horizon is None else horizon
        if self.history is not None and self.settings.phase_schedule != "constant" and self._horizon < 1:
            raise ValueError(
                f"{KEYS}.phase_horizon must be set, because phase_schedule={self.settings.phase_schedule} needs the "
                f"length of the training and verl's optim.total_training_steps is {self._horizon}; or set "
                "phase_schedule=constant"
            )

    def __call__(self, model_output: Mapping[str, Tensor], data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
        """(loss, metrics) of a micro-batch, as verl's `ppo_loss` returns them.

        Args:
            model_output: "log_probs" and, if entropy is used, "entropy", nested over prompt and response.
            data: the micro-batch.
            dp_group: part of verl's protocol, unused; ranks synchronise when the history closes.
        """
        actor, settings = self._actor, self.settings
        batch_info = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        batch_info["loss_scale_factor"] = actor.loss_scale_factor
        log_probs = no_padding_2_padding(model_output["log_probs"], data)
        entropy = self._entropy(model_output, data, log_probs)
        fields = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights", "ref_log_prob")
        padded = data.select(*(name for name in fields if name in data)).to_padded_tensor()
        mask = padded["response_mask"].bool()
        band: dict[str, Any] = {}
        if self.history is not None:
            turns = self._turns(data, mask)
            rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
            band = {
                "entropy_bounds": self.history.bounds(turns, settings.band_low, settings.band_high),
                "segment_ids": turns + settings.num_turns * rows,
                "num_segments": settings.num_turns * mask.shape[0],
                "penalty_weight": self.penalty_weight(),
            }
            if torch.is_grad_enabled():  # verl may also evaluate the loss without training
                self.history.update(turns, entropy, mask)
        weights = padded.get("rollout_is_weights", None)
        out = verl_loss(
            settings.verl_policy_loss,
            PolicyBatch(log_probs, padded["old_log_probs"], padded["advantages"], mask, weights),
            entropy,
            actor,
            self._config,
            actor.loss_agg_mode,
            batch_info,
            ref_log_probs=padded["ref_log_prob"] if actor.use_kl_loss else None,
            **band,
        )
        metrics = self._metrics(out)
        if "entropy" in model_output:
            entropy_loss = agg_loss(entropy.detach(), mask, actor.loss_agg_mode, **batch_info)
            metrics["actor/entropy_loss"] = Metric(AggregationType.SUM, entropy_loss)
        return out.loss, metrics

    def penalty_weight(self) -> float:
        """β of the open step."""
        step = 0 if self.history is None else len(self.history)
        return phase_weight(step, max(self._horizon, 1), self.settings.phase_schedule)

    def _entropy(self, model_output: Mapping[str, Tensor], data: Any, log_probs: Tensor) -> Tensor:
        if "entropy" in model_output:
            return no_padding_2_padding(model_output["entropy"], data)
        if self._config.entropy_coeff:
            raise ValueError("calculate_entropy must be true in the batch: verl's engine returned no entropy")
        return torch.zeros_like(log_probs)  # its coefficient is 0, so the value is irrelevant

    def _turns(self, data: Any, mask: Tensor) -> Tensor:
        """Turn of each response token, int64 like mask; unspecified where the mask is 0."""
        name = self.settings.turns
        if name == RESPONSE_MASK:
            turns = turns_of_mask(mask)
        else:
            values = tensordict_utils.get(data, name)
            if values is None:
                raise ValueError(f"{KEYS}.turns={name}: the batch has no such field, it has {', '.join(data.keys())}")
            turns = torch.as_tensor(values, device=mask.device)
            turns = padded_turns(turns, mask) if turns.is_nested else turns
            turns = turns[:, None].expand(mask.shape) if turns.shape == mask.shape[:1] else turns
            if turns.shape != mask.shape:
                raise ValueError(
                    f"{KEYS}.turns={name}: the field must have one integer per sample ({mask.shape[0]},) or per "
                    f"response token {tuple(mask.shape)}, got {tuple(turns.shape)}"
                )
        counted = turns[mask]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < self.settings.num_turns:
            raise ValueError(
                f"turns must be in [0, {self.settings.num_turns}), got {int(counted.min())} to {int(counted.max())}: "
                f"number turns from 0, and set {KEYS}.num_turns above the largest"
            )
        return turns

    def _metrics(self, out: VerlLoss) -> dict[str, Any]:
        """Metrics with verl's names and aggregation if verl has them, plus `epo/*`; verl prefixes others "actor/"."""
        sums = out.sums
        tokens = max(sums["tokens"], 1.0)
        total, mean = {"actor/pg_loss": sums["pg_loss"]}, dict(out.policy_metrics)
        if self._actor.use_kl_loss:
            total["kl_loss"] = sums["kl_loss"]
            mean["kl_coef"] = self._actor.kl_loss_coef
        if self.history is not None:
            mean["epo/band_low_share"] = sums["below_band_tokens"] / tokens
            mean["epo/band_high_share"] = sums["above_band_tokens"] / tokens
            mean["epo/penalty_weight"] = self.penalty_weight()
            if self.settings.penalty != "gate":  # a gate has no penalty value
                total["epo/penalty"] = sums["penalty"]
        return {
            **Metric.from_dict(mean, aggregation=AggregationType.MEAN),
            **Metric.from_dict(total, aggregation=AggregationType.SUM),
        }


class EPOTrainingWorker(engine_workers.TrainingWorker):
    """verl's training worker with support for `policy_loss.loss_mode=epo`; unchanged for every other loss."""

    epo: EngineLoss | None = None

    @functools.wraps(engine_workers.TrainingWorker.set_loss_fn)  # wraps: verl's dispatch marks are attributes
    def set_loss_fn(self, loss_fn):
        self.epo = None
        if isinstance(loss_fn, functools.partial) and loss_fn.func is ppo_loss:
            actor = loss_fn.keywords["config"]
            if actor.policy_loss.get("loss_mode") == LOSS_MODE:
                loss_fn = self.epo = EngineLoss(actor)
        super().set_loss_fn(loss_fn)

    @functools.wraps(engine_workers.TrainingWorker.train_mini_batch)
    def train_mini_batch(self, data):
        output = super().train_mini_batch(data)
        if self.epo is not None and self.epo.history is not None:
            self.epo.history.commit(self.engine.get_data_parallel_group())
        return output

    @functools.wraps(engine_workers.TrainingWorker.save_checkpoint)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        history = None if self.epo is None else self.epo.history
        if history is not None and self.engine.is_mp_src_rank_with_outputs():
            # Every rank writes the same content, so that the file exists on every node that may load it.
            path = os.path.join(local_path, HISTORY_FILE)
            torch.save(history.state_dict(), f"{path}.{torch.distributed.get_rank()}")
            os.replace(f"{path}.{torch.distributed.get_rank()}", path)

    @functools.wraps(engine_workers.TrainingWorker.load_checkpoint)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if local_path is None or self.epo is None or self.epo.history is None:
            return
        path = os.path.join(local_path, HISTORY_FILE)
        if os.path.exists(path):
            self.epo.history.load_state_dict(torch.load(path, weights_only=True))
        else:
            logger.warning("no entropy history beside the checkpoint in %s: starting with an empty one", local_path)


class EPOFusedLinear(torch_functional.FusedLinearForPPO):
    """verl's fused head with an additional backend, "epo": log-prob and entropy of each token, both differentiable."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, "torch" if impl_backend == FUSED_BACKEND else impl_backend)
        self.impl_backend = impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        """(…, D), (V, D), (…) int -> log-probs and entropies (…) float32. For a patched model, uses the whole head."""
        if self.impl_backend != FUSED_BACKEND:
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        head = _head.get() or Head(vocab_weights)
        return linear_log_probs_and_entropy(
            hidden_states, head.weight, input_ids.to(torch.int64), temperature=temperature, **head.keywords
        )


def turns_of_mask(mask: Tensor) -> Tensor:
    """Turn of each token, (B, T) int64: the runs of True in each row of mask (B, T), numbered from 0."""
    starts = mask & ~F.pad(mask, (1, -1))
    return starts.cumsum(dim=1) - 1


def padded_turns(turns: Tensor, mask: Tensor) -> Tensor:
    """Nested turns (B, T_i), padded with -1 to the width of mask (B, T) or, where a counted row is longer, beyond it.

    Rows without a counted token are all -1: verl fills a batch up with a response of one masked token that keeps the
    other fields of a real sample, so their lengths differ.
    """
    rows = [row if counted else row[:0] for row, counted in zip(turns.unbind(), mask.any(dim=1), strict=True)]
    padded = pad_sequence(rows, batch_first=True, padding_value=-1)
    return F.pad(padded, (0, max(mask.shape[1] - padded.shape[1], 0)), value=-1)


@register_policy_loss(LOSS_MODE)
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The policy loss of `EPOSettings.policy_loss` alone: the caller adds entropy and KL, so a band is not possible.

    All per-token arguments are (B, T); see verl's `register_policy_loss`.

    Raises:
        ValueError: the settings include a penalty.
    """
    settings = EPOSettings.of(config.policy_loss.get("epo"))
    if settings.penalty != "none":
        raise ValueError(
            f"{KEYS}.penalty={settings.penalty} is not supported here: this way of training (distillation, a worker "
            "other than EPOTrainingWorker) passes neither entropies nor turns to its policy loss. Set "
            f"{KEYS}.penalty=none"
        )
    out = verl_loss(
        settings.verl_policy_loss,
        PolicyBatch(log_prob, old_log_prob, advantages, response_mask.bool(), rollout_is_weights),
        torch.zeros_like(log_prob),  # irrelevant, because its coefficient is 0
        config,
        settings.loss_config(config, loss_agg_mode),
        loss_agg_mode,
        config.global_batch_info,
        entropy_coeff=0.0,
        kl_coeff=0.0,
    )
    return out.loss, out.policy_metrics


_patch_forward = monkey_patch.patch_forward_with_backends


@functools.wraps(_patch_forward)
def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
    """verl's function with support for "epo": patches verl's "torch" forward, whose head is then `EPOFusedLinear`.

    Raises:
        ValueError: the model's head is not supported; see `check_head`.
    """
    if not use_fused_kernels or fused_kernels_backend != FUSED_BACKEND:
        return _patch_forward(model, use_fused_kernels, fused_kernels_backend)
    original = getattr(type(model).forward, "original", type(model).forward)  # if the class is already patched
    _check_model(model, original)
    _patch_forward(model, use_fused_kernels, "torch")
    model._verl_fused_kernels_backend = FUSED_BACKEND  # read by the patched forward
    forward = type(model).forward

    @functools.wraps(forward)
    def with_whole_head(self, *args, **kwargs):
        # FSDP2 gathers a weight when its module is called, but the head never is; verl makes it a separate unit.
        layer = self.lm_head if isinstance(self.lm_head, FSDPModule) else None
        if layer is not None:
            layer.unshard()
        token = _head.set(head_of(self))
        try:
            output = forward(self, *args, **kwargs)
        finally:
            _head.reset(token)
        if layer is not None and not torch.is_grad_enabled():
            layer.reshard()  # otherwise done by backward
        return output

    with_whole_head.original = original  # type: ignore[attr-defined]
    type(model).forward = with_whole_head


def _check_model(model: Any, forward: Any) -> None:
    """Raise ValueError unless verl's "torch" forward and `EPOFusedLinear` compute what the model's own forward does."""
    try:
        if getattr(model, "lm_head", None) is not model.get_output_embeddings() or not hasattr(model, "model"):
            raise ValueError(f"{type(model).__name__} must have its decoder in .model and its output layer in .lm_head")
        check_head(model, MethodType(forward, model))
    except ValueError as error:
        raise ValueError(
            f"actor_rollout_ref.model.fused_kernel_options.impl_backend={FUSED_BACKEND}: {error}; set "
            "actor_rollout_ref.model.use_fused_kernels=false"
        ) from error


verl_config.PolicyLossConfig = EPOPolicyLossConfig
engine_workers.ActorRolloutRefWorker.actor_worker_cls = EPOTrainingWorker
torch_functional.FusedLinearForPPO = EPOFusedLinear
monkey_patch.patch_forward_with_backends = patch_forward_with_backends
