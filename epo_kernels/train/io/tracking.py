"""A run's records: metrics.jsonl, its curves, evaluation.json, versions.json and episodes/."""

import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.tensorboard import SummaryWriter

import epo_kernels as ek
from epo_kernels.train.config import ConfigError
from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.evaluate import Record
from epo_kernels.train.io.text import printable

Value = float | int | list[float | None]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those left incomplete by a kill, a power cut or a full disk."""
    return [entry for entry in _metrics_lines(run_dir) if entry is not None]


def _metrics_lines(run_dir: Path) -> list[dict[str, Any] | None]:
    """Line by line; None: damaged."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [_metrics_line(line) for line in text.split("\n") if line]


def _metrics_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("training/global_step"), int) else None


def read_evaluation(run_dir: Path) -> list[Record]:
    return [Record(**entry) for entry in read_json(run_dir / "evaluation.json", [])]


def read_episodes(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The episodes saved by `Tracker.save_episodes` under that name, as plain data; [] if there are none."""
    path = run_dir / "episodes" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="ascii").split("\n")[:-1]] if path.exists() else []


def read_versions(run_dir: Path) -> list[dict[str, Any]]:
    """The software versions of a run: one entry per process that worked on it."""
    return read_json(run_dir / "versions.json", [])


def read_json(path: Path, missing: Any) -> Any:
    """The contents of the file, or `missing` if it does not exist.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.exists():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or remove it to continue without its contents"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace the file completely or, after a kill or a power cut, leave the old one."""
    temporary = path.with_name(f".writing_{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Board(Protocol):
    """Displays numbers as curves."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in run_dir/tensorboard; events after `step` are hidden."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class Tracker:
    """Writes a run's records.

    Args:
        step: the step the run continues from; records of later steps by an earlier process are dropped, because these
            steps are repeated.
        boards: further boards besides TensorBoard; closed with the tracker.

    Attributes:
        lost: steps up to `step` without a line in metrics.jsonl, if some of its lines were damaged.
    """

    def __init__(self, run_dir: Path, step: int, *boards: Board) -> None:
        self._run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "episodes").mkdir(exist_ok=True)
        found = _metrics_lines(run_dir)
        lines = [entry for entry in found if entry is not None and entry["training/global_step"] <= step]
        numbers = [entry["training/global_step"] for entry in lines]
        first = min(numbers, default=1)
        self.lost = sorted({*range(first, step + 1)} - {*numbers}) if None in found else []
        write_atomically(run_dir / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in lines))
        versions = [entry for entry in read_versions(run_dir) if entry["from_step"] <= step]
        write_atomically(
            run_dir / "versions.json", json.dumps([*versions, {"from_step": step, **_versions()}], indent=1) + "\n"
        )
        evaluated = read_evaluation(run_dir)
        self._records = [record for record in evaluated if record.step <= step]
        self._drop_later(step, evaluated)
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._boards: list[Board] = [TensorBoard(run_dir, step), *boards]

    @property
    def records(self) -> list[Record]:
        return list(self._records)

    def log(self, step: int, metrics: dict[str, Value]) -> None:
        """Write one line of metrics.jsonl; scalars, and list entries one by one, also go to the boards.

        Non-finite values become null in the file, because JSON has no NaN.
        """
        line = {
            name: None if value in (math.inf, -math.inf) or value != value else value for name, value in metrics.items()
        }
        self._metrics.write(json.dumps({"training/global_step": step, **line}, allow_nan=False) + "\n")
        self._metrics.flush()
        os.fsync(self._metrics.fileno())  # before the checkpoint that relies on it
        self._show(step, dict(pair for name, value in metrics.items() for pair in _scalars(name, value)))

    def extend(self, steps: int) -> None:
        """After the run was extended to `steps`, relabel an earlier "after" evaluation as an intermediate one."""
        names = {record.name for record in self._records}
        for former in [record for record in self._records if record.when == "after" and record.step < steps]:
            between = replace(former, when=f"step {former.step}")
            for path in (self._run_dir / "episodes").glob(f"{former.name}.*"):
                os.replace(path, path.with_name(f"{between.name}{path.suffix}"))
            place = self._records.index(former)
            self._records[place : place + 1] = [] if between.name in names else [between]
            self._write_records()

    def log_evaluation(self, records: Sequence[Record]) -> None:
        self._records += records
        self._write_records()
        for record in records:
            names = ("mean_score", "success", "official_success")
            place = f"evaluation/{record.panel}/{record.decoding}"
            self._show(record.step, {f"{place}/{name}": getattr(record, name) for name in names})

    def save_episodes(self, name: str, episodes: Sequence[Episode]) -> None:
        """`episodes`/name.txt for reading, and name.jsonl as data. `name` never comes from outside the program."""
        folder = self._run_dir / "episodes"
        text = "\n\n".join(episode_text(episode) for episode in episodes)
        write_atomically(folder / f"{name}.txt", text + "\n")
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(_plain(e)) + "\n" for e in episodes))

    def close(self, failed: bool = False) -> None:
        """`failed` tells boards that the run ended with an error."""
        self._metrics.close()
        for board in self._boards:
            board.close(failed)

    def _write_records(self) -> None:
        entries = [asdict(record) for record in self._records]
        write_atomically(self._run_dir / "evaluation.json", json.dumps(entries, indent=1) + "\n")

    def _drop_later(self, step: int, evaluated: Sequence[Record]) -> None:
        """Remove evaluations and episodes recorded after `step`."""
        if len(self._records) < len(evaluated):
            self._write_records()
        stale = {record.name for record in evaluated if record.step > step}
        for path in (self._run_dir / "episodes").iterdir():
            played = re.fullmatch(r"train_step_(\d+)", path.stem)
            if path.stem in stale or (played and int(played[1]) > step):
                path.unlink()

    def _show(self, step: int, scalars: Mapping[str, float]) -> None:
        for board in self._boards:
            board.add(step, scalars)


def episode_text(episode: Episode) -> str:
    """An episode as readable text: observations, actions and rewards; unprintable characters are escaped."""
    outcome = "success" if episode.success else "no success"
    head = f"# {episode.task.name}, variation {episode.task.variation}: score {episode.score:g}, {outcome}"
    lines = [f"{head}, return {episode.total_reward:.3f}, {episode.finish}"]
    if episode.turns:
        lines.append(episode.turns[0].observation.goal)
    for number, turn in enumerate(episode.turns, 1):
        lines += [part for part in (turn.observation.text, turn.observation.scene) if part]
        lines.append(f"[{number}] > {turn.action}  ({turn.reward:+.3f}{'' if turn.valid else ', not understood'})")
        if not turn.valid or turn.response.strip() != turn.action:
            lines.append(f"    response ({_size(turn)}): {json.dumps(turn.response, ensure_ascii=False)}")
    return printable("\n".join(lines))


def _size(turn: Turn) -> str:
    cut = ", cut at rollout.max_response_tokens" if turn.finish == "length" else ""
    return f"{len(turn.response_ids)} tokens{cut}"


def _plain(episode: Episode) -> dict[str, Any]:
    return {
        "task": asdict(episode.task),
        "seed": episode.seed,
        "goal": episode.turns[0].observation.goal if episode.turns else "",
        "score": episode.score,
        "success": episode.success,
        "official_success": episode.official_success,
        "return": episode.total_reward,
        "finish": episode.finish,
        "failed": episode.failed,
        "turns": [
            {
                "observation": turn.observation.text,
                "scene": turn.observation.scene,
                "response": turn.response,
                "response_tokens": len(turn.response_ids),
                "finish_reason": turn.finish,
                "action": turn.action,
                "reward": turn.reward,
                "valid": turn.valid,
            }
            for turn in episode.turns
        ],
        "last_answer": episode.turns[-1].result if episode.turns else "",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("epo-kernels", "torch", "transformers", "triton", "numpy", "scienceworld"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an optional package that is not installed
    found["backends"] = ", ".join(name for name, hindrance in ek.available_backends().items() if hindrance is None)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return found


def _scalars(name: str, value: Value) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):
        yield from ((f"{name}/{i:02d}", number) for i, number in enumerate(value) if number is not None)
    else:
        yield name, value
