"""Demonstrations frozen to files: gold paths cost seconds and differ from call to call."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from epo_kernels.train.envs.base import Demonstration, Environment, Observation, Task

FROZEN = "demonstrations.jsonl"


def cache_folder(configured: str | None) -> Path:
    """`configured`, else $XDG_CACHE_HOME/epo_kernels, else ~/.cache/epo_kernels."""
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epo_kernels"


def borrow_cache(configured: str | None, folder: str) -> str:
    """Fill `folder` with links to the cache's files, and return it: what is written there leaves the cache alone."""
    cache = cache_folder(configured).resolve()
    if cache.is_dir():
        unfinished = shutil.ignore_patterns(".unfinished-*", "*.tmp")  # of other processes, about to go
        shutil.copytree(cache, folder, copy_function=os.symlink, ignore=unfinished, dirs_exist_ok=True)
    return folder


def play(environment: Environment, task: Task, actions: list[str]) -> tuple[Demonstration, list[str]]:
    """Play `actions` until the episode ends; the second value holds the environment's answers to those played."""
    observations = [environment.reset(task)]
    score = 0.0
    for action in actions:
        result = environment.step(action)
        observations.append(result.observation)
        score = result.score
        if result.done:
            break
    played = actions[: len(observations) - 1]
    return Demonstration(task, observations[:-1], played, score), [seen.text for seen in observations[1:]]


def write_demonstration(path: Path, demonstration: Demonstration) -> None:
    """Write `path` whole or not at all: several processes may share the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(demonstration), file, ensure_ascii=False, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def observation_of(record: dict[str, Any]) -> Observation:
    """An observation as JSON has it."""
    return Observation(**record | {"actions": tuple(record.get("actions", ()))})


def read_demonstration(path: Path) -> Demonstration | None:
    """The demonstration in `path`; None where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return _demonstration(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no demonstration ({error}); delete the file, and it is written again"
        ) from error


def frozen_folder(name: str) -> Path:
    """The folder of frozen demonstrations called `name`: one shipped with the package, else a path."""
    shipped = Path(str(files("epo_kernels.train"))) / "frozen" / name
    return shipped if shipped.is_dir() else Path(name)


def freeze(folder: Path, demonstrations: Sequence[Demonstration]) -> None:
    """Write `folder`/demonstrations.jsonl, one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_record(demonstration), ensure_ascii=False) for demonstration in demonstrations]
    (folder / FROZEN).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_frozen(folder: Path, count: int) -> list[Demonstration]:
    """The first `count` demonstrations of a folder that `freeze` wrote.

    Raises:
        ValueError: there is no such file, it has fewer, or a line of it is no demonstration.
    """
    try:
        lines = (folder / FROZEN).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{folder / FROZEN} cannot be read ({error})") from error
    if len(lines) < count:
        raise ValueError(f"{folder / FROZEN} has {len(lines)} demonstrations, {count} are needed")
    demonstrations = []
    for number, line in enumerate(lines[:count], start=1):
        try:
            demonstrations.append(_demonstration(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / FROZEN}, line {number} is no demonstration ({error})") from error
    return demonstrations


def _record(demonstration: Demonstration) -> dict[str, object]:
    """As JSON, without the fields of observations that are empty."""
    seen = [{name: value for name, value in asdict(o).items() if value} for o in demonstration.observations]
    return asdict(demonstration) | {"observations": seen}


def _demonstration(text: str) -> Demonstration:
    record = json.loads(text)
    return Demonstration(
        task=Task(**record["task"]),
        observations=[observation_of(seen) for seen in record["observations"]],
        actions=list(record["actions"]),
        score=float(record["score"]),
    )
