"""How a run fails: with a known reason, or with a traceback that is saved."""

import time
import traceback
from pathlib import Path

LOCK = "run.lock"  # in a run's folder: who uses it now; empty, that the folder is a run's


class RunError(RuntimeError):
    """The run cannot continue. The message gives the reason, what is intact, and what to do."""


class PromptTooLong(ValueError):
    """A task's goal alone exceeds rollout.max_prompt_tokens."""


def keep_traceback(run_dir: Path, error: BaseException, rank: int = 0) -> Path:
    """Append the error's traceback, with the time, to a file in the run's folder; returns its path.

    A folder that has nothing else is marked as a run's (`LOCK`), so that the same command can start over there.

    Raises:
        OSError: the file cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if all(path.name.startswith("traceback") for path in run_dir.iterdir()):  # another rank's may be there
        (run_dir / LOCK).touch()
    path = run_dir / (f"traceback_rank_{rank}.txt" if rank else "traceback.txt")
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        file.write("".join(traceback.format_exception(error)) + "\n")
    return path
