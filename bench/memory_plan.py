"""The memory plan against real steps of small models on a CPU, and the paper's presets on several GPUs.

python -m bench.memory_plan prints both tables as docs/memory.md has them (a minute). Measured: the most bytes of
tensors alive at once in the second update of the learner or critic, as PyTorch's dispatcher sees them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

import epo_kernels as ek
from epo_kernels.train.config import TrainConfig, load_config
from epo_kernels.train.data import Sample
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.models.loading import hold_products_in
from epo_kernels.train.models.policy import Policy, precision
from epo_kernels.train.plan.activations import LiveBytes
from epo_kernels.train.plan.architecture import architecture_of, build
from epo_kernels.train.plan.memory import CRITIC, POLICY, Machine, MemoryPlan
from epo_kernels.train.rl.critic import Critic
from epo_kernels.train.rl.learner import Learner

PROMPT, RESPONSE, ROWS = 96, 32, 4
MODELS = {
    "Qwen2, 1.0M parameters, tied head": Qwen2Config(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1200,
        tie_word_embeddings=True,
    ),
    "Qwen2, 7.6M parameters": Qwen2Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4000,
    ),
    "Llama, 20M parameters": LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4000,
    ),
}
PAPER = ("scienceworld_ppo_7b", "scienceworld_grpo_7b", "alfworld_ppo_3b", "alfworld_grpo_3b")
PUBLISHED_GPUS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Case:
    """A model and settings whose update is measured, as rank 0 of that many GPUs."""

    model: str
    settings: tuple[str, ...] = ()
    gpus: int = 1
    of_critic: bool = False

    @property
    def name(self) -> str:
        shown = [setting.removeprefix("model.").removeprefix("loss.") for setting in self.settings]
        return ", ".join([*shown, *(["critic update"] if self.of_critic else [])]) or "GRPO"


CHECKPOINTING, BFLOAT16 = "model.gradient_checkpointing=true", "model.dtype=bfloat16"
KL, PPO = "loss.kl_coeff=0.01", "algorithm.name=ppo"
TINY, SMALL, LARGE = MODELS
CASES = (
    *(Case(model) for model in MODELS),
    *(Case(model, (CHECKPOINTING,)) for model in MODELS),
    Case(TINY, (KL, PPO)),
    Case(SMALL, (KL,)),
    Case(SMALL, (KL, PPO, CHECKPOINTING)),
    Case(SMALL, (KL, PPO, CHECKPOINTING), of_critic=True),
    Case(SMALL, (BFLOAT16, KL)),
    Case(SMALL, (BFLOAT16, CHECKPOINTING)),
    Case(LARGE, (KL, BFLOAT16, CHECKPOINTING)),
    Case(SMALL, (CHECKPOINTING,), gpus=2),
    Case(LARGE, (KL, PPO, BFLOAT16, CHECKPOINTING), gpus=4),
    Case(LARGE, (PPO,), gpus=8, of_critic=True),
)


class ShardedBytes(LiveBytes):
    """Under FSDP: of DTensors the local shard, and storages that are emptied and filled again (gathered weights)."""

    def add(self, tensor: torch.Tensor) -> None:
        super().add(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)

    def __enter__(self) -> ShardedBytes:
        resize = self._resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self.resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*raised)


def planned(case: Case) -> float:
    """Bytes of the phase that `measured` watches."""
    with saved(MODELS[case.model]) as folder:
        plan = MemoryPlan(config_of(case, folder), Machine(case.gpus, 80e9))
        return plan.totals()[CRITIC if case.of_critic else POLICY]


def measured(case: Case) -> int:
    """The most bytes of tensors alive at once in an update that follows another one."""
    with saved(MODELS[case.model]) as folder, fake_ranks(case.gpus) as ranks:
        config = config_of(case, folder)
        policy, reference, learner, critic = learner_and_critic(config, ranks)
        samples = samples_of(ROWS * 2 * case.gpus, MODELS[case.model].vocab_size)
        history = ek.EntropyHistory(1)
        counted = ShardedBytes()
        with precision(policy.model, config.model.dtype):
            _update(learner, critic, samples, history)
            for tensor in _tensors(policy.model, reference, learner, critic):
                counted.add(tensor)
            with counted:
                _update(*((None, critic) if case.of_critic else (learner, None)), samples, history)
        return counted.peak


def learner_and_critic(
    config: TrainConfig, ranks: Ranks
) -> tuple[Policy, PreTrainedModel | None, Learner, Critic | None]:
    """The policy of a case, its reference, and what trains it."""
    policy = Policy(_model(config, ranks), _Tokenizer(), {})  # type: ignore[arg-type]
    uses_reference = config.loss.kl_coeff and not config.model.lora_rank
    reference = _model(config, ranks, frozen=True) if uses_reference else None
    learner = Learner(policy, reference, config, ranks)
    return policy, reference, learner, Critic(policy, config, ranks) if config.algorithm.name == "ppo" else None


def _update(
    learner: Learner | None, critic: Critic | None, samples: Sequence[Sample], history: ek.EntropyHistory
) -> None:
    if critic:
        critic.update(samples, (0,))
    if learner:
        learner.update(samples, history, 1.0, (0,))


def _tensors(model: PreTrainedModel, reference: PreTrainedModel | None, *owners: object) -> Iterator[torch.Tensor]:
    """Weights, and AdamW's moments."""
    modules = [model, *([reference] if reference else [])]
    for owner in owners:
        if owner is not None:
            modules += [owner._network] if isinstance(owner, Critic) else []
            for moments in owner._optimizer._adamw.state.values():  # type: ignore[attr-defined]
                yield from moments.values()
    for module in modules:
        yield from (*module.parameters(), *module.buffers())


