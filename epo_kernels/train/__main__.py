"""python -m epo_kernels.train [preset] [file.yaml ...] [a.b=c ...]"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from epo_kernels.train import missing_packages

if __name__ == "__main__" and (missing := missing_packages()):
    sys.exit(f'error: the driver needs {", ".join(missing)}: pip install "epo-kernels[train]"')

from epo_kernels.train.config import (
    ConfigError,
    TrainConfig,
    describe_settings,
    load_config,
    option_as_setting,
    preset_titles,
    to_yaml,
)
from epo_kernels.train.io.streams import lasting_streams
from epo_kernels.train.io.text import printable

if TYPE_CHECKING:
    from epo_kernels.train.distributed import Ranks
    from epo_kernels.train.parts import Parts

HELP = """usage: python -m epo_kernels.train [PRESET] [FILE.yaml ...] [GROUP.KEY=VALUE ...] [--print-config | --dry-run]

Trains a language-model agent by reinforcement learning in a text environment, with the EPO loss.

A setting comes from the last of these that gives it: the defaults below, the preset, files, the command line.

presets (without one: quickstart):

{presets}

options:

  --print-config   show all settings as they would hold, as YAML, and end
  --dry-run        build everything, play nothing, say what would run
  --help           this text

examples:
  python -m epo_kernels.train practice                       a first look: no Java, two to three minutes
  python -m epo_kernels.train quickstart                     real ScienceWorld on a CPU
  python -m epo_kernels.train quickstart steps=100 loss.penalty=hinge run_dir=runs/hinge
  python -m epo_kernels.train practice algorithm.name=ppo    PPO with a critic; rloo and gigpo as well
  python -m epo_kernels.train practice loss.penalty=none     without EPO's band; loss.entropy_coeff=0: no entropy term
  python -m epo_kernels.train scienceworld_ppo_7b --print-config
  python -m epo_kernels.train my.yaml seed=3 resume=never
  torchrun --nproc-per-node 8 -m epo_kernels.train my.yaml   on all GPUs of a machine (model.fsdp)

a file of your own starts from a preset and holds what differs, say my.yaml:

  preset: quickstart
  run_dir: ~/runs/mine
  optim:
    lr: 1e-4

or from all settings of a preset: python -m epo_kernels.train quickstart --print-config > my.yaml
A file that names no preset takes one from the command line (quickstart my.yaml), or else the defaults.
Values are YAML (true, false, null, [a, b]); ${{oc.env:NAME}} is an environment variable, ~ the home folder.

The folder run_dir receives config.yaml, metrics.jsonl (a line a step), evaluation.json, episodes/ to read,
checkpoints/global_step_N/actor, tensorboard/, report.html, and traceback.txt after an unforeseen error. An
interrupted run goes on where it stopped when the same command is given again (resume=auto), with steps raised too;
resume=FOLDER of a checkpoint rewinds a run, or with another run_dir branches from it under other settings. SIGTERM,
SIGHUP, SIGUSR1 and Ctrl-C stop a run with everything saved; another one more than a second later, at once. A run_dir
belongs to one run at a time.

settings, with their defaults (presets change some; --print-config tells):

