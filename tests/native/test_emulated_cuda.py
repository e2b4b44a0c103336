"""The CUDA kernels on an emulated GPU: what every backend is held to, random shapes and schedules, planted faults."""

import os
import random
import re
import subprocess

import pytest
import torch

import epo_kernels as ek
from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import DTYPES, BackendMatrix, busy_case, check_three_ways
from tests.cases import assert_identical, run
from tests.native.emulated import NEEDS_COMPILER, build, emulator, installed, shared_bytes
from tests.native.emulator.mutants import MUTANTS

pytestmark = NEEDS_COMPILER
CASES = int(os.environ.get("EPO_EMULATED_CASES", "12"))  # thousands for a night
TILE_BYTES, WARPS, SPARE_SLOTS = 2048, 8, 3  # of csrc/tile_math.h


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


def random_rows(seed, most_bytes):
    """A case of few rows, and its generator for more decisions."""
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    width = draw.randint(1, most_bytes // dtype.itemsize)
    case = busy_case(vocab=width, dtype=dtype, batch=draw.randint(1, 3), time=draw.randint(1, 4), seed=seed)
    if draw.random() < 0.3:
        padded = width - draw.randint(0, min(width - 1, 9))
        case = {**case, "vocab_size": padded, "tokens": case["tokens"] % padded}
    return case, draw


def in_place(case):
    """`run`, with the gradient over the logits."""
    leaf = case["logits"].detach().clone().requires_grad_()
    out = ek.epo_loss(**{**case, "logits": leaf * 1.0}, inplace=True, backend="emulated")
    return out, torch.autograd.grad(out.loss, leaf)[0]


@pytest.mark.parametrize("seed", range(CASES))
def test_the_ring_over_shapes_and_schedules(seed):
    """As accurate as eager, and the same bits whatever the order in which threads run and copies land."""
    slots, ranks = random.Random(seed).choice((4, 5, 13)), (1, 2, 4, 8)[seed % 4]
    most_tiles = (slots - SPARE_SLOTS) * WARPS * ranks - 1
    case, draw = random_rows(seed, min(most_tiles * TILE_BYTES, 120_000))
    clusters = draw.randint(1, 2 if ranks < 8 else 1)
    gpu_of = {"processors": ranks * clusters + draw.randint(0, 1), "shared_bytes": shared_bytes(slots)}
    with installed(emulator(), "ring") as gpu:
        gpu.configure(seed, **gpu_of)
        expected = check_three_ways(case, "emulated", "cpu")
        assert sum(gpu.launches(blocks) for blocks in (1, 2, 4, 8)) == 1
        for schedule in range(1, 4):
            gpu.configure(1000 * seed + schedule, **gpu_of)
            assert_identical(run(case, "emulated"), expected)
        assert_identical(in_place(case), expected)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_rows_that_need_clusters_get_them(gpu, blocks):
    gpu.configure(processors=8, shared_bytes=shared_bytes(4))
    run(busy_case(vocab=(WARPS * blocks - 1) * TILE_BYTES // 4, batch=1, time=2), "emulated")
    assert gpu.launches(blocks) == (blocks > 1)  # rows of less than 16 KB are left to the sweeps


@pytest.mark.parametrize("seed", range(CASES))
def test_the_sweeps_over_shapes_and_schedules(seed):
    case, draw = random_rows(seed, 20_000)
    if draw.random() < 0.3:
        case["logit_softcap"] = 5.0
    with installed(emulator(), "sweeps") as gpu:
        gpu.configure(seed, processors=draw.randint(1, 4), capability=8)
        expected = check_three_ways(case, "emulated", "cpu")
        gpu.configure(1000 + seed, processors=draw.randint(1, 4), capability=8)
        again = run(case, "emulated")
        torch.testing.assert_close(again[1], expected[1], rtol=0, atol=0)
        assert_identical(in_place(case), again)


def test_planted_faults_are_found():
    program = build(target="epo_mutants")
    done = subprocess.run([program, str(len(MUTANTS))], capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines()]
    assert lines[0] == "nothing"
    found = dict(zip(MUTANTS, lines[1:], strict=True))
    assert not {mutant.name: line for mutant, line in found.items() if not re.search(mutant.symptom, line)}
