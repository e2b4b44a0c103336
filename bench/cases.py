"""The measured cases: tasks at the shapes of real models. Each suite is in order of importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Task = Literal["loss", "linear-loss", "score", "linear-score"]

POLICIES = "policies"  # ends the name of a case in which every policy loss is measured
SEQUENCE_LENGTH = 1024
TURN_LENGTH = 128  # tokens of an observation and its response


class Model(NamedTuple):
    hidden_size: int
    vocab_size: int


MODELS = {
    "llama-2-7b": Model(4096, 32_000),
    "llama-3-8b": Model(4096, 128_256),
    "qwen2.5-0.5b": Model(896, 151_936),
    "qwen2.5-3b": Model(2048, 151_936),
    "qwen2.5-7b": Model(3584, 152_064),
    "qwen3.5": Model(4096, 248_320),
    "gemma-3-4b": Model(2560, 262_208),
    # Not from a model: sizes that others report, or that fit a machine.
    "d4096-v131072": Model(4096, 131_072),
    "d1024-v151936": Model(1024, 151_936),
    "d512-v32000": Model(512, 32_000),
    "d64-v151936": Model(64, 151_936),
    "tiny": Model(64, 1_000),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        task: "loss" and "linear-loss" are forward and backward; "score" and "linear-score" compute log-prob and entropy
            without gradients. The linear tasks start from hidden states and head.
        model: a key of `MODELS`.
        tokens: N, in sequences of at most 1,024.
        dtype: a key of `DTYPES`, for logits, or for hidden states and head.
        unmasked: share of tokens that count, at the end of each turn.
        band_scope: as in EPOConfig.
        chunk_mb: `max_chunk_bytes` of the linear tasks.
        peers: whether other libraries are measured too.
        compiled: whether eager PyTorch under torch.compile is measured too (compilation is slow).
        policies: whether every policy loss of this library is measured, and only these.
    """

    task: Task
    model: str
    tokens: int
    dtype: str
    unmasked: float = 1.0
    band_scope: Literal["token", "segment"] = "token"
    chunk_mb: int = 1024
    peers: bool = False
    compiled: bool = False
    policies: bool = False

    @property
    def name(self) -> str:
        parts = [self.task, self.model, f"{self.tokens}", self.dtype, f"{self.unmasked:.0%}"]
        if self.band_scope == "segment":
            parts.append("segment")
        if self.chunk_mb != 1024:
            parts.append(f"{self.chunk_mb}MB")
        if self.policies:
            parts.append(POLICIES)
        return "/".join(parts)

    @property
    def linear(self) -> bool:
        return self.task.startswith("linear-")

    @property
    def gradient(self) -> bool:
        return self.task in ("loss", "linear-loss")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def hidden_size(self) -> int:
        return MODELS[self.model].hidden_size

    @property
    def vocab_size(self) -> int:
        return MODELS[self.model].vocab_size

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of the tokens."""
        length = min(self.tokens, SEQUENCE_LENGTH)
        return self.tokens // length, length

    @property
    def turn_length(self) -> int:
        return min(TURN_LENGTH, self.shape[1])

    @property
    def counted(self) -> int:
        """Number of tokens whose mask is 1."""
        return self.tokens // self.turn_length * self.counted_a_turn

    @property
    def counted_a_turn(self) -> int:
        return max(round(self.unmasked * self.turn_length), 1)


@dataclass(frozen=True)
class StepCase:
    """A whole training step of a tiny model on the practice environment.

    Attributes:
        vocabulary: size of the model's head, most of it unused by its tokenizer.
        episodes: number of episodes per rollout.
        rounds: number of timed steps.
    """

    vocabulary: int
    episodes: int
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"step/tiny-qwen2/{self.episodes}-episodes/v{self.vocabulary}"


GPU = (
    Case("loss", "qwen2.5-3b", 8192, "bf16", peers=True, compiled=True),
    Case("linear-loss", "d4096-v131072", 8192, "bf16", peers=True),
    Case("loss", "llama-2-7b", 8192, "bf16", peers=True, compiled=True),
    Case("linear-loss", "qwen2.5-7b", 8192, "bf16", peers=True, compiled=True),
    Case("linear-score", "d4096-v131072", 8192, "bf16", peers=True),
    Case("loss", "llama-3-8b", 8192, "bf16", peers=True, compiled=True),
    Case("loss", "qwen3.5", 8192, "bf16", peers=True, compiled=True),
    Case("linear-loss", "d4096-v131072", 8192, "bf16", unmasked=0.15),
    Case("linear-loss", "qwen2.5-7b", 8192, "bf16", unmasked=0.15, peers=True),
    Case("linear-loss", "d4096-v131072", 8192, "bf16", chunk_mb=512),
    Case("linear-loss", "qwen2.5-7b", 8192, "bf16", chunk_mb=512),
    Case("linear-loss", "d1024-v151936", 131_072, "bf16"),
    Case("linear-score", "qwen2.5-7b", 8192, "bf16"),
    Case("score", "qwen2.5-3b", 8192, "bf16", peers=True),
    Case("loss", "qwen2.5-3b", 8192, "bf16", unmasked=0.15, peers=True),
    Case("loss", "qwen2.5-3b", 8192, "bf16", band_scope="segment"),
    Case("loss", "gemma-3-4b", 8192, "bf16", peers=True),
    Case("loss", "qwen2.5-7b", 2048, "bf16"),
    Case("loss", "qwen2.5-7b", 32_768, "bf16"),
    Case("loss", "qwen2.5-3b", 4096, "fp32"),
    Case("linear-loss", "qwen2.5-0.5b", 32_768, "bf16"),
    Case("linear-loss", "qwen2.5-3b", 16_384, "bf16"),
    Case("linear-loss", "llama-3-8b", 8192, "bf16"),
    Case("linear-loss", "gemma-3-4b", 8192, "bf16"),
    Case("linear-loss", "qwen2.5-7b", 8192, "bf16", band_scope="segment"),
    Case("loss", "qwen2.5-3b", 8192, "bf16", policies=True),
)
CPU = (
    Case("loss", "qwen2.5-3b", 128, "fp32", peers=True, compiled=True),
    Case("linear-loss", "d512-v32000", 1024, "fp32", peers=True, compiled=True),
    Case("loss", "qwen2.5-3b", 128, "bf16", peers=True),
    Case("linear-loss", "d512-v32000", 1024, "fp32", unmasked=0.15),
    Case("score", "qwen2.5-3b", 128, "fp32"),
    Case("linear-score", "d512-v32000", 1024, "fp32", peers=True),
    Case("loss", "qwen2.5-3b", 128, "fp32", unmasked=0.15),
    Case("loss", "qwen2.5-3b", 128, "fp32", band_scope="segment"),
    Case("loss", "llama-2-7b", 512, "fp32"),
    Case("loss", "llama-3-8b", 128, "fp32"),
    Case("loss", "qwen3.5", 128, "fp32"),
    Case("loss", "gemma-3-4b", 128, "fp32"),
    Case("linear-loss", "qwen2.5-0.5b", 256, "bf16"),
    Case("linear-loss", "d64-v151936", 4096, "fp32", chunk_mb=512),
    Case("loss", "qwen2.5-3b", 128, "fp32", policies=True),
    Case("linear-loss", "d512-v32000", 512, "fp32", policies=True),
)
TINY = (
    Case("loss", "tiny", 64, "fp32", peers=True),
    Case("loss", "tiny", 64, "bf16", unmasked=0.15),
    Case("loss", "tiny", 64, "fp32", band_scope="segment"),
    Case("linear-loss", "tiny", 64, "fp32", peers=True),
    Case("score", "tiny", 64, "fp32"),
    Case("linear-score", "tiny", 64, "fp32", peers=True),
    Case("loss", "tiny", 64, "fp32", policies=True),
    Case("linear-loss", "tiny", 64, "fp32", policies=True),
)
STEPS = {
    "gpu": (StepCase(151_936, 64),),
    "cpu": (StepCase(1_000, 8), StepCase(151_936, 8)),
    "tiny": (StepCase(1_000, 2, rounds=2),),
}
SUITES = {"gpu": GPU, "cpu": CPU, "tiny": TINY}
