"""ALFWorld (Shridhar et al. 2021), the real text engine: six types of household task.

The games are those that `alfworld-download` puts into ALFWORLD_DATA; where that isn't set, a small set that
games.py authors. Panels: train, valid_seen ("iid", known rooms) and valid_unseen ("ood", other rooms).

Reward is 1 for the action that completes the task and 0 for any other (the published EPO code: 10 and 0; group and
whitened advantages are the same). So a return lies in 0..1; score is 0 or 100, and what the published code counts as
success, "done and score > 0", is here the same as success.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from epo_kernels.train.envs.alfworld.games import (
    DATA,
    EMBEDDED_COUNTS,
    PANELS,
    TASK_NAMES,
    author_games,
    start_engine,
)
from epo_kernels.train.envs.base import (
    SPLITS,
    Demonstration,
    EnvConfig,
    Environment,
    EnvironmentFailure,
    Observation,
    StepResult,
    Task,
    clean_action,
    unknown_task_name,
)
from epo_kernels.train.envs.demonstrations import cache_folder, play
from epo_kernels.train.envs.suite import Suite
from epo_kernels.train.setting import one_of, setting

EMBEDDED_FORMAT = 1  # raise it when games.py authors other games
_NOTHING = "Nothing happens."  # the engine's answer to what it doesn't understand
_LOOKS = re.compile(r"(look|inventory|examine|help)\b")  # actions that change nothing

_TASK = re.compile(r"\s*Your task is to: (.+?)\.?\s*$", re.DOTALL)
_SEEN = re.compile(r"Looking quickly around you, you see (.+?)\.", re.DOTALL)


@dataclass
class ALFWorldOptions:
    """ALFWorld: its household tasks, and what observations show."""

    task_names: list[str] = setting([], "task types of train and iid; []: all six", one_of(*TASK_NAMES))
    ood_task_names: list[str] = setting([], "task types of ood; []: those of task_names", one_of(*TASK_NAMES))
    admissible_commands: bool = setting(True, "list the admissible commands in the prompt, as published")


class ALFWorldEnvironment(Environment):
    """One engine in a process of its own, started at once. Belongs to one thread at a time."""

    def __init__(self, config: EnvConfig, data: Path, files: dict[Task, Path]) -> None:
        self._config = config
        self._files = files
        self._worker = start_engine(data, config.start_timeout)
        self._done = True

    @property
    def process_id(self) -> int:
        return self._worker.process.pid

    def reset(self, task: Task) -> Observation:
        """Load the task's game.

        Raises:
            ValueError: no such task.
            EnvironmentFailure: the engine died or hung, or the game's file is broken.
        """
        self._done = True
        path = _file(self._files, task)
        shown = self._worker.call("reset", self._config.start_timeout, "env.start_timeout", path=str(path))
        opening = shown["feedback"].removeprefix("-= Welcome to TextWorld, ALFRED! =-")
        asked = _TASK.search(opening)
        if asked is None:
            raise EnvironmentFailure(f"{path} opens without 'Your task is to:', so it is no game of ALFWorld")
        wording = " ".join(asked[1].split())
        self._goal = f"{wording[:1].upper()}{wording[1:]}."
        opening = " ".join(opening[: asked.start()].split())
        places = _SEEN.search(opening)
        self._places = places[1] if places else "nothing"
        self._carried = "nothing"
        self._arrival = opening
        self._done = False
        return self._observation(opening, shown["commands"])

    def step(self, action: str | None) -> StepResult:
        """Play one action; text of any kind is safe.

        Raises:
            RuntimeError: the episode is over.
        """
        if self._done:
            raise RuntimeError("the episode is over (or never began): reset the environment first")
        action = clean_action(action).lower()
        shown = self._worker.call("step", self._config.step_timeout, action=action)
        answer = " ".join(shown["feedback"].split())
        if taken := re.match(r"You pick up the (.+?) from the ", answer):
            self._carried = taken[1]
        elif re.match(r"You move the .+? to the ", answer):
            self._carried = "nothing"
        if answer != _NOTHING and not _LOOKS.match(action):
            self._arrival = answer
        self._done = won = bool(shown["won"])
        return StepResult(
            observation=self._observation(answer, shown["commands"]),
            reward=float(won),
            done=won,
            score=100.0 * won,
            success=won,
            valid=answer != _NOTHING,
        )

    def actions(self, source: str, task: Task) -> list[str]:
        """What the engine's "expert" or "plan" would do in the task; [] where it finds no way."""
        path = str(_file(self._files, task))
        return list(self._worker.call(source, self._config.start_timeout, "env.start_timeout", path=path))

    def close(self) -> None:
        self._worker.close()

    def _observation(self, answer: str, commands: list[str]) -> Observation:
        """Its state is the last answer to a move, which says where the player is and what is there."""
        carried = f"You have: {self._carried}."
        state = f"{carried} {self._arrival}"
        actions = tuple(command for command in commands if command != "help")  # as in the published prompts
        if self._config.options.admissible_commands:
            return Observation(self._goal, answer, f"{carried} You can: {', '.join(actions)}.", state)
        return Observation(self._goal, answer, f"{carried} Places: {self._places}.", state, actions)


