"""Demonstrations frozen to files: gold paths cost seconds and differ from call to call."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epo_kernels.train.envs.base import Demonstration, Environment, Observation, Task


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
        record = json.loads(text)
        return Demonstration(
            task=Task(**record["task"]),
            observations=[observation_of(seen) for seen in record["observations"]],
            actions=list(record["actions"]),
            score=float(record["score"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no demonstration ({error}); delete the file, and it is written again"
        ) from error
