"""Ranks as separate processes: each runs the cases of some modules until one fails, and reports the outcome."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

SECONDS = 300  # for all cases

Failures = dict[str, str]  # of one rank, by case: the traceback


def run_on_ranks(
    modules: list[str], world: int, folder: Path, *, device: str = "cpu", seconds: int = 60, dies: int | None = None
) -> list[Failures | None]:
    """The cases of tests.sharded.<module> on `world` ranks; failures by rank, None for the rank meant to die."""
    context = mp.get_context("spawn")
    settings = modules, world, folder, device, seconds
    ranks = [context.Process(target=_rank, args=(rank, *settings)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=SECONDS)
        if process.is_alive():
            process.kill()
    reports = enumerate(process.exitcode for process in ranks)
    return [None if rank == dies else _read(folder / f"failures-{rank}", code) for rank, code in reports]


def cases_of(module: str) -> dict[str, Callable[[int, int], None]]:
    """The functions of a module whose names begin with case_: called as (rank, world) on every rank."""
    found = vars(import_module(f"tests.sharded.{module}"))
    return {name: value for name, value in found.items() if name.startswith("case_")}


def _read(file: Path, exitcode: int | None) -> Failures:
    if file.exists():
        return pickle.loads(file.read_bytes())
    raise RuntimeError(f"a rank ended with {exitcode} and no report ({file})")


def _rank(rank: int, modules: list[str], world: int, folder: Path, device: str, seconds: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    failures: Failures = {}
    cases = {name: case for module in modules for name, case in cases_of(module).items()}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank, world)
        except Exception:
            failures[name] = traceback.format_exc()
            break  # the ranks are out of step now
    (folder / f"failures-{rank}").write_bytes(pickle.dumps(failures))
    if failures:
        os._exit(1)  # so that no rank waits for this one
    dist.destroy_process_group()
