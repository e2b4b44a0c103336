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
from epo_kernels.train.io.text import one_line, printable

if TYPE_CHECKING:
    from epo_kernels.train.distributed import Ranks
    from epo_kernels.train.parts import Parts

HELP = """usage: python -m epo_kernels.train [PRESET] [FILE.yaml ...] [GROUP.KEY=VALUE ...] [OPTION]

Train a language-model agent with reinforcement learning in a text environment, using the EPO loss.

Settings are read in this order, and later ones win: defaults, preset, files, command line.

presets (default: quickstart):

{presets}

options:

  --print-config   print the resulting settings as YAML and exit
  --dry-run        build everything, print what would run, and exit
  --plan           print the memory each GPU needs, from the settings alone, and exit, with status 2 if it does not
                   fit. --gpus N and --gpu-memory GB describe the machine (default: this one's GPUs, else 1 of 80 GB);
                   --gpu-tflops T, the speed your GPU sustains, adds tokens per second
  --help           print this help and exit

examples:
  python -m epo_kernels.train practice                       a first look: no Java, two to three minutes
  python -m epo_kernels.train quickstart                     ScienceWorld on a CPU
  python -m epo_kernels.train quickstart steps=100 run_dir=runs/long
  python -m epo_kernels.train practice algorithm.name=ppo    PPO with a critic; also rloo and gigpo
  python -m epo_kernels.train practice loss.penalty=none     without EPO's entropy band
  python -m epo_kernels.train practice loss.penalty=none loss.entropy_coeff=0     without any entropy term
  python -m epo_kernels.train scienceworld_ppo_7b --print-config
  python -m epo_kernels.train scienceworld_ppo_7b --plan --gpus 8 --gpu-memory 80
  python -m epo_kernels.train my.yaml seed=3 resume=never
  torchrun --nproc-per-node 8 -m epo_kernels.train my.yaml   on all GPUs of a machine (model.fsdp)

A settings file names the preset it starts from and what it changes:

  preset: quickstart
  run_dir: ~/runs/mine
  optim:
    lr: 1e-4

To start from a file with all settings: python -m epo_kernels.train quickstart --print-config > my.yaml
A file without a preset starts from the one on the command line (quickstart my.yaml), or from the defaults.
Values are YAML (true, false, null, [a, b]). ${{oc.env:NAME}} reads an environment variable; a leading ~ is the home
folder.

Output in run_dir: config.yaml, metrics.jsonl (one line per step), evaluation.json, episodes/ (readable transcripts),
checkpoints/global_step_N/actor, tensorboard/, report.html, and traceback.txt after an unexpected error.

To resume an interrupted run, repeat its command (resume=auto). To extend a finished one, raise steps.
resume=CHECKPOINT_FOLDER rewinds a run to that checkpoint; with a different run_dir it branches off a new run, whose
settings may differ. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save everything and stop; a second signal more than a second
later stops at once. Only one run at a time can use a run_dir.

settings and their defaults (presets change some; see --print-config):

"""


@lasting_streams()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: finished, or stopped by a signal with everything saved. 1: the run failed. 2: invalid settings, a run_dir that
    cannot be used, or a plan that does not fit. 130: interrupted by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        presets = "\n".join(f"  {name:<24}{title}" for name, title in preset_titles().items())
        named = [word.removeprefix("env.name=") for word in words if word.startswith("env.name=")]
        try:
            settings = describe_settings(*named[-1:])
        except (ImportError, ValueError) as error:
            return _fail(error, 2)
        sys.stdout.write(HELP.format(presets=presets) + settings + "\n")
        return 0
    try:
        if "--plan" in words:
            return _plan_memory(words)
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


def _plan_memory(words: list[str]) -> int:
    from epo_kernels.train.plan.command import describe, take_options

    options, rest = take_options(words)
    config, _ = _parse(rest)
    text, refusal = describe(config, options)
    sys.stdout.write(text)
    return _fail(refusal, 2) if refusal else 0


def _launch(config: TrainConfig, dry: bool) -> int:
    # Imported late, so that --help and settings errors appear immediately.
    from epo_kernels.train.distributed import launched
    from epo_kernels.train.models.attention import require_attention
    from epo_kernels.train.models.policy import resolve_device

    require_attention(config.model, resolve_device(config.model.device))
    with launched(config.model.fsdp, config.model.device) as ranks:
        return _run(config, dry, ranks)


def _run(config: TrainConfig, dry: bool, ranks: Ranks) -> int:
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from epo_kernels.train.build import build
    from epo_kernels.train.envs import EnvironmentFailure
    from epo_kernels.train.io.display import Display
    from epo_kernels.train.io.failures import PromptTooLong, RunError
    from epo_kernels.train.io.stopping import Stopped, StopRequest
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
            return _fail(f"{error}; make room first; {_remains(config)}", 1)
        return _fail(_unforeseen(error, config, dry, ranks), 1)
    except PromptTooLong as error:  # resuming takes no other limit, a branch does
        branch = f"; then continue with run_dir=ANOTHER resume={kept[-1]}" if (kept := _checkpoints(config)) else ""
        return _fail(f"{error}{branch}", 1)
    except (EnvironmentFailure, RunError) as error:
        return _fail(error, 1)
    except ConfigError:
        raise
    except Exception as error:
        return _fail(_unforeseen(error, config, dry, ranks), 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted at once; {_remains(config)}", 130)


def _remains(config: TrainConfig) -> str:
    """How to continue a run that ended early."""
    if _checkpoints(config):
        return "repeat the command to resume from the last checkpoint"
    return "there is no checkpoint yet, so repeating the command starts over"


def _checkpoints(config: TrainConfig) -> list[Path]:
    from epo_kernels.train.io.checkpoint import list_checkpoints

    return list_checkpoints(Path(config.run_dir) / "checkpoints")


def _unforeseen(error: Exception, config: TrainConfig, dry: bool, ranks: Ranks) -> str:
    """The message for an unexpected error; writes its traceback to run_dir, or to stderr where that fails."""
    from epo_kernels.train.distributed import is_lost_rank
    from epo_kernels.train.io.failures import keep_traceback

    brief = f"{type(error).__name__}: {one_line(error, 300)}"
    if ranks.size > 1 and is_lost_rank(error):
        brief = f"rank {ranks.rank} lost another rank, which ended or hangs: its output says why ({brief})"
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
    config, algorithm, optim = parts.config, parts.config.algorithm, parts.config.optim
    if parts.step >= config.steps:
        todo = f"{config.run_dir} has all its {config.steps} steps already"
    else:
        todo = f"would run in {config.run_dir}: steps {parts.step + 1} to {config.steps}"
    return (
        f"{todo}\na step: {algorithm.groups} groups of {algorithm.group_size}, "
        f"{algorithm.groups * algorithm.group_size} episodes in {config.rollout.environments} environments; "
        f"{optim.epochs * optim.minibatches} updates"
    )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: mapping every new activation, megabytes each, would halve the speed."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 1 << 30)


def leave(code: int) -> NoReturn:
    """Exit the process; under torchrun, without interpreter shutdown.

    DTensor's caches keep process groups alive. If one of their threads releases a tensor during interpreter shutdown,
    the process aborts, and a finished run would exit with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
