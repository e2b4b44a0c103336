"""Weights & Biases, if enabled by tracking.wandb. metrics.jsonl remains the authoritative record."""

import json
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epo_kernels.train.config import ConfigError, TrackingConfig, TrainConfig, flatten
from epo_kernels.train.io.text import one_line
from epo_kernels.train.io.tracking import read_json, write_atomically

INSTALL = 'pip install --constraint constraints.txt "epo-kernels[wandb]"'
STEP = "training/global_step"  # every curve's x-axis; W&B's own step counts rows
FINISH_TIMEOUT = 60.0  # seconds to wait for uploads at the end of a run; the rest stays in run_dir/wandb


def require_wandb(config: TrackingConfig) -> None:
    """Raise ConfigError if W&B is enabled but not installed, or is online without an API key."""
    if config.wandb != "disabled":
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"tracking.wandb={config.wandb} needs the package wandb; {INSTALL}") from error
        if config.wandb == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "tracking.wandb=online: W&B finds no API key; run `wandb login`, or set WANDB_API_KEY, or use "
                "tracking.wandb=offline"
            )


class WeightsAndBiases:
    """A `Board`: one W&B run per run folder, however many processes work on it. Its id is stored in run_dir/wandb.

    W&B cannot delete rows, so rows of repeated steps that an earlier process already sent are not sent again. The
    values are the same, except where the hardware is not deterministic.

    W&B problems never end a run. If its server is unreachable at the start, the run is stored in run_dir/wandb for a
    later `wandb sync`; if W&B itself fails, the run continues without it. Both are reported through `say`.

    Raises:
        ConfigError: W&B rejects the settings.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._path = run_dir / "wandb" / "sent.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state = read_json(self._path, {})
        self._id: str = state.get("id", uuid.uuid4().hex[:12])
        self._sent: dict[str, int] = state.get("sent", {})  # last step sent, by metric name
        self._keep()
        self._run: Any = self._begin(run_dir, config)
        self._safely(lambda run: run.define_metric("*", step_metric=STEP))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        new = {name: value for name, value in scalars.items() if step > self._sent.get(name, -1)}
        if self._run is not None and new:
            shown = {name: value for name, value in new.items() if math.isfinite(value)}
            self._safely(lambda run: run.log({**shown, STEP: step}))
            self._sent |= dict.fromkeys(new, step)
            self._keep()

    def close(self, failed: bool) -> None:
        self._safely(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _begin(self, run_dir: Path, config: TrainConfig) -> Any:
        import wandb

        tracking = config.tracking
        for mode in dict.fromkeys((tracking.wandb, "offline")):
            try:
                run = wandb.init(
                    mode=mode,
                    project=tracking.wandb_project,
                    entity=tracking.wandb_entity,
                    name=tracking.wandb_name or run_dir.resolve().name,
                    id=self._id,
                    resume="allow",
                    dir=str(run_dir),
                    config=flatten(config),
                    allow_val_change=True,  # some settings may change when a run is resumed
                    settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_TIMEOUT),
                )
            except wandb.errors.UsageError as error:
                raise ConfigError(f"tracking.wandb={tracking.wandb}: {one_line(error)}") from error
            except Exception as error:  # an unreachable server, or a service that does not start
                self._say(f"warning: W&B does not start in mode {mode}: {one_line(error)}")
                wandb.teardown()  # otherwise its service keeps the run's id
                continue
            self._say(f"W&B: kept in {run.dir}; `wandb sync` sends it" if mode == "offline" else f"W&B: {run.url}")
            return run
        return None

    def _safely(self, act: Callable[[Any], object]) -> None:
        if self._run is not None:
            try:
                act(self._run)
            except Exception as error:  # whatever fails in W&B, the run is more important
                self._say(f"warning: W&B failed, and the run continues without it: {one_line(error)}")
                self._run = None

    def _keep(self) -> None:
        write_atomically(self._path, json.dumps({"id": self._id, "sent": self._sent}) + "\n")
