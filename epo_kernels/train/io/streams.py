"""Keeps a run going if stdout or stderr can no longer be written: a closed pipe, a lost terminal, a full disk."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside the context, text that stdout or stderr cannot accept is dropped instead of raising."""
    out, err = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        try:
            yield
        finally:
            out.finish()
            err.finish()


class _Lasting:
    """A text stream that drops text it cannot write, and delegates everything else."""

    def __init__(self, stream: TextIO | None) -> None:
        # None: the descriptor was closed before the process started.
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode("ascii", "backslashreplace").decode())
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def finish(self) -> None:
        """Flush and drop the rest, so that the interpreter does not fail on it at exit."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno in (errno.EPIPE, errno.EIO):  # permanent; a full disk may be freed later
            self._discard()

    def _discard(self) -> None:
        """Redirect the descriptor to /dev/null, also for buffered text and libraries that write to it directly."""
        with suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