def _file(files: dict[Task, Path], task: Task) -> Path:
    path = files.get(Task(task.name, task.variation))
    if path is None:
        count = sum(known.name == task.name for known in files)
        if count:
            raise ValueError(f"{task.name} has variations 0 to {count - 1}, not {task.variation}")
        raise ValueError(unknown_task_name("ALFWorld", task.name, TASK_NAMES))
    return path


def find_games(data: Path) -> dict[str, dict[str, list[Path]]]:
    """The games of each panel ("train", "iid", "ood") and task type, in the order of their paths.

    As the package does, it leaves out games that aren't solvable or aren't told to be, and those with sliced objects
    or movable receptacles.

    Raises:
        ValueError: a panel's folder is missing.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for split, panel in PANELS.items():
        folder = data / DATA / panel
        if not folder.is_dir():
            raise ValueError(
                f"ALFWORLD_DATA={data} lacks {DATA}/{panel}: `alfworld-download` puts the games there, and "
                "`python -m epo_kernels.train.envs.alfworld.games FOLDER` authors a small set offline; unset "
                "ALFWORLD_DATA to have that done by itself"
            )
        found[split] = {name: [] for name in TASK_NAMES}
        for path in sorted(folder.rglob("game.tw-pddl")):
            place = path.parent.parent.name
            name = place.split("-", 1)[0]
            left_out = "movable" in place or "Sliced" in place or name not in TASK_NAMES
            if not left_out and (path.parent / "traj_data.json").exists() and _is_solvable(path):
                found[split][name].append(path)
    return found


def _is_solvable(path: Path) -> bool:
    """By the text: reading thousands of large files as JSON would take half a minute."""
    return re.search(rb'"solvable":\s*true', path.read_bytes()) is not None


class ALFWorldSuite(Suite):
    """ALFWorld's tasks.

    "train" and "iid" hold the games of `task_names` in train and valid_seen, "ood" those of `ood_task_names` in
    valid_unseen. Task types take turns, so any first n tasks are a balanced panel. A variation counts a type's games
    through all panels, in the order of their paths.

    Raises:
        ValueError: the data are missing.
    """

    Options = ALFWorldOptions
    panels = ("iid", "ood", "train")
    default_max_turns = 50  # the paper's
    lists_actions = True
    requires: ClassVar = {"alfworld": "epo-kernels[alfworld]"}

    def __init__(self, config: EnvConfig) -> None:
        super().__init__(config)
        options: ALFWorldOptions = config.options
        names = options.task_names or list(TASK_NAMES)
        self._names = {"train": names, "iid": names, "ood": options.ood_task_names or names}
        given = os.environ.get("ALFWORLD_DATA")
        self._data = Path(given).expanduser() if given else _embedded(config)
        self._columns: dict[tuple[str, str], list[Task]] = {}
        self._files: dict[Task, Path] = {}
        found = find_games(self._data)
        for name in TASK_NAMES:
            variation = 0
            for split in SPLITS:
                tasks = [Task(name, variation + index) for index in range(len(found[split][name]))]
                self._columns[split, name] = tasks
                self._files.update(zip(tasks, found[split][name], strict=True))
                variation += len(tasks)

    def tasks(self, split: str) -> list[Task]:
        """Raises ValueError for an unknown split, or where the data hold no game of it."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        tasks = self.in_turns([self._columns[split, name] for name in self._names[split]])
        if not tasks:
            raise ValueError(f"{self._data} holds no solvable game of {', '.join(self._names[split])} in {split}")
        return tasks

    def make(self) -> ALFWorldEnvironment:
        return ALFWorldEnvironment(self.config, self._data, self._files)

    def demonstrate(self, task: Task) -> Demonstration:
        """The expert's episode, which explores as a player must; where it needs too many turns, the planner's.

        Raises:
            ValueError: no such task, or neither wins within the turns.
        """
        with self.borrow() as environment:
            demonstration = self._demonstrate(environment, task)
        if demonstration is None:
            raise ValueError(
                f"neither expert nor planner completes {task.name}, variation {task.variation}, within "
                f"{self.max_turns} actions; raise env.max_turns"
            )
        return demonstration

    def _demonstrate(self, environment: ALFWorldEnvironment, task: Task) -> Demonstration | None:
        for source in ("expert", "plan"):
            actions = environment.actions(source, task)
            if 0 < len(actions) <= self.max_turns:
                demonstration, _ = play(environment, task, actions)
                if demonstration.score == 100:
                    return demonstration
        return None


def _embedded(config: EnvConfig) -> Path:
    """The embedded set, authored at its first use."""
    folder = cache_folder(config.cache_dir) / f"alfworld-games-{EMBEDDED_FORMAT}"
    if not (folder / DATA).is_dir():
        logging.getLogger(__name__).warning(
            "ALFWORLD_DATA isn't set: authoring %d small games into %s, once; it takes a minute or two",
            sum(EMBEDDED_COUNTS.values()),
            folder,
        )
        author_games(folder, EMBEDDED_COUNTS, seed=0)
    return folder
