"""The CUDA kernels on an emulated GPU: the matrix of every backend, random shapes and schedules, planted faults."""

import os
import random
import re
import subprocess

import pytest
import torch

from epo_kernels.backends import choose_backend
from epo_kernels.backends.native import array
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import BackendMatrix, busy_case
from tests.backends.shapes import check_again_and_again, random_rows
from tests.cases import run
from tests.native.emulated import NEEDS_COMPILER, build, emulator, installed, shared_bytes
from tests.native.emulator.mutants import MUTANTS

pytestmark = NEEDS_COMPILER
CASES = int(os.environ.get("EPO_EMULATED_CASES", "12"))  # thousands for a night
TILE_BYTES, WARPS, SPARE_SLOTS = 2048, 4, 3  # of csrc/tile_math.h


@pytest.fixture
def gpu():
    with installed(emulator()) as gpu:
        gpu.configure()
        yield gpu


@pytest.mark.usefixtures("gpu")
class TestEmulatedCuda(BackendMatrix):
    backend = "emulated"


@pytest.mark.usefixtures("gpu")
class TestEmulatedAutograd(AutogradMatrix):
    backend = "emulated"


@pytest.mark.parametrize("seed", range(CASES))
def test_the_ring_over_shapes_and_schedules(seed):
    """As accurate as eager, and bit-identical for any order of threads and copies."""
    draw = random.Random(seed)
    slots, ranks = draw.choice((4, 5, 13)), (1, 2, 4, 8)[seed % 4]
    most_tiles = (slots - SPARE_SLOTS) * WARPS * ranks - 1
    case = random_rows(draw, min(most_tiles * TILE_BYTES, 120_000))
    gpu_of = {"processors": draw.randint(8, 9), "shared_bytes": shared_bytes(slots)}  # room for the largest cluster
    with installed(emulator(), "ring") as gpu:
        gpu.configure(1000 * seed, **gpu_of)
        check_again_and_again(case, "emulated", "cpu", lambda schedule: gpu.configure(1000 * seed + schedule, **gpu_of))
        launches = sum(gpu.launches(blocks) for blocks in (1, 2, 4, 8))  # since the last schedule was chosen
        assert launches == (0 if case["logits"].dtype == torch.float16 else 2)  # statistics, then gradient


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_rows_that_need_clusters_get_them(gpu, blocks):
    gpu.configure(processors=8, shared_bytes=shared_bytes(4))
    run(busy_case(vocab=(WARPS * blocks - 1) * TILE_BYTES // 4, batch=1, time=2), "emulated")
    in_a_ring = blocks > 1  # rows of less than 8 KB are left to the sweeps
    assert gpu.launches(blocks) == in_a_ring
    assert choose_backend("emulated", torch.device("cpu")).kernels.ran == ("ring" if in_a_ring else "sweeps")


def test_rows_that_need_larger_clusters_than_there_are_go_to_the_sweeps(gpu):
    gpu.configure(processors=4, shared_bytes=shared_bytes(4))
    run(busy_case(vocab=(WARPS * 8 - 1) * TILE_BYTES // 4, batch=1, time=2), "emulated")
    assert choose_backend("emulated", torch.device("cpu")).kernels.ran == "sweeps"


@pytest.mark.parametrize("seed", range(CASES))
def test_the_sweeps_over_shapes_and_schedules(seed):
    draw = random.Random(seed)
    case = random_rows(draw, 20_000)
    if draw.random() < 0.3:
        case["logit_softcap"] = 5.0
    with installed(emulator(), "sweeps") as gpu:
        gpu_of = {"processors": draw.randint(1, 4), "capability": 8}
        gpu.configure(1000 * seed, **gpu_of)
        check_again_and_again(case, "emulated", "cpu", lambda schedule: gpu.configure(1000 * seed + schedule, **gpu_of))


def test_scaled_gradients_that_do_not_fit_are_refused(gpu):
    memory = torch.ones(24)
    values, factor = memory[:12], torch.tensor(0.5)

    def scale(out, values=values):
        gpu.module.cuda_scale(*map(array, (values, factor, out)), 0, 0)

    scale(values)
    assert torch.equal(memory, torch.tensor([0.5] * 12 + [1.0] * 12))
    for out, says in (
        (torch.empty(11), "out must have sizes"),
        (torch.empty(24)[::2], "out must be contiguous"),
        (torch.empty(12).double(), "float32, float16 or bfloat16"),
        (memory[6:18], "share no memory"),
        (memory.view(torch.bfloat16)[:12], "share no memory"),
    ):
        with pytest.raises(ValueError, match=says):
            scale(out)
    with pytest.raises(ValueError, match="out must be bfloat16"):
        scale(torch.empty(12), values=values.bfloat16())


def test_planted_faults_are_found():
    program = build(target="epo_mutants")
    done = subprocess.run([program, str(len(MUTANTS))], capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines()]
    assert lines[0] == "nothing"
    found = dict(zip(MUTANTS, lines[1:], strict=True))
    assert not {mutant.name: line for mutant, line in found.items() if not re.search(mutant.symptom, line)}
