"""The run's folder: checked before anything is computed, and locked by one process at a time."""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import yaml

from epo_kernels.train.config import ConfigError
from epo_kernels.train.io.checkpoint import list_checkpoints
from epo_kernels.train.io.failures import LOCK

HEARTBEAT = 5.0  # seconds between heartbeats of the lock's holder
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "evaluation.json",
    "versions.json",
    "branch.json",
    "report.html",
    "traceback.txt",
)
FOLDERS = ("base", "checkpoints", "episodes", "nonfinite", "reference", "start", "tensorboard", "wandb")


@dataclass(frozen=True)
class Holder:
    """The process that uses a run's folder, as run.lock names it."""

    host: str
    process: int
    since: str  # ISO 8601, UTC

    @classmethod
    def this(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


def check_usable(run_dir: Path) -> None:
    """Check, without writing anything, that the folder can hold a run.

    Raises:
        ConfigError: it is not a folder, is not writable, or contains another program's files.
    """
    with _explained(run_dir):
        nearest = next(path for path in (run_dir, *run_dir.parents) if os.path.lexists(path))
        _check_folder(nearest)
        _refuse_foreign(run_dir)
        for name in FOLDERS:
            if os.path.lexists(run_dir / name):
                _check_folder(run_dir / name)
        for name in FILES:
            if (run_dir / name).is_dir():
                raise IsADirectoryError(f"{run_dir / name} is a folder, but the run writes a file of that name")


@contextmanager
def held(run_dir: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Create the folder if necessary, and lock it against other processes inside the `with`.

    The lock is an flock on run_dir/run.lock, which the system releases when its holder dies; the file names the holder.
    If the holder is on another host, or the filesystem has no flock, the lock may be held without being visible. Such a
    holder touches the file every HEARTBEAT seconds, so it counts as dead after three heartbeats are missed.

    Args:
        say: receives a line before waiting for a heartbeat, and one when a lock is taken over.

    Raises:
        ConfigError: another process holds the lock (the message names it); or as for `check_usable`.
    """
    check_usable(run_dir)
    is_new = not run_dir.exists()
    try:
        with _explained(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            file = _acquire(run_dir / LOCK, say)
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(file.fileno(), ended), name="run-lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _release(file, run_dir)
    finally:
        if is_new:
            with suppress(OSError):  # the folder now contains a run
                run_dir.rmdir()


def clear_records(run_dir: Path) -> None:
    """Remove the records of an earlier run that has no checkpoint to continue from."""
    for name in FILES:
        if name != "config.yaml":
            (run_dir / name).unlink(missing_ok=True)
    for name in ("episodes", "reference", "tensorboard", "wandb"):
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)


def copy_records(run_dir: Path, to: Path) -> Path:
    """Copy a run's metrics and evaluations, for a process that only reads them; returns `to`."""
    for name in ("metrics.jsonl", "evaluation.json"):
        if (run_dir / name).is_file():
            shutil.copy(run_dir / name, to / name)
    return to


def _acquire(path: Path, say: Callable[[str], None]) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    os.register_at_fork(after_in_child=file.close)  # a child must not keep its dead parent's lock
    is_reliable = _flock(file)
    former = _read(file)
    if is_reliable is None:
        file.close()
        raise _in_use(path, former)
    if former and (former.host != socket.gethostname() or not is_reliable):
        say(f"{path} names {former}; waiting {3 * HEARTBEAT:.0f} s to see whether it is still running")
        if _beats(path):
            file.close()
            raise _in_use(path, former)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()  # its holder removed it in the meantime
        return _acquire(path, say)
    if former:
        say(f"{path.parent}: took over from {former}, which ended without releasing it")
    try:
        file.truncate(0)
        file.write(json.dumps(asdict(Holder.this())) + "\n")
        file.flush()
    except OSError:
        _release(file, path.parent)
        raise
    return file


def _release(file: IO[str], run_dir: Path) -> None:
    with suppress(OSError):  # a full disk, or a folder that was removed
        if _records(run_dir) and not _is_run(run_dir):
            file.truncate(0)  # the empty file still marks the folder as a run's
        else:
            (run_dir / LOCK).unlink()
    with suppress(OSError):
        file.close()


def _flock(file: IO[str]) -> bool | None:
    """True: locked. None: another process has the lock. False: this filesystem has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some network filesystems
        return None
    except OSError:
        return False
    return True


def _read(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _in_use(path: Path, holder: Holder | None) -> ConfigError:
    return ConfigError(
        f"run_dir={path.parent} is in use by {holder or 'another process'}: two runs would mix their records. Choose "
        "another run_dir (one for each seed), or wait for that run or stop it"
    )


def _beats(path: Path) -> bool:
    """Whether the file is touched while we watch. Clocks are not compared, because they differ between hosts."""

    def touched() -> int:
        with path.open() as file:  # opening bypasses a network filesystem's attribute cache
            return os.fstat(file.fileno()).st_mtime_ns

    first, end = touched(), time.monotonic() + 3 * HEARTBEAT
    while time.monotonic() < end:
        time.sleep(HEARTBEAT / 10)
        if touched() != first:
            return True
    return False


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(descriptor)


@contextmanager
def _explained(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename:
            reason += f" ({error.filename})"
        raise ConfigError(f"run_dir={run_dir} cannot be used: {reason}; fix that, or choose another folder") from error


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} is not writable")


def _refuse_foreign(run_dir: Path) -> None:
    """Raise if files have the names of a run's records but do not belong to a run: they would be overwritten."""
    present = _records(run_dir)
    if present and not (run_dir / LOCK).exists() and not _is_run(run_dir):
        raise ConfigError(
            f"run_dir={run_dir} contains files that this driver did not write and would overwrite "
            f"({', '.join(present)}); choose another folder"
        )


def _records(run_dir: Path) -> list[str]:
    return [name for name in (*FILES, *FOLDERS) if os.path.lexists(run_dir / name)]


def _is_run(run_dir: Path) -> bool:
    """Whether a checkpoint or config.yaml shows that the driver ran there."""
    if any((path / "trainer.pt").exists() for path in list_checkpoints(run_dir / "checkpoints")):
        return True
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and {"run_dir", "algorithm", "rollout", "env"} <= settings.keys()