"""


@lasting_streams()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done, or stopped by a signal with everything saved; 1 the run failed; 2 wrong settings, or a run_dir that can't be
    used; 130 interrupted by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        presets = "\n".join(f"  {name:<24}{title}" for name, title in preset_titles().items())
        sys.stdout.write(HELP.format(presets=presets) + describe_settings() + "\n")
        return 0
    try:
        config, flags = _parse(words)
        if "--print-config" in flags:
            sys.stdout.write(to_yaml(config))
            return 0
        return _launch(config, dry="--dry-run" in flags)
    except ConfigError as error:
        return _fail(error, 2)


def _parse(words: list[str]) -> tuple[TrainConfig, set[str]]:
    flags = {word for word in words if word.startswith("-")}
    for word in words:
        if word in flags - {"--print-config", "--dry-run"}:
            after = words.index(word) + 1
            raise ConfigError(option_as_setting(word, words[after : after + 1]))
    rest = [word for word in words if not word.startswith("-")]
    sources = [word.removeprefix("preset=") for word in rest if "=" not in word or word.startswith("preset=")]
    overrides = [word for word in rest if "=" in word and not word.startswith("preset=")]
    return load_config(sources or "quickstart", overrides), flags


def _launch(config: TrainConfig, dry: bool) -> int:
    # Imported late: wrong settings and --help answer at once.
    from epo_kernels.train.distributed import launched

    with launched(config.model.fsdp, config.model.device) as ranks:
        return _run(config, dry, ranks)


def _run(config: TrainConfig, dry: bool, ranks: Ranks) -> int:
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from epo_kernels.train.build import build
    from epo_kernels.train.envs import EnvironmentFailure
    from epo_kernels.train.io.failures import RunError
    from epo_kernels.train.io.stopping import Stopped, StopRequest
    from epo_kernels.train.io.tracking import Display
    from epo_kernels.train.rollout.prompts import PromptTooLong
    from epo_kernels.train.trainer import Trainer

    disable_progress_bar()
    keep_freed_memory()
    display = Display(None if ranks.is_first else Console(quiet=True))
    try:
        with StopRequest() as stop, display, build(config, display, dry, stop, ranks) as parts:
            for warning in config.rollout.warnings():
                display.say(f"warning: {warning}")
            if dry:
                display.say(_plan(parts))
                return 0
            display.say(f"{config.steps - parts.step} of {config.steps} steps to do")
            records = Trainer(parts, stop).run()
        display.table(records)
        display.say(f"report: {parts.run_dir / 'report.html'}")
        return 0
    except Stopped as stopped:
        display.say(f"{stopped}; {_remains(config)}")
        return 130 if stopped.signal == signal.SIGINT else 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"{error}; make room first: {_remains(config)}", 1)
        return _fail(_unforeseen(error, config, dry, ranks), 1)
    except (EnvironmentFailure, PromptTooLong, RunError) as error:
        return _fail(error, 1)
    except ConfigError:
        raise
    except Exception as error:
        return _fail(_unforeseen(error, config, dry, ranks), 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted at once; {_remains(config)}", 130)


def _remains(config: TrainConfig) -> str:
    """What is left of a run that ended early."""
    from epo_kernels.train.io.checkpoint import list_checkpoints

    if list_checkpoints(Path(config.run_dir) / "checkpoints"):
        return "the same command goes on from the last checkpoint, which is whole"
    return "there is no checkpoint yet: the same command begins anew"


def _unforeseen(error: Exception, config: TrainConfig, dry: bool, ranks: Ranks) -> str:
    """What to say of an error that nobody expected; its traceback goes to the run's folder, or else to stderr."""
    from epo_kernels.train.io.failures import keep_traceback

    brief = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        if not dry:
            kept = keep_traceback(Path(config.run_dir), error, ranks.rank)
            return f"{brief}; its traceback is in {kept}; {_remains(config)}"
    except OSError:
        pass
    sys.stderr.write("".join(traceback.format_exception(error)))
    return brief


def _fail(reason: object, code: int) -> int:
    sys.stderr.write(f"error: {printable(str(reason))}\n")
    return code


def _plan(parts: Parts) -> str:
    config = parts.config
    algorithm, optim = config.algorithm, config.optim
    return "\n".join(
        [
            f"would run in {config.run_dir}: steps {parts.step + 1} to {config.steps}"
            if parts.step < config.steps
            else f"{config.run_dir} has all its {config.steps} steps already",
            f"a step: {algorithm.groups} groups of {algorithm.group_size}, {algorithm.groups * algorithm.group_size} "
            f"episodes in {config.rollout.environments} environments; {optim.epochs * optim.minibatches} updates",
        ]
    )


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks: activations come and go in megabytes, and mapping them anew halves the speed."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 1 << 30)


def leave(code: int) -> NoReturn:
    """End the process; one of several at once, without the interpreter's own ending.

    DTensor's caches keep the process groups for good, and a thread of theirs that lets go of a tensor while the
    interpreter ends aborts the process: a run that is complete would end with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
