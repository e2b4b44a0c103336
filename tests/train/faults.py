"""Driver processes with a fault inside, forked from a server that has imported everything: each starts at once."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import time

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["epo_kernels.train.build", "epo_kernels.train.trainer", "tests.train.faults"])


def start(arguments, fault=None, log=os.devnull, environment=None):
    """A process that runs the driver; `fault` is (signal, "module:Class.method", n): what it sends itself, and when."""
    process = _CONTEXT.Process(target=_run, args=(list(map(str, arguments)), fault, str(log), environment or {}))
    process.start()
    return process


def start_ranks(size, arguments, folder, faults=None):
    """The processes of a torchrun without its agent, which would end the others when one dies. Logs: folder/rank_N.log.

    Args:
        faults: {rank: fault}; see `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            arguments,
            (faults or {}).get(rank),
            folder / f"rank_{rank}.log",
            {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
        )
        for rank in range(size)
    ]


def wait_for(path, process, timeout=120):
    """Wait until the process has created that file."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"the driver made no {path}")
        time.sleep(0.05)


def end_of(process, timeout=120):
    """Its exit code, negative for a signal."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the driver didn't end")
    return process.exitcode


def _run(arguments, fault, log, environment):
    os.environ.update(environment)
    import torch

    from epo_kernels.train.__main__ import main

    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # nohup ignores one of them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if fault:
        _plant(*fault)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = main(arguments)
    os._exit(code)


def _plant(number, place, call):
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)
