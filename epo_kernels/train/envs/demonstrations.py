"""Demonstrations stored in files, because gold paths take seconds to compute and differ from call to call."""

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
    """`configured`, otherwise $XDG_CACHE_HOME/epo_kernels, otherwise ~/.cache/epo_kernels."""
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epo_kernels"


def borrow_cache(configured: str | None, folder: str) -> str:
    """Fill `folder` with links to the cache's files, and return it: writes there do not change the cache."""
    cache = cache_folder(configured).resolve()
    if cache.is_dir():
        unfinished = shutil.ignore_patterns(".unfinished-*", "*.tmp")  # of other processes, about to disappear
        shutil.copytree(cache, folder, copy_function=os.symlink, ignore=unfinished, dirs_exist_ok=True)
    return folder


def play(environment: Environment, task: Task, actions: list[str]) -> tuple[Demonstration, list[str]]:
    """Play `actions` until the episode ends; returns (demonstration, the environment's answer to each action)."""
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
    """Write `path` atomically, because several processes may share the folder."""
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
    """An observation from its JSON form."""
    return Observation(**record | {"actions": tuple(record.get("actions", ()))})


def read_demonstration(path: Path) -> Demonstration | None:
    """The demonstration in `path`; None if there is none.

    Raises:
        ValueError: the file contains something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return _demonstration(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not contain a demonstration ({error}); delete the file to have it regenerated"
        ) from error


def frozen_folder(name: str) -> Path:
    """The folder of frozen demonstrations called `name`: shipped with the package, or a path."""
    shipped = Path(str(files("epo_kernels.train"))) / "frozen" / name
    return shipped if shipped.is_dir() else Path(name)


def freeze(folder: Path, demonstrations: Sequence[Demonstration]) -> None:
    """Write `folder`/demonstrations.jsonl, one demonstration per line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_record(demonstration), ensure_ascii=False) for demonstration in demonstrations]
    (folder / FROZEN).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_frozen(folder: Path, count: int) -> list[Demonstration]:
    """The first `count` demonstrations of a folder written by `freeze`.

    Raises:
        ValueError: there is no such file, it has too few, or a line is not a demonstration.
    """
    try:
        lines = (folder / FROZEN).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{folder / FROZEN} cannot be read ({error})") from error
    if len(lines) < count:
        raise ValueError(f"{folder / FROZEN} must have at least {count} demonstrations, got {len(lines)}")
    demonstrations = []
    for number, line in enumerate(lines[:count], start=1):
        try:
            demonstrations.append(_demonstration(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / FROZEN}, line {number} is not a demonstration ({error})") from error
    return demonstrations


def _record(demonstration: Demonstration) -> dict[str, object]:
    """As JSON, omitting empty fields of observations."""
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
