"""Checkpoints: `global_step_N/actor` as save_pretrained writes it, beside the trainer's state. Whole or not there."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from epo_kernels.train.config import ConfigError, TrainConfig, differences
from epo_kernels.train.policies.policy import Policy

_NAME = re.compile(r"global_step_(\d+)")


def save_checkpoint(folder: Path, step: int, policy: Policy, state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/global_step_N under another name, rename it, then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"global_step_{step}"
    temporary = folder / f".writing_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.save(temporary / "actor")
        torch.save(state, temporary / "trainer.pt")
        for path in temporary.rglob("*"):
            _flush(path)
        if final.exists():  # left by a run that was stopped before it could tell
            shutil.rmtree(final)
        os.rename(temporary, final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in [path for path in list_checkpoints(folder)[:-keep] if path != final]:
        shutil.rmtree(old)
    return final


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Remove checkpoints of steps after `step`: a run that goes on from there makes these steps again."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def clear_run(run_dir: Path) -> None:
    """Remove the records of a run that left no checkpoint to go on from: they aren't those of the run that begins."""
    for name in ("metrics.jsonl", "evaluation.json", "report.html"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("episodes", "reference", "tensorboard"):
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
    """The trainer's state, as plain tensors and numbers: nothing in the file can run code."""
    return torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, by `resume`.

    Raises:
        ConfigError: nothing at the path given; or resume=never and the folder holds a run.
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
    return path


def refuse_differences(saved: str, config: TrainConfig) -> None:
    """Raises ConfigError where the run to go on with had other settings."""
    changed = differences(saved, config)
    if changed:
        raise ConfigError(
            "the run to resume had other settings: "
            + ", ".join(f"{name}={old} (now {new})" for name, (old, new) in changed.items())
            + "; restore them, or choose another run_dir"
        )


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
