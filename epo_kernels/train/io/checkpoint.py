"""Checkpoints: `global_step_N/actor` as save_pretrained writes it, beside the trainer's state. Whole or not there."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epo_kernels.train.config import ConfigError, TrainConfig, differences, is_among, only_rounding, read_settings
from epo_kernels.train.io.failures import RunError
from epo_kernels.train.io.tracking import read_json, write_atomically
from epo_kernels.train.models.policy import Policy

_NAME = re.compile(r"global_step_(\d+)")
_UNFINISHED = ".writing_"


class SaveError(RunError):
    """A checkpoint could not be written. The message says what is still whole, and how to go on."""


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    state: dict[str, Any],
    keep: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `folder`/global_step_N under another name, rename it, then drop all but the last `keep`.

    A checkpoint of this step that is there already is left as it is. `weights` stand in for those of a model that is
    split over ranks.

    Raises:
        SaveError: nothing was saved, and nothing that was there before is lost.
    """
    final = folder / f"global_step_{step}"
    if final.exists():
        return final
    temporary = folder / f"{_UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed while it saved
            shutil.rmtree(left)
        policy.save(temporary / "actor", weights)
        torch.save(state, temporary / "trainer.pt")
        for path in temporary.rglob("*"):
            _flush(path)
        os.rename(temporary, final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(_save_failed(folder, step, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [path for path in list_checkpoints(folder)[:-keep] if path != final]:
        shutil.rmtree(old)
    return final


def room_warning(folder: Path, trained: int, other: int, keep: int) -> str | None:
    """A warning if the disk is too small for a run's checkpoints.

    Args:
        trained: number of parameters saved with AdamW's two moments, four bytes each.
        other: number of parameters saved without.
        keep: checkpoint.keep; the newest is written before the oldest goes.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    size = 12 * trained + 4 * other
    if free + there >= (keep + 1) * size:
        return None
    return (
        f"{folder} has {free / 1e9:,.2f} GB free but needs room for {keep + 1} checkpoints (checkpoint.keep + 1) of "
        f"about {size / 1e9:,.2f} GB; make room, or lower checkpoint.keep"
    )


def _save_failed(folder: Path, step: int, error: Exception) -> str:
    present = list_checkpoints(folder)
    reason = " ".join(str(error).split()) or type(error).__name__
    size = sum(path.stat().st_size for path in present[-1].rglob("*") if path.is_file()) if present else 0
    rest = (
        f"{present[-1]} is whole. Make room (a checkpoint takes {size / 1e6:,.0f} MB, and one more than "
        "checkpoint.keep must fit), then give the same command again"
        if present
        else "there is no earlier one. Make room, or choose a run_dir on another disk, and begin again"
    )
    return f"the checkpoint of step {step} could not be written to {folder} ({reason}); {rest}"


def copy_records(run_dir: Path, to: Path) -> Path:
    """What a run has told so far, for a process that only reads it; returns `to`."""
    for name in ("metrics.jsonl", "evaluation.json"):
        if (run_dir / name).is_file():
            shutil.copy(run_dir / name, to / name)
    return to


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Remove checkpoints of steps after `step`: a run that goes on from there makes these steps again."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def clear_run(run_dir: Path) -> None:
    """Remove the records of a run that left no checkpoint to go on from: they aren't those of the run that begins."""
    for name in ("metrics.jsonl", "evaluation.json", "versions.json", "branch.json", "report.html", "traceback.txt"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("episodes", "reference", "tensorboard", "wandb"):
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is no checkpoint; a checkpoint's folder is called global_step_N")
    return int(match.group(1))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state, as plain tensors and numbers: nothing in the file can run code.

    Tensors stay in the file until they are used: each of several processes needs but a part of them.

    Raises:
        ConfigError: the file holds something else, or is damaged.
    """
    path = checkpoint / "trainer.pt"
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(
            f"{path} is not read, since it is damaged or holds more than plain tensors and numbers (weights_only): "
            f"{' '.join(str(error).split())[:200]}; go on from another checkpoint with resume=FOLDER"
        ) from error


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, by `resume`: of this run, or one of another run that this one branches from.

    A branch that has a checkpoint of its own goes on from there, so that the same command resumes it.

    Raises:
        ConfigError: nothing at the path given; or the run folder holds a run that this one would be mixed with.
    """
    run_dir = Path(config.run_dir)
    present = list_checkpoints(run_dir / "checkpoints")
    last = present[-1] if present else None
    if config.resume == "never":
        if last or (run_dir / "config.yaml").exists():
            raise ConfigError(f"resume=never, but {run_dir} holds a run; choose another run_dir, or resume=auto")
        return None
    if config.resume == "auto":
        return last
    path = Path(config.resume)
    is_branch = is_foreign(path, run_dir)
    if is_branch and last and _origin_of(run_dir).get("checkpoint") == str(path.resolve()):
        return last
    if not (path / "trainer.pt").is_file():
        raise ConfigError(
            f"resume must be auto, never or the folder of a checkpoint (global_step_N); {path} has no trainer.pt"
        )
    step_of(path)
    if is_branch and (last or (run_dir / "config.yaml").exists()):
        raise ConfigError(
            f"resume={path} is another run's checkpoint, but {run_dir} holds a run already and their records would "
            "mix; choose another run_dir, or go on with the run that is there by resume=auto"
        )
    return path


def is_foreign(checkpoint: Path, run_dir: Path) -> bool:
    """Whether the checkpoint is another run's, so that continuing from it in `run_dir` creates a branch."""
    return checkpoint.resolve().parent != (run_dir / "checkpoints").resolve()


def note_branch(run_dir: Path, checkpoint: Path) -> None:
    """Record in branch.json which checkpoint a run branches from."""
    origin = {"checkpoint": str(checkpoint.resolve()), "step": step_of(checkpoint)}
    write_atomically(run_dir / "branch.json", json.dumps(origin, indent=1) + "\n")


def start_of(run_dir: Path) -> int:
    """The step a run started from: 0, or for a branch the step of its checkpoint."""
    return int(_origin_of(run_dir).get("step", 0))


def _origin_of(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / "branch.json", {})


def keep_horizon(saved: str, config: TrainConfig) -> TrainConfig:
    """The configuration with the saved schedule horizon, unless it sets its own."""
    before = read_settings(saved)
    if config.schedule_steps or (before["schedule_steps"] is None and before["steps"] == config.steps):
        return config
    return replace(config, schedule_steps=before["schedule_steps"] or before["steps"] or None)


# These define a checkpoint's weights: a branch can't change them.
_OF_THE_WEIGHTS = ("model.name_or_path", "model.lora_rank", "model.lora_alpha", "model.lora_targets")


def review_differences(saved: str, config: TrainConfig, step: int, is_branch: bool) -> list[str]:
    """Check the settings against those a checkpoint was saved with; returns messages about allowed changes.

    A branch may change everything except what defines the weights. A resumed run may change its number of steps, and
    settings that only affect rounding.

    Args:
        step: of the checkpoint.

    Raises:
        ConfigError: other settings changed (with a table of them), or `steps` is below `step`.
    """
    changed, steps = differences(saved, config), read_settings(saved)["steps"]
    if config.steps < step:
        raise ConfigError(
            f"steps={config.steps}, but the checkpoint is from step {step}; raise steps, or resume an earlier "
            "checkpoint with resume=FOLDER"
        )
    if is_branch:
        if fixed := {name: pair for name, pair in changed.items() if is_among(name, _OF_THE_WEIGHTS)}:
            raise ConfigError(f"the checkpoint's weights were made with other settings; restore them\n{_table(fixed)}")
        if steps != config.steps:
            changed = {"steps": (steps, config.steps), **changed}
        return (
            [f"settings of this branch that differ from the run it comes from:\n{_table(changed)}"] if changed else []
        )
    said = []
    if config.steps != steps:
        is_extended = config.steps > steps
        # An extended run may begin another schedule.
        former = changed.pop("schedule_steps")[0] if is_extended and "schedule_steps" in changed else config.horizon
        until_now = f", until now {former}" if former != config.horizon else ""
        said.append(
            f"{'extended' if is_extended else 'shortened'} from {steps} to {config.steps} steps; the schedules span "
            f"{config.horizon}{until_now} (schedule_steps)"
        )
    if not only_rounding(changed):
        raise ConfigError(
            "the run to resume had other settings; restore them, or choose another run_dir (with resume=FOLDER of a "
            f"checkpoint, to branch from it)\n{_table(changed)}"
        )
    if changed:
        said.append(
            f"warning: {', '.join(changed)} changed: the same draws are rounded otherwise, so later steps differ from "
            "those of a run never stopped"
        )
    return said


def _table(changed: dict[str, tuple[Any, Any]]) -> str:
    rows = [("setting", "saved", "now"), *((name, str(old), str(new)) for name, (old, new) in changed.items())]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows)


def rng_state() -> dict[str, Any]:
    """Torch's generators (dropout); everything else draws from generators seeded by step and episode."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: Path) -> None:
    """Onto the disk, so that the rename never shows a checkpoint whose bytes a power cut took."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
