"""PPO's critic: estimates the return from a state.

It is a separate copy of the policy's backbone with a value head, as in verl and verl-agent (which load the same model a
second time). The value loss, initially far larger than the policy's, therefore never affects the policy's weights, and
has its own learning rate. It costs the memory of a second model.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from epo_kernels.train.config import TrainConfig
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.io.progress import Report, ignore, part_of
from epo_kernels.train.models.check import row_width_of
from epo_kernels.train.models.lora import add_adapters
from epo_kernels.train.models.policy import Policy, checkpointing, response_hidden
from epo_kernels.train.rl.algorithms import value_states
from epo_kernels.train.rl.optimizer import StepOptimizer
from epo_kernels.train.rl.post_mortem import Circumstances, NonFiniteError


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, clipped as in PPO's original code and verl: the larger of the two losses.

    Args:
        values, old_values, returns: (N,) float32.
        clip_range: maximum distance of the clipped value from the old one.

    Returns:
        (loss, clipped): (N,) float32, and (N,) bool where the clipped value determines the loss.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def _copied_backbone(model: PreTrainedModel, config: TrainConfig, ranks: Ranks) -> PreTrainedModel:
    """A copy of the model's decoder; for a sharded model, shard by shard."""
    decoder: PreTrainedModel = model.get_decoder()
    is_split = isinstance(decoder, FSDPModule)
    if not is_split:
        return copy.deepcopy(decoder)
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    ranks.shard(twin.get_decoder(), model.device)
    if config.model.lora_rank:
        add_adapters(twin, config.model)
    backbone = twin.get_decoder().to_empty(device=model.device).eval()
    with torch.no_grad():
        for own, copied in zip(backbone.parameters(), decoder.parameters(), strict=True):
            own.requires_grad_(copied.requires_grad).copy_(copied)
        for buffer, value in zip(backbone.buffers(), decoder.buffers(), strict=True):
            buffer.copy_(value)
    return backbone


class Critic:
    """Owns backbone, value head and optimizer. Initial values are 0, because the head starts at 0.

    Args:
        config: the run's; uses `critic`, `optim` and `algorithm.gae`.
    """

    def __init__(self, policy: Policy, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._config = config
        self._pad_id = policy.pad_id
        self._row_width = row_width_of(policy, config)
        self._backbone = _copied_backbone(policy.model, config, self._ranks)
        self._head = nn.Linear(policy.model.config.get_text_config().hidden_size, 1).to(policy.model.device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._ranks.shard(self._backbone, policy.model.device)
        self._network = nn.ModuleDict({"backbone": self._backbone, "head": self._head})
        self._optimizer = StepOptimizer(self._network, config.optim, config.critic, config.horizon, self._ranks)

    @property
    def steps_done(self) -> int:
        """Training steps done by this critic, including those restored from a checkpoint."""
        return self._optimizer.steps_done

    @torch.no_grad()
    def score(self, samples: Sequence[Sample], report: Report = ignore) -> None:
        """Set each sample's `values`, of the state before each of its response tokens."""
        found: dict[int, Tensor] = {}
        batches = list(micro_batches(samples, self._config.optim.micro_batch_tokens, self._row_width))
        for indices, _ in self._ranks.deal(batches, report):
            values = self._values(self._batch([samples[i] for i in indices])).cpu()
            for row, index in enumerate(indices):
                found[index] = values[row, : len(samples[index].response_ids)].clone()
        for own in self._ranks.gather(found):
            for index, values in own.items():
                samples[index].values = values

    def update(self, samples: Sequence[Sample], seed: tuple[int, ...], report: Report = ignore) -> dict[str, float]:
        """All epochs and minibatches of a step, towards the samples' `returns`. Returns the metrics `critic/*`.

        An update whose loss or gradient is not finite is skipped and counted.

        Raises:
            NonFiniteError: optim.max_skipped_updates consecutive updates were skipped.
        """
        losses, clipped, states, done = [], [], 0.0, 0
        for minibatch in self._optimizer.minibatches(samples, seed):
            loss, clips, nonfinite, count = self._backward(minibatch, part_of(report, done))
            done += len(minibatch)
            norm = self._optimizer.apply(loss)
            if (skipped := self._optimizer.skipped_in_row) >= self._config.optim.max_skipped_updates:
                raise NonFiniteError(
                    minibatch, Circumstances.of("critic", self._network, skipped, loss, norm, int(nonfinite))
                )
            losses.append(loss)
            clipped.append(clips)
            states += count
        return {
            "critic/vf_loss": float(torch.stack(losses).mean()),
            "critic/vf_clipfrac": float(torch.stack(clipped).sum()) / states,
            **self._optimizer.metrics("critic"),
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the trained parameters (with adapters, the rest is the policy's), unsharded; complete on rank 0."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        network = get_model_state_dict(self._network, options=options)
        return {"network": network, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)  # frozen parameters are missing
        set_model_state_dict(self._network, dict(state["network"]), options=options)
        self._optimizer.load_state_dict(state["optimizer"])

    def _backward(self, samples: list[Sample], report: Report = ignore) -> tuple[Tensor, Tensor, Tensor, float]:
        """Add the gradient of one minibatch's mean loss; returns the loss and the numbers of clipped states, of states
        with a non-finite loss, and of all states."""
        level = self._config.algorithm.gae
        count = float(sum(int(value_states(sample, level).sum()) for sample in samples))
        sums = torch.zeros(3)  # loss, clipped, nonfinite
        batches = list(micro_batches(samples, self._config.optim.micro_batch_tokens, self._row_width))
        for indices, counts in self._ranks.deal(batches, report):
            chosen = [samples[i] for i in indices]
            batch = self._batch(chosen)
            states = nn.utils.rnn.pad_sequence([value_states(sample, level) for sample in chosen], batch_first=True)
            states = states.to(batch.tokens.device)
            assert batch.values is not None
            assert batch.returns is not None
            with checkpointing(self._backbone, self._config.model.gradient_checkpointing):
                losses, clipped = value_loss(
                    self._values(batch)[states],
                    batch.values[states],
                    batch.returns[states],
                    self._config.critic.clip_range,
                )
                loss = float(counts) * losses.sum() / count
                loss.backward()
            counted = float(counts) * torch.stack([clipped.sum(), (~losses.isfinite()).sum()])
            sums += torch.cat([loss.detach()[None], counted]).cpu()
        total, clips, nonfinite = torch.stack(self._ranks.gather(sums)).sum(dim=0)
        return total, clips, nonfinite, count

    def _batch(self, samples: Sequence[Sample]) -> MiniBatch:
        return MiniBatch.of(samples, self._pad_id, self._head.weight.device, self._row_width)

    def _values(self, batch: MiniBatch) -> Tensor:
        """(B, R) float32."""
        hidden = response_hidden(self._backbone, batch).float()
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 is too coarse for values
            return self._head(hidden)[..., 0]
