"""Which checkpoint a run continues from, and which settings may differ from it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epo_kernels.train.config import ConfigError, TrainConfig, differences, is_among, only_rounding, read_settings
from epo_kernels.train.io.checkpoint import list_checkpoints, load_state, step_of
from epo_kernels.train.io.tracking import read_evaluation, read_json, read_metrics, write_atomically


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run continues from."""

    checkpoint: Path  # its folder
    state: dict[str, Any]  # its trainer.pt
    is_branch: bool  # the checkpoint belongs to another run

    @property
    def step(self) -> int:
        return self.state["step"]


def find_origin(config: TrainConfig) -> Origin | None:
    """The checkpoint to continue from (`find_checkpoint`), read; None: the run starts at the beginning.

    Raises:
        ConfigError: as for `find_checkpoint`; or the checkpoint is damaged.
    """
    checkpoint = find_checkpoint(config)
    if checkpoint is None:
        return None
    return Origin(checkpoint, load_state(checkpoint), is_foreign(checkpoint, Path(config.run_dir)))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, by `resume`: of this run, or of another run that this one branches from.

    A branch that already has a checkpoint continues from it, so that the same command resumes it.

    Raises:
        ConfigError: nothing at the given path; or the run folder contains a run that would be mixed with this one, or
            erased.
    """
    run_dir = Path(config.run_dir)
    present = list_checkpoints(run_dir / "checkpoints")
    last = present[-1] if present else None
    if config.resume == "never":
        if last or (run_dir / "config.yaml").exists():
            raise ConfigError(f"resume=never, but {run_dir} contains a run; choose another run_dir, or resume=auto")
        return None
    if config.resume == "auto":
        _refuse_lost_checkpoints(run_dir, last)
        return last
    path = Path(config.resume)
    is_branch = is_foreign(path, run_dir)
    if is_branch and last and _origin_of(run_dir).get("checkpoint") == str(path.resolve()):
        return last
    if not (path / "trainer.pt").is_file():
        raise ConfigError(
            f"resume must be auto, never or the folder of a checkpoint (global_step_N); {path} has no trainer.pt"
        )
    step_of(path)  # raises if the folder was renamed
    if is_branch and (last or (run_dir / "config.yaml").exists()):
        raise ConfigError(
            f"resume={path} is another run's checkpoint, but {run_dir} already contains a run and their records would "
            "mix; choose another run_dir, or continue the existing run with resume=auto"
        )
    return path


def _refuse_lost_checkpoints(run_dir: Path, last: Path | None) -> None:
    """Raise if a run has records but no checkpoint: starting over would erase them.

    A run saves its first checkpoint before its first record, so the checkpoints were removed.
    """
    if last is None and (read_metrics(run_dir) or read_evaluation(run_dir)):
        raise ConfigError(
            f"run_dir={run_dir} contains the records of a run whose checkpoints were removed, so it cannot be resumed, "
            "and starting over would erase them; choose another run_dir, or delete this one"
        )


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


# These define a checkpoint's weights, so a branch cannot change them.
_OF_THE_WEIGHTS = ("model.name_or_path", "model.lora_rank", "model.lora_alpha", "model.lora_targets")


def review_differences(saved: str, config: TrainConfig, step: int, is_branch: bool) -> list[str]:
    """Check the settings against those a checkpoint was saved with; returns messages about allowed changes.

    A branch may change everything except what defines the weights. A resumed run may change its number of steps, and
    settings that only affect rounding.

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
        if not changed:
            return []
        said = [f"settings of this branch that differ from the run it comes from:\n{_table(changed)}"]
        if config.horizon != config.steps and config.horizon == (read_settings(saved)["schedule_steps"] or steps):
            said.append(
                f"the schedules still span {config.horizon} steps; schedule_steps={config.steps} spans them all"
            )
        return said
    said = []
    if config.steps != steps:
        is_extended = config.steps > steps
        # An extended run may start a different schedule.
        former = changed.pop("schedule_steps")[0] if is_extended and "schedule_steps" in changed else config.horizon
        until_now = f", until now {former}" if former != config.horizon else ""
        said.append(
            f"{'extended' if is_extended else 'shortened'} from {steps} to {config.steps} steps; the schedules span "
            f"{config.horizon}{until_now} (schedule_steps)"
        )
    if not only_rounding(changed, type(config)):
        raise ConfigError(
            "the run to resume had other settings; restore them, or choose another run_dir (with resume=FOLDER of a "
            f"checkpoint, to branch from it)\n{_table(changed)}"
        )
    if changed:
        said.append(
            f"warning: {', '.join(changed)} changed: the same draws are rounded differently, so later steps differ "
            "from an uninterrupted run"
        )
    return said


def _table(changed: dict[str, tuple[Any, Any]]) -> str:
    rows = [("setting", "saved", "now"), *((name, str(old), str(new)) for name, (old, new) in changed.items())]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}" for name, old, new in rows)
