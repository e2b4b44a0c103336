"""Adapters on a model whose layers are split over two processes, against one process."""

import os
import shutil
import subprocess
import sys

import pytest

from epo_kernels.train.__main__ import main
from tests.train.conftest import SMALL, lines_of
from tests.train.test_distributed import same

SETTINGS = [
    "practice",
    *SMALL,
    "model.lora_rank=4",
    "algorithm.name=ppo",
    "loss.kl_coeff=0.01",
    "model.gradient_checkpointing=true",
    "optim.lr=3e-4",
    "evaluate.panels=[]",
    "checkpoint.keep=9",
]


def train_two(*settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "epo_kernels.train", *SETTINGS, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """A run of one process that cloned its policy first."""
    run_dir = tmp_path_factory.mktemp("one")
    assert main([*SETTINGS, f"run_dir={run_dir}"]) == 0
    return run_dir


def test_a_policy_that_was_cloned_first(cloned, tmp_path):
    train_two(f"run_dir={tmp_path / 'two'}")
    same(lines_of(cloned), lines_of(tmp_path / "two"))
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_2")
    train_two(f"run_dir={tmp_path / 'resumed'}")
    same(lines_of(tmp_path / "two"), lines_of(tmp_path / "resumed"))
    saved = list((tmp_path / "two" / "checkpoints" / "global_step_2" / "actor").glob("*.safetensors"))
    assert [path.name for path in saved] == ["adapter_model.safetensors"]


def test_a_policy_that_is_loaded(cloned, tmp_path):
    base = [f"model.name_or_path={cloned / 'base'}", "model.warm_start.demonstrations=0"]
    assert main([*SETTINGS, *base, f"run_dir={tmp_path / 'one'}"]) == 0
    train_two(*base, f"run_dir={tmp_path / 'two'}")
    same(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"))  # the adapters' first weights follow from the seed