class _Tokenizer:
    """All that a learner asks of a tokenizer."""

    pad_token_id = 0


def config_of(case: Case, folder: str) -> TrainConfig:
    return load_config(
        "practice",
        [
            f"model.name_or_path={folder}",
            "model.warm_start.demonstrations=0",
            "model.device=cpu",
            f"rollout.max_prompt_tokens={PROMPT}",
            f"rollout.max_response_tokens={RESPONSE}",
            f"optim.micro_batch_tokens={ROWS * (PROMPT + RESPONSE)}",
            "optim.minibatches=1",
            *case.settings,
        ],
    )


def _model(config: TrainConfig, ranks: Ranks, frozen: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(architecture_of(config.model), config.model)
    if frozen:
        model.requires_grad_(False)
        if config.model.dtype != "float32":
            hold_products_in(model, getattr(torch, config.model.dtype))
        ranks.shard(model.get_decoder(), model.device)
    return model


def samples_of(number: int, vocabulary: int) -> list[Sample]:
    """Turns that fill their rows, and whose prompts differ."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for index in range(number):
        ids = torch.randint(vocabulary, (PROMPT + RESPONSE,), generator=draw).tolist()
        sample = Sample.of_turn(ids[:PROMPT], ids[PROMPT:], 0, advantage=index % 3 - 0.75)
        zeros = torch.zeros(RESPONSE)
        sample.old_log_probs, sample.ref_log_probs = zeros - 7, zeros - 7
        sample.values, sample.returns = zeros, zeros + 1
        samples.append(sample)
    return samples


@contextmanager
def saved(architecture: PreTrainedConfig) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        architecture.save_pretrained(folder)
        yield folder


@contextmanager
def fake_ranks(gpus: int) -> Iterator[Ranks]:
    """Rank 0 of so many whose collectives communicate nothing."""
    if gpus == 1:
        yield Ranks()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield Ranks(0, gpus, fsdp=True)
    finally:
        dist.destroy_process_group()


def comparison() -> str:
    lines = ["| model | settings | GPUs | planned | measured | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for case in CASES:
        plan, real = planned(case), measured(case)
        lines.append(
            f"| {case.model} | {case.name} | {case.gpus} | {plan / 1e6:.1f} MB | {real / 1e6:.1f} MB | "
            f"{plan / real:.2f} |"
        )
    return "\n".join(lines)


def presets() -> str:
    head = "".join(f" {gpus} GPUs |" for gpus in PUBLISHED_GPUS)
    lines = [f"| preset |{head}", "| --- |" + " --- |" * len(PUBLISHED_GPUS)]
    for name in PAPER:
        totals = []
        for gpus in PUBLISHED_GPUS:
            plan = MemoryPlan(load_config(name, []), Machine(gpus, 80e9))
            phase, most = max(plan.totals().items(), key=lambda item: item[1])
            verdict = "" if most <= plan.machine.usable else ", does not fit"
            totals.append(f" {most / 1e9:.1f} GB ({phase}{verdict}) |")
        lines.append(f"| `{name}` |" + "".join(totals))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{comparison()}\n\n{presets()}\n")
