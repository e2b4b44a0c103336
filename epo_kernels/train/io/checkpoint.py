"""Checkpoints: `global_step_N/actor` in the format of save_pretrained, and trainer.pt. Each is complete or absent."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epo_kernels.train.config import ConfigError
from epo_kernels.train.io.failures import RunError
from epo_kernels.train.io.text import one_line

_NAME = re.compile(r"global_step_(\d+)")
_UNFINISHED = ".writing_"


class SaveError(RunError):
    """A checkpoint could not be written. The message says what is intact and how to continue."""


def save_checkpoint(
    folder: Path, step: int, save_policy: Callable[[Path], None], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder`/global_step_N under a temporary name, rename it, then remove all but the last `keep`.

    An existing checkpoint of this step is left unchanged.

    Args:
        save_policy: writes the policy into the folder it is given.
        state: the rest, for trainer.pt: plain tensors and numbers.

    Raises:
        SaveError: nothing was saved, and no earlier checkpoint was lost.
    """
    final = folder / f"global_step_{step}"
    if final.exists():
        return final
    temporary = folder / f"{_UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):  # from a process that was killed while saving or removing
            shutil.rmtree(left, ignore_errors=left != temporary)
        save_policy(temporary / "actor")
        torch.save(state, temporary / "trainer.pt")
        for path in temporary.rglob("*"):
            _flush(path)
        os.rename(temporary, final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk can raise any of them
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(_save_failed(folder, step, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [path for path in list_checkpoints(folder)[:-keep] if path != final]:
        with suppress(OSError):  # the new checkpoint is saved; the next save tries again
            _remove(old)
    return final


def room_warning(folder: Path, trained: int, other: int, keep: int) -> str | None:
    """A warning if the disk is too small for a run's checkpoints.

    Args:
        trained: number of parameters saved together with AdamW's two moments, four bytes each.
        other: number of parameters saved alone.
        keep: checkpoint.keep; the newest is written before the oldest is removed.
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
    size = sum(path.stat().st_size for path in present[-1].rglob("*") if path.is_file()) if present else 0
    rest = (
        f"{present[-1]} is whole. Make room (a checkpoint takes {size / 1e6:,.0f} MB, and one more than "
        "checkpoint.keep must fit), then give the same command again"
        if present
        else "there is no earlier one. Make room, or choose a run_dir on another disk, and begin again"
    )
    return f"the checkpoint of step {step} could not be written to {folder} ({one_line(error)}); {rest}"


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Remove checkpoints after `step`: a run that continues from there repeats those steps."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; if that is interrupted, what remains does not count as one, and the next save removes it."""
    doomed = checkpoint.with_name(f"{_UNFINISHED}{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not a checkpoint; a checkpoint's folder is called global_step_N")
    return int(match.group(1))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state, as plain tensors and numbers: the file cannot execute code.

    Tensors are memory-mapped until they are used, because each of several processes needs only part of them.

    Raises:
        ConfigError: the file contains something else, or is damaged.
    """
    path = checkpoint / "trainer.pt"
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be loaded: it is damaged or contains more than plain tensors and numbers (weights_only): "
            f"{one_line(error, 200)}; continue from another checkpoint with resume=FOLDER"
        ) from error


def rng_state() -> dict[str, Any]:
    """State of torch's generators (dropout); all other draws use generators seeded by step and episode."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: Path) -> None:
    """Sync to disk, so that a rename never exposes a checkpoint whose bytes a power cut lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
