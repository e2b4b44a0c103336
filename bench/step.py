"""A whole training step by phases: the loss's share of it, with eager PyTorch and with this library.

Uses the driver's own parts on its practice environment: rollout, old log-probs, and an update of one epoch. The loss is
separated by detaching the hidden states from which the driver computes it: model forward; head and loss with their
backward; model backward; optimizer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

import epo_kernels as ek
from bench import gate, records
from bench.cases import StepCase
from bench.records import Record

if TYPE_CHECKING:  # the driver needs more packages than the kernels do
    from epo_kernels.train.data import MiniBatch, Sample

POLICY_AND_ENTROPY = ek.EPOConfig(entropy_coeff=1e-2)
_OVERRIDES = ("env.options.length=4", "env.options.spare_turns=2", "algorithm.groups=2", "rollout.environments=16")


EAGER, OURS = "eager", "ours"
LOSS_TOLERANCE = 1e-4  # of a loss that is a mean over tokens, in float32
BACKENDS = {OURS: "auto", EAGER: "reference"}


class Phases:
    """Seconds by name, in order; on a GPU each phase ends with a sync."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


class Round(NamedTuple):
    """seconds: by phase. loss: of the whole step."""

    seconds: dict[str, float]
    loss: float


class Step:
    """A policy and its environments. The learning rate is 0, so every call uses the same weights.

    Raises:
        ImportError: the driver needs a package that is not installed.
    """

    def __init__(self, case: StepCase, device: torch.device, folder: str) -> None:
        from epo_kernels.train.build import build
        from epo_kernels.train.config import load_config
        from epo_kernels.train.io.display import Display

        overrides = (f"run_dir={folder}", f"model.device={device.type}", f"env.cache_dir={folder}", *_OVERRIDES)
        self._case, self._device = case, device
        self._resources = ExitStack()
        self._parts = self._resources.enter_context(
            build(load_config("practice", list(overrides)), Display(), dry=True)
        )
        self._model = self._parts.policy.model
        self._model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        self._head = self._model.get_output_embeddings().weight
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.0)

    def close(self) -> None:
        self._resources.close()

    def run(self, backend: str, number: int) -> Round:
        """The same number plays the same episodes and gives the same loss."""
        from epo_kernels.train.data import micro_batches

        phases = Phases(self._device)
        with phases.timed("rollout"):
            samples = self._play(number)
        batches = [
            [samples[i] for i in indices]
            for indices in micro_batches(samples, self._parts.config.optim.micro_batch_tokens)
        ]
        for chosen in batches:
            self._score(phases, chosen, backend)
        tokens = float(sum(len(sample.response_ids) for sample in samples))
        loss = sum(self._backward(phases, chosen, backend, tokens) for chosen in batches)
        with phases.timed("update: optimiser"):
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return Round(phases.seconds, loss)

    def _play(self, number: int) -> list[Sample]:
        """A rollout's turns, half of the episodes with positive and half with negative advantages."""
        from epo_kernels.train.data import Draw, Episode, Sample

        tasks = self._parts.tasks
        episodes = [
            Episode(tasks[i % len(tasks)], group=i, seed=(0, Draw.EPISODE, number, i))
            for i in range(self._case.episodes)
        ]
        self._parts.rollout.play(episodes)
        return [
            Sample.of_turn(turn.prompt_ids, turn.response_ids, position, advantage=(-1.0) ** index)
            for index, episode in enumerate(episodes)
            for position, turn in enumerate(episode.turns)
        ]

    def _batch(self, samples: list[Sample]) -> MiniBatch:
        from epo_kernels.train.data import MiniBatch

        return MiniBatch.of(samples, self._parts.policy.pad_id, self._device)

    def _hidden(self, batch: MiniBatch) -> torch.Tensor:
        from epo_kernels.train.models.policy import response_hidden

        return response_hidden(self._model.get_decoder(), batch)

    @torch.no_grad()
    def _score(self, phases: Phases, samples: list[Sample], backend: str) -> None:
        batch = self._batch(samples)
        with phases.timed("old log-probs: model"):
            hidden = self._hidden(batch)
        with phases.timed("old log-probs: scores"):
            scores, _ = ek.linear_log_probs_and_entropy(
                hidden, self._head, batch.tokens, mask=batch.mask, num_active=batch.num_sampled, backend=backend
            )
        for sample, own in zip(samples, scores.cpu(), strict=True):
            sample.old_log_probs = own[: len(sample.response_ids)]

    def _backward(self, phases: Phases, samples: list[Sample], backend: str, tokens: float) -> float:
        batch = self._batch(samples)
        with phases.timed("update: model"):
            hidden = self._hidden(batch)
        with phases.timed("update: loss"):
            leaf = hidden.detach().requires_grad_()
            assert batch.advantages is not None
            out = ek.linear_epo_loss(
                leaf,
                self._head,
                batch.tokens,
                batch.old_log_probs,
                batch.advantages,
                batch.mask,
                POLICY_AND_ENTROPY,
                normalizer=tokens,
                num_active=batch.num_sampled,
                backend=backend,
            )
            out.loss.backward()
        with phases.timed("update: model"):
            hidden.backward(leaf.grad)
        return out.loss.item()


def measure_step(case: StepCase, device: torch.device) -> dict[str, list[Round]]:
    """The rounds for `BACKENDS`, alternating, after one uncounted warm-up round."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(case, device, folder)
        try:
            found: dict[str, list[Round]] = {name: [] for name in BACKENDS}
            for number in range(case.rounds + 1):
                for name, backend in BACKENDS.items():
                    played = step.run(backend, number)
                    if number > 0:
                        found[name].append(played)
            return found
        finally:
            step.close()


def check(rounds: list[Round], true: list[Round]) -> str:
    """ "pass" if the losses equal those of eager PyTorch."""
    off = max(abs(own.loss - other.loss) for own, other in zip(rounds, true, strict=True))
    if off <= LOSS_TOLERANCE:
        return gate.PASS
    return f"fails: the loss is off by {off:.1e} from eager PyTorch's, at most {LOSS_TOLERANCE:.0e} is allowed"


def records_of(case: StepCase, found: dict[str, list[Round]]) -> dict[str, Record]:
    """The records of the measured rounds."""
    totals = {name: [sum(played.seconds.values()) for played in rounds] for name, rounds in found.items()}
    ours = statistics.median(totals[OURS])
    made = {}
    for name, rounds in found.items():
        low, median, high = statistics.quantiles(totals[name], n=4, method="inclusive")
        phases = {phase: 1e3 * statistics.median(own.seconds[phase] for own in rounds) for phase in rounds[0].seconds}
        made[name] = Record(
            case.name,
            name,
            1e3 * median,
            floor_ms=None,
            ratio_to_floor=None,
            ratio_to_ours=median / ours,
            peak_mb=None,
            gate=check(rounds, found[EAGER]),
            computes=f"a training step, of which scores and loss are {loss_share(phases):.1%}",
            spread_ms=[1e3 * low, 1e3 * high],
            rounds=len(rounds),
            phases_ms=phases,
            date=records.now(),
            commit=records.commit(),
        )
    return made


def loss_share(phases: dict[str, float]) -> float:
    """The share of a step spent on scores and losses; the rest is model, environments and optimizer."""
    return (phases["old log-probs: scores"] + phases["update: loss"]) / sum(phases.values())
