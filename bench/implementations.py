"""The measured implementations: this library by backend, eager PyTorch, and eager PyTorch under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import epo_kernels as ek
from bench.cases import Case
from bench.inputs import Inputs
from bench.truth import CONTRACTS, config_of, loss_arguments

Run = Callable[[Inputs], dict[str, Tensor]]

EAGER = "eager"
COMPILED = "torch.compile"
# Minimum number of float32 copies of the logits in eager PyTorch at its peak: logits, exponentials, gradients of both.
_EAGER_COPIES = 6


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: name in the report.
        contract: a key of `CONTRACTS`: the required outputs.
        build: imports what it needs, and returns the function to measure.
        note: added to the contract's description.
        ours: whether it belongs to this library.
        eager_memory: whether it keeps several copies of the logits.
    """

    name: str
    contract: str
    build: Callable[[], Run]
    note: str = ""
    ours: bool = False
    eager_memory: bool = False

    @property
    def computes(self) -> str:
        return CONTRACTS[self.contract].computes + (f" ({self.note})" if self.note else "")


def missing_memory(case: Case, implementation: Implementation, free: int) -> str | None:
    """Why it is not tried: a machine that runs out of memory loses the other measurements too."""
    needed = _EAGER_COPIES * 4 * case.tokens * case.vocab_size
    if not implementation.eager_memory or needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB for its copies of the logits, {free / 1e9:.0f} GB are free"


def with_gradients(
    outputs: dict[str, Tensor],
    objective: Tensor | list[Tensor],
    inputs: Inputs,
    upstream: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs, and the gradients of every leaf for the upstream gradients of the objective."""
    leaves = inputs.leaves
    gradients = torch.autograd.grad(objective, list(leaves.values()), upstream)
    return {**outputs, **dict(zip(leaves, gradients, strict=True))}


def ours(case: Case, backend: str, function: Callable[..., Any] | None = None, policy: str = "ppo") -> Run:
    """A call of this library, and its backward if the case has one.

    function: replaces the library's. policy: a key of `POLICY_FIELDS`.
    """
    cfg, chunks = config_of(case, policy), {"max_chunk_bytes": case.chunk_mb << 20} if case.linear else {}
    if not case.gradient:
        score: Callable[..., Any] = function or (
            ek.linear_log_probs_and_entropy if case.linear else ek.log_probs_and_entropy
        )

        def run_score(inputs: Inputs) -> dict[str, Tensor]:
            with torch.no_grad():
                log_probs, entropy = score(*inputs.rows, inputs.tokens, mask=inputs.mask, backend=backend, **chunks)
            return {"log_probs": log_probs, "entropy": entropy}

        return run_score
    loss: Callable[..., Any] = function or (ek.linear_epo_loss if case.linear else ek.epo_loss)

    def run_loss(inputs: Inputs) -> dict[str, Tensor]:
        per_token = (inputs.tokens, inputs.old_log_probs, inputs.advantages, inputs.mask)
        out = loss(*inputs.rows, *per_token, cfg, backend=backend, **chunks, **loss_arguments(case, inputs))
        outputs = {"loss": out.loss, "log_probs": out.log_probs, "entropy": out.entropy}
        return with_gradients(outputs, out.loss, inputs)

    return run_loss


def compiled(case: Case) -> Run:
    """Eager PyTorch under torch.compile: the result for a user who writes the loss and compiles it."""
    torch.compiler.reset()  # one code object is compiled for every case, and the number of versions is limited
    function = ek.linear_epo_loss if case.linear else ek.epo_loss
    return ours(case, "reference", torch.compile(function, dynamic=False))
