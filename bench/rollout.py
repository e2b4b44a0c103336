"""The driver's overhead over the bare engine: `python -m bench.rollout [transformers | vllm]`.

Plays the rollouts of a run's first steps on the preset practice, whose environment takes almost no time, with a tiny
model and with one of 26M parameters, which is still smaller than models in real use. After each rollout, the same
prompts with the same seeds go directly to the bare engine: transformers in the driver's batches; vLLM with each
episode's next prompt as soon as its previous response is there, and then again with all prompts at once, which no agent
could do. The driver's laps copy the weights into vLLM, the engine's do not. Laps alternate, so that all see the same
machine state. Ratios are medians over rounds, by wall time and by CPU time, which is less affected by the load of other
processes. Results go to bench/results/rollout/ENGINE.json. vLLM runs in .venv-vllm (make test-integrations).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import records
from epo_kernels.train.__main__ import keep_freed_memory
from epo_kernels.train.build import build
from epo_kernels.train.config import load_config
from epo_kernels.train.data import Episode
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.tracking import write_atomically
from epo_kernels.train.parts import Parts
from epo_kernels.train.rollout.engine import Completion, Engine, Request, StreamingEngine

RESULTS = Path(__file__).parent / "results" / "rollout"
MODELS = {  # rounds, and settings that override the preset's
    "tiny": (7, ()),
    "small": (5, ("model.warm_start.epochs=1", "algorithm.groups=4", "rollout.environments=32")),
}
GOAL = 0.85  # of the bare engine's tokens per second


@dataclass(frozen=True)
class Lap:
    tokens: int
    seconds: float
    processor_seconds: float  # of all threads


@dataclass(frozen=True)
class Round:
    driver: Lap
    bare: Lap  # prompts in the driver's order
    at_once: Lap | None  # all prompts queued; None for an engine that takes batches


def measure(engine: str, model: str, rounds: int, overrides: Sequence[str] = ()) -> list[Round]:
    """Measure `rounds` rounds after one uncounted warm-up round."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run_dir={folder}/run", f"rollout.engine={engine}", "evaluate.panels=[]"]
        settings += [f"model.name_or_path={model}", *overrides]
        with build(load_config("practice", settings), Display()) as parts:
            return [_round(parts, number) for number in range(rounds + 1)][1:]


def _round(parts: Parts, number: int) -> Round:
    episodes = parts.collector.draw(number)
    parts.rollout.prefetch(episodes)
    driver = _timed(lambda: _play(parts, episodes))
    batches = _batches(episodes, parts.config.rollout.cohorts)
    if isinstance(parts.engine, StreamingEngine):
        with parts.engine.awake():
            bare = _timed(lambda: _write_stream(parts.engine, [_requests(episode) for episode in episodes]))
        with parts.engine.awake():  # restarted, so that these prompts are not cached
            everything = [[request] for batch in batches for request in batch]
            return Round(driver, bare, _timed(lambda: _write_stream(parts.engine, everything)))
    return Round(driver, _timed(lambda: _write_batches(parts.engine, batches)), None)


def _timed(work: Callable[[], int]) -> Lap:
    wall, processor = time.perf_counter(), time.process_time()
    tokens = work()
    return Lap(tokens, time.perf_counter() - wall, time.process_time() - processor)


def _play(parts: Parts, episodes: list[Episode]) -> int:
    parts.rollout.play(episodes)
    return sum(len(turn.response_ids) for episode in episodes for turn in episode.turns)


def _batches(episodes: list[Episode], cohorts: int) -> list[list[Request]]:
    """The requests of the cohorts in each turn; every episode had its own environment."""
    longest = max(len(episode.turns) for episode in episodes)
    asked = [_requests(episode) for episode in episodes]
    return [
        [requests[turn] for requests in asked[cohort::cohorts] if turn < len(requests)]
        for turn in range(longest)
        for cohort in range(cohorts)
    ]


def _requests(episode: Episode) -> list[Request]:
    return [Request(turn.prompt_ids, (*episode.seed, i), episode.greedy) for i, turn in enumerate(episode.turns)]


def _write_batches(engine: Engine, batches: list[list[Request]]) -> int:
    return _tokens([completion for batch in batches if batch for completion in engine.generate(batch)])


def _write_stream(engine: StreamingEngine, chains: list[list[Request]]) -> int:
    """Submits each chain's next request when the previous one is complete."""
    tokens, places = 0, [0] * len(chains)
    engine.submit({number: requests[0] for number, requests in enumerate(chains)})
    left = sum(map(len, chains))
    while left:
        finished = engine.advance()
        tokens += _tokens([completion for _, completion in finished])
        left -= len(finished)
        follow = {}
        for number, _ in finished:
            places[number] += 1
            if places[number] < len(chains[number]):
                follow[number] = chains[number][places[number]]
        engine.submit(follow)
    return tokens


def _tokens(completions: Sequence[Completion]) -> int:
    return sum(len(completion.token_ids) for completion in completions)


def ratios_of(rounds: Sequence[Round]) -> dict[str, float]:
    """The driver's tokens per second relative to the bare engine's: medians over the rounds."""
    ratios = {}
    for engine, name in (("bare", "ratio"), ("at_once", "at_once_ratio")):
        pairs = [(one.driver, lap) for one in rounds if (lap := getattr(one, engine))]
        for clock, suffix in (("seconds", ""), ("processor_seconds", "_of_processor_time")):
            found = [_speed(driver, clock) / _speed(lap, clock) for driver, lap in pairs]
            if found:
                ratios[name + suffix] = round(statistics.median(found), 3)
    return ratios


def _speed(lap: Lap, clock: str) -> float:
    return lap.tokens / float(getattr(lap, clock))


def main(words: Sequence[str]) -> int:
    engine = words[0] if words else "transformers"
    keep_freed_memory()
    torch.set_num_threads(1)
    models = {}
    for model, (count, overrides) in MODELS.items():
        rounds = measure(engine, model, count, overrides)
        models[model] = ratios_of(rounds) | {"rounds": [asdict(found) for found in rounds]}
        speed = statistics.median(found.driver.tokens / found.driver.seconds for found in rounds)
        print(f"{engine}, {model}: the driver writes {speed:,.0f} tokens/s; of the bare engine's (goal {GOAL}):")
        for name, ratio in ratios_of(rounds).items():
            print(f"  {name:<34}{ratio:.2f}")
    result = {
        **asdict(records.this_machine(torch.device("cpu"), {})),
        "engine": engine,
        "commit": records.commit(),
        "measured": records.now(),
        "models": models,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{engine}.json", json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
