"""An environment of your own: TextWorld's Coin Collector, a chain of rooms with a coin in the last one.

    python -m epo_kernels.train practice env.name=examples.my_environment:CoinSuite run_dir=runs/coin

with the repository as current folder; `--help` beside it lists the options. It needs `pip install textworld`, which
isn't thread-safe: each game plays in a process of its own.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import textworld
from textworld.challenges import coin_collector
from textworld.generator import compile_game

from epo_kernels.train.envs import Demonstration, Environment, Observation, ProcessEnvironment, StepResult, Suite, Task
from epo_kernels.train.envs.demonstrations import cache_folder, play
from epo_kernels.train.setting import at_least, setting

SEEDS = {"train": range(256), "heldout": range(1000, 1128)}  # of the games' generator


@dataclass
class CoinOptions:
    """The maze of the coin collector."""

    rooms: int = setting(3, "rooms from the start to the coin", at_least(1))


class CoinGame(Environment):
    """Plays in its own process."""

    def __init__(self, folder: str, rooms: int) -> None:
        self._folder, self._rooms = Path(folder), rooms

    def reset(self, task: Task) -> Observation:
        wanted = textworld.EnvInfos(admissible_commands=True, description=True, objective=True, extras=["walkthrough"])
        self._game = textworld.start(str(self._written(task.variation)), wanted)
        self._state = self._game.reset()
        return self._observation("You enter.")

    def step(self, action: str) -> StepResult:
        if action not in self._state.admissible_commands:  # other text can crash the engine ("\0") or save files
            return StepResult(self._observation("You can't do that."), 0.0, False, 0.0, False, valid=False)
        self._state, _, done = self._game.step(action)
        answer, won = self._state.feedback.rpartition("\n>")[0], bool(self._state.score)  # without the status line
        return StepResult(self._observation(answer), float(won), done, 100.0 * won, won)

    def walkthrough(self) -> list[str]:
        return self._state["extra.walkthrough"]

    def _observation(self, answer: str) -> Observation:
        answer, scene = (" ".join(text.split()) for text in (answer, self._state.description))
        return Observation(self._state.objective, answer, scene, actions=tuple(self._state.admissible_commands))

    def _written(self, seed: int) -> Path:
        """The game's file, generated when it is first asked for; several processes may ask at once."""
        path = self._folder / f"coin-{self._rooms}-{seed}.z8"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self._folder) as unfinished:
                options = textworld.GameOptions()
                options.seeds, options.path = seed, os.path.join(unfinished, path.name)
                options.grammar.only_last_action = True  # the objective must not tell the way
                compile_game(coin_collector.make({"level": self._rooms}, options), options)
                for suffix in (".json", ".z8"):
                    os.replace(Path(options.path).with_suffix(suffix), path.with_suffix(suffix))
        return path


class CoinSuite(Suite):
    Options = CoinOptions
    panels = ("heldout", "train")
    lists_actions = True

    def tasks(self, split: str) -> list[Task]:
        return [Task("coin", seed) for seed in SEEDS[split]]

    def make(self) -> ProcessEnvironment:
        folder = cache_folder(self.config.cache_dir) / "coin-collector"
        return ProcessEnvironment(CoinGame, self.config, folder=str(folder), rooms=self.config.options.rooms)

    def demonstrate(self, task: Task) -> Demonstration:
        with self.borrow() as environment:
            environment.reset(task)
            return play(environment, task, environment.call("walkthrough"))[0]
