"""Memory of one GPU in each phase of a training step.

Per trained parameter: 4 bytes of weight, 4 of gradient and 8 of AdamW's moments, all float32, as in ZeRO
(arXiv 1910.02054, section 3.1) but without a 16-bit copy. FSDP2 divides the layers' by the number of GPUs; embedding,
last norm, head and adapters stay whole (`Ranks.shard`). Gradients exist only while their own network is updated. A step
of the fused AdamW needs no memory of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from epo_kernels.functional import MAX_CHUNK_BYTES
from epo_kernels.fused.head import chunk_rows
from epo_kernels.train.config import TrainConfig
from epo_kernels.train.plan.activations import ActivationModel
from epo_kernels.train.plan.architecture import Parameters, architecture_of
from epo_kernels.train.setting import require

WEIGHT, MOMENTS = 4, 8  # bytes per parameter
# FSDP2 has two layers gathered at a time (in use, and prefetched) and, in the backward pass, a layer's gradient twice:
# as computed, and in the buffer that is reduced.
GATHERED, REDUCED = 2, 2
# Of the GPU, for what can't be counted: CUDA context, NCCL and cuBLAS workspaces, what vLLM keeps while it sleeps,
# fragmentation of the allocator.
RESERVE = 0.08

ROLLOUT, CRITIC, POLICY = "rollout", "critic update", "policy update"


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run."""

    gpus: int
    memory: float  # of each, in bytes

    @property
    def usable(self) -> float:
        return (1 - RESERVE) * self.memory


@dataclass(frozen=True)
class MemoryPlan:
    """What each phase of a step needs on one GPU under these settings.

    Raises:
        ConfigError: the architecture isn't known here, or can't be counted.
    """

    config: TrainConfig
    machine: Machine

    def __post_init__(self) -> None:
        require(self.machine.gpus >= 1, f"--gpus must be at least 1, got {self.machine.gpus}")
        require(self.machine.memory > 0, f"--gpu-memory must be positive, got {self.machine.memory / 1e9:g}")

    @cached_property
    def architecture(self) -> PreTrainedConfig:
        return architecture_of(self.config.model)

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters.of(self.architecture, self.config.model)

    @property
    def shards(self) -> int:
        return self.machine.gpus if self.config.model.fsdp else 1

    @property
    def row_width(self) -> int:
        """Tokens of a row: of a packed one, or of the longest sample."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return max(self.config.optim.micro_batch_tokens // self.row_width, 1)

    def phases(self, rows: int | None = None) -> dict[str, dict[str, float]]:
        """{phase: {what: bytes}}; rows: of a micro-batch, instead of the configured ones."""
        activations = self.activations.at(self.rows if rows is None else rows)
        resident = self._resident()
        phases = {ROLLOUT: resident | self._rollout()}
        if self.has_critic:
            update = {"gradients": WEIGHT * self._critic_trained, "activations": activations.peak}
            phases[CRITIC] = resident | update | self._sharding()
        loss = self.loss(self.rows if rows is None else rows)
        at_loss = activations.saved + loss > activations.peak  # else the layers' backward pass needs more
        phases[POLICY] = resident | {
            "gradients": WEIGHT * self._trained,
            "activations": activations.saved if at_loss else activations.peak,
            "loss": loss if at_loss else 0.0,
            **self._sharding(),
        }
        return phases

    @property
    def states(self) -> float:
        """Bytes of weights, gradients and optimizer states, without which nothing can be updated."""
        return sum(self._resident().values()) + WEIGHT * self._trained

    def totals(self, rows: int | None = None) -> dict[str, float]:
        return {phase: sum(parts.values()) for phase, parts in self.phases(rows).items()}

    @property
    def has_critic(self) -> bool:
        return self.config.algorithm.name == "ppo"

    @property
    def has_reference(self) -> bool:
        """Whether a second, frozen model is in memory: with adapters the policy without them serves."""
        uses_kl = self.config.loss.kl_coeff or self.config.algorithm.kl_reward_coeff
        return bool(uses_kl) and not self.config.model.lora_rank

    @cached_property
    def activations(self) -> ActivationModel:
        config = self.config
        responses = config.rollout.max_response_tokens if config.rollout.layout == "turn" else self.row_width
        is_split = self.shards > 1
        return ActivationModel(self.architecture, config.model, self.row_width, responses, casts_kept=not is_split)

    def loss(self, rows: int) -> float:
        """The linear loss: a chunk's logits, the float32 gradient of the head's weight, and hidden states twice."""
        vocabulary, hidden = self.parameters.head
        per_row = self.config.rollout.max_response_tokens if self.config.rollout.layout == "turn" else self.row_width
        tokens = rows * per_row
        row_bytes = vocabulary * self._itemsize + hidden * (self._itemsize + 4)
        chunk = min(chunk_rows(tokens, row_bytes, MAX_CHUNK_BYTES, hidden, 1), tokens)
        cast_head = 0 if self._itemsize == WEIGHT else vocabulary * hidden * self._itemsize
        grad_head = 0 if self.config.model.lora_rank else vocabulary * hidden * WEIGHT
        return chunk * row_bytes + cast_head + grad_head + 2 * tokens * hidden * WEIGHT

    def vllm_needs(self) -> float:
        """The least that vLLM can work with: its copy of the weights, and one sequence's keys and values."""
        return self._itemsize * self.parameters.all.total + self.kv_of_a_sequence()

    def kv_of_a_sequence(self) -> float:
        return self._itemsize * self.parameters.kv_per_token * self.row_width

    def _resident(self) -> dict[str, float]:
        """What stays in memory from phase to phase."""
        p = self.parameters
        found = {"weights": WEIGHT * p.all.on_each(self.shards), "optimizer": MOMENTS * self._trained}
        if self.has_reference:
            narrow = p.linear.on_each(self.shards) * (WEIGHT - self._itemsize)
            found["reference"] = WEIGHT * p.all.on_each(self.shards) - narrow
        if self.has_critic:
            found["critic"] = WEIGHT * (p.all.on_each(self.shards) - p.outside_decoder) + MOMENTS * self._critic_trained
        vllm = self.config.rollout
        if vllm.engine == "vllm" and not vllm.vllm.sleep:
            found["vLLM"] = vllm.vllm.memory_share * self.machine.memory
        return found

    @property
    def _trained(self) -> float:
        return self.parameters.trained.on_each(self.shards)

    @property
    def _critic_trained(self) -> float:
        return self._trained - (0 if self.config.model.lora_rank else self.parameters.outside_decoder)

    @property
    def _itemsize(self) -> int:
        return getattr(torch, self.config.model.dtype).itemsize

    def _rollout(self) -> dict[str, float]:
        p, rollout = self.parameters, self.config.rollout
        if rollout.engine == "vllm":
            one_weight = WEIGHT * p.largest if self.shards > 1 else 0.0  # gathered, on its way to vLLM
            return {"vLLM": rollout.vllm.memory_share * self.machine.memory, "gathered layers": one_weight}
        algorithm = self.config.algorithm
        playing = min(rollout.environments, -(-algorithm.groups * algorithm.group_size // self.machine.gpus))
        gathered = WEIGHT * p.all.split * (1 - 1 / self.shards)
        return {"KV cache": WEIGHT * p.kv_per_token * self.row_width * playing, "gathered layers": gathered}

    def _sharding(self) -> dict[str, float]:
        if self.shards == 1:
            return {}
        trained = 0 if self.config.model.lora_rank else REDUCED
        return {"gathered layers": (GATHERED + trained) * WEIGHT * self.parameters.layer}
