"""How a run fails: for a reason that it knows, or with a traceback that is kept."""

import time
import traceback
from pathlib import Path


class RunError(RuntimeError):
    """The run can't go on. The message says why, what is left, and what to do."""


def keep_traceback(run_dir: Path, error: BaseException, rank: int = 0) -> Path:
    """Append the error's traceback, with the time, to a file in the run's folder; returns its path.

    Raises:
        OSError: the file can't be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / (f"traceback_rank_{rank}.txt" if rank else "traceback.txt")
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        file.write("".join(traceback.format_exception(error)) + "\n")
    return path
