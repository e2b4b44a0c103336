"""An object in its own process: started, called and stopped with time limits, never blocking forever."""

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
    """An object in its own process. Not thread-safe, except that `close` may be called from another thread.

    Args:
        address: its class, as "module:Class".
        title: description used in messages, such as "an ALFWorld engine".

    Raises:
        EnvironmentFailure: it did not start.
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
            # -P: modules in the program's folder must not shadow packages of the same name.
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,  # closes when this process dies, which ends the worker
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(variables or {})},
            start_new_session=True,  # Ctrl-C goes to the driver, which closes its environments itself
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
        """Call the object's method of that name.

        Args:
            timeout: limit in seconds; `setting` is the setting to raise if it was only slow.

        Raises:
            EnvironmentFailure: it died, did not answer in time, or reported an error.
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
        """Kill the process immediately. A call that waits in another thread then raises EnvironmentFailure."""
        self._finalizer()

    def _answer(self, timeout: float, setting: str) -> Any:
        assert self.process.stdout is not None
        pipe, deadline = self.process.stdout.fileno(), time.monotonic() + timeout
        poll = select.poll()  # not select.select, which is limited to file descriptors below 1,024
        poll.register(pipe, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise EnvironmentFailure(
                    f"{self._title} (process {self.process.pid}) did not answer within {timeout:g} s; "
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
            return f"{self._title} (process {self.process.pid}) closed its pipes and does not answer"
        self._errors.seek(0)
        said = " ".join(self._errors.read().decode(errors="replace").split())[-500:]
        return (
            f"{self._title} (process {self.process.pid}) ended with code {code} (its output: {said or 'none'}); "
            "if it was killed for memory, lower rollout.environments"
        )
