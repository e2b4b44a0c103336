"""What the driver costs beside the engine: `python -m bench.rollout [transformers | vllm]`.

A rollout of the preset practice, whose environment is as good as free, and then the same prompts with the same seeds
straight into the bare engine: transformers in the driver's batches, vLLM all at once. In turns, so that both see the
same machine; the ratio is the median of the rounds', by the clock and by the processor's time, which others' load
doesn't stretch as much. Results go to bench/results/rollout/ENGINE.json. vLLM: in .venv-vllm (make test-integrations).
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
from epo_kernels.train.config import load_config
from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.policies.generate import Completion, Engine, Request, StreamingEngine
from epo_kernels.train.tracking import Display, write_atomically
from epo_kernels.train.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "rollout"
ROUNDS = 7
GOAL = 0.85  # of the bare engine's tokens a second


@dataclass(frozen=True)
class Lap:
    tokens: int
    seconds: float
    processor_seconds: float  # of all threads


@dataclass(frozen=True)
class Round:
    driver: Lap
    bare: Lap

    def ratio(self, seconds: Callable[[Lap], float]) -> float:
        """Of the driver's tokens a second to the bare engine's."""
        return (self.driver.tokens / seconds(self.driver)) / (self.bare.tokens / seconds(self.bare))


def measure(engine: str, rounds: int = ROUNDS, overrides: Sequence[str] = ()) -> list[Round]:
    """One round before them isn't counted."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run_dir={folder}/run", f"rollout.engine={engine}", "evaluate.panels=[]", *overrides]
        with Trainer(load_config("practice", settings), Display()) as trainer:
            return [_round(trainer, number) for number in range(rounds + 1)][1:]


def _round(trainer: Trainer, number: int) -> Round:
    episodes = [
        Episode(trainer.tasks[i % len(trainer.tasks)], i, (0, Draw.EPISODE, number, i))
        for i in range(trainer.config.rollout.environments)
    ]
    trainer.rollout.prefetch(episodes)
    driver = _timed(lambda: _play(trainer, episodes))
    batches = _batches(episodes, trainer.config.rollout.cohorts)
    if isinstance(trainer.engine, StreamingEngine):
        with trainer.engine.awake():
            return Round(driver, _timed(lambda: _write_at_once(trainer.engine, sum(batches, []))))
    return Round(driver, _timed(lambda: _write_batches(trainer.engine, batches)))


def _timed(work: Callable[[], int]) -> Lap:
    wall, processor = time.perf_counter(), time.process_time()
    tokens = work()
    return Lap(tokens, time.perf_counter() - wall, time.process_time() - processor)


def _play(trainer: Trainer, episodes: list[Episode]) -> int:
    trainer.rollout.play(episodes)
    return sum(len(turn.response_ids) for episode in episodes for turn in episode.turns)


def _batches(episodes: list[Episode], cohorts: int) -> list[list[Request]]:
    """What cohorts asked for in each turn; every episode had its own environment."""
    longest = max(len(episode.turns) for episode in episodes)
    return [
        [
            Request(episode.turns[turn].prompt_ids, (*episode.seed, turn), episode.greedy)
            for episode in episodes[cohort::cohorts]
            if turn < len(episode.turns)
        ]
        for turn in range(longest)
        for cohort in range(cohorts)
    ]


def _write_batches(engine: Engine, batches: list[list[Request]]) -> int:
    return _tokens([completion for batch in batches if batch for completion in engine.generate(batch)])


def _write_at_once(engine: StreamingEngine, requests: list[Request]) -> int:
    engine.submit(dict(enumerate(requests)))
    completions: list[Completion] = []
    while len(completions) < len(requests):
        completions += [completion for _, completion in engine.advance()]
    return _tokens(completions)


def _tokens(completions: Sequence[Completion]) -> int:
    return sum(len(completion.token_ids) for completion in completions)


def main(words: Sequence[str]) -> int:
    engine = words[0] if words else "transformers"
    keep_freed_memory()
    torch.set_num_threads(1)
    rounds = measure(engine)
    by_clock = statistics.median(found.ratio(lambda lap: lap.seconds) for found in rounds)
    by_processor = statistics.median(found.ratio(lambda lap: lap.processor_seconds) for found in rounds)
    result = {
        **asdict(records.this_machine(torch.device("cpu"), {})),
        "engine": engine,
        "commit": records.commit(),
        "measured": records.now(),
        "ratio": round(by_clock, 3),
        "ratio_of_processor_time": round(by_processor, 3),
        "rounds": [asdict(found) for found in rounds],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{engine}.json", json.dumps(result, indent=1) + "\n")
    speed = statistics.median(found.driver.tokens / found.driver.seconds for found in rounds)
    print(
        f"{engine}: the driver writes {speed:,.0f} tokens/s, {by_clock:.2f} of what the bare engine does on the same "
        f"prompts ({by_processor:.2f} by processor time; goal {GOAL})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
