"""Checkpoints: `global_step_N/actor` as save_pretrained writes it, beside the trainer's state. Whole or not there."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epo_kernels.train.config import ConfigError, TrainConfig, differences, only_rounding
from epo_kernels.train.policies.policy import Policy

_NAME = re.compile(r"global_step_(\d+)")
_UNFINISHED = ".writing_"


class SaveError(RuntimeError):
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
    for name in ("metrics.jsonl", "evaluation.json", "versions.json", "report.html"):
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
    """The checkpoint to go on from, by `resume`.

    Raises:
        ConfigError: nothing at the path given; or the run folder holds a run that this one would be mixed with.
    """
    run_dir = Path(config.run_dir)
    if config.resume == "never":
        if (run_dir / "config.yaml").exists():
            raise ConfigError(f"resume=never, but {run_dir} holds a run; choose another run_dir, or resume=auto")
        return None
    if config.resume == "auto":
        present = list_checkpoints(run_dir / "checkpoints")
        return present[-1] if present else None
    path = Path(config.resume)
    if not (path / "trainer.pt").is_file():
        raise ConfigError(
            f"resume must be auto, never or the folder of a checkpoint (global_step_N); {path} has no trainer.pt"
        )
    step_of(path)
    is_foreign = path.resolve().parent != (run_dir / "checkpoints").resolve()
    if is_foreign and (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"resume={path} is another run's checkpoint, but {run_dir} holds a run already and their records would "
            "mix; choose another run_dir, or go on with the run that is there by resume=auto"
        )
    return path


def refuse_differences(saved: str, config: TrainConfig) -> list[str]:
    """Names of settings that differ and round otherwise, but compute the same (they may be changed).

    Raises:
        ConfigError: the run to go on with had other settings, as a table.
    """
    changed = differences(saved, config)
    if only_rounding(changed):
        return list(changed)
    rows = [("setting", "saved", "now"), *((name, str(old), str(new)) for name, (old, new) in changed.items())]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    table = "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows)
    raise ConfigError(f"the run to resume had other settings; restore them, or choose another run_dir\n{table}")


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
