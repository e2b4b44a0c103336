"""An object in a process of its own: started, called and ended with time limits, never blocking for good."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epo_kernels.train.envs.base import EnvironmentFailure

PROGRAM = Path(__file__).with_name("serve.py")
PACKAGE = Path(__file__).parents[2]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class Worker:
    """An object in a process of its own. Belongs to one thread at a time; only `close` may come from another.

    Args:
        address: its class, as "module:Class".
        title: what it is, for messages, as in "an ALFWorld engine".

    Raises:
        EnvironmentFailure: it didn't start.
    """

    def __init__(
        self,
        address: str,
        title: str,
        start_timeout: float,
        variables: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self._title = title
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has died)
        self.process = subprocess.Popen(
            # -P: the program's folder must not shadow packages by the names of its modules.
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,  # breaks when this process dies, and ends the worker
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(variables or {})},
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its environments itself
        )
        self._finalizer = weakref.finalize(self, _end, self.process)
        self._unread = b""
        opened = {"path": sys.path, "package": str(PACKAGE), "address": address, "arguments": arguments}
        try:
            self.call("open", start_timeout, "env.start_timeout", **opened)
        except EnvironmentFailure:
            self.close()
            raise

    def call(self, name: str, timeout: float, setting: str = "env.step_timeout", **arguments: Any) -> Any:
        """What the object's method of that name returns.

        Args:
            timeout: seconds it may take; `setting` is what to raise when it was only slow.

        Raises:
            EnvironmentFailure: it died, didn't answer in time, or reported an error.
        """
        request = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except (OSError, ValueError) as error:
            raise EnvironmentFailure(self._obituary()) from error
        return self._answer(timeout, setting)

    def close(self) -> None:
        """End the process at once. A call that waits in another thread then raises EnvironmentFailure."""
        self._finalizer()

    def _answer(self, timeout: float, setting: str) -> Any:
        assert self.process.stdout is not None
        pipe, deadline = self.process.stdout.fileno(), time.monotonic() + timeout
        poll = select.poll()  # not select: that knows only the first 1,024 file numbers
        poll.register(pipe, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise EnvironmentFailure(
                    f"{self._title} (process {self.process.pid}) didn't answer within {timeout:g} s; "
                    f"if it was only slow, raise {setting} or lower rollout.environments"
                )
            received = os.read(pipe, 1 << 16)
            if not received:
                raise EnvironmentFailure(self._obituary())
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise EnvironmentFailure(f"{self._title} failed: {answer['error']}")
        return answer["answer"]

    def _obituary(self) -> str:
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"{self._title} (process {self.process.pid}) closed its pipes and doesn't answer"
        self._errors.seek(0)
        said = " ".join(self._errors.read().decode(errors="replace").split())[-500:]
        return (
            f"{self._title} (process {self.process.pid}) ended with code {code} (it said: {said or 'nothing'}); "
            "if it was killed for memory, lower rollout.environments"
        )
