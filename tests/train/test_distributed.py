"""Two processes with torchrun and gloo, layers sharded with FSDP2, against one process on the same draws."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from epo_kernels.train.distributed import Ranks
from tests.train.conftest import SMALL, lines_of
from tests.train.test_main import train
from tests.train.two_ranks import loaded_from

SETTINGS = [
    "optim.lr=3e-4",
    "algorithm.name=ppo",
    "loss.kl_coeff=0.01",
    "loss.entropy_target=1",
    "loss.entropy_rule=pi",
    "algorithm.shape=empg",
    "optim.minibatches=2",
    "optim.micro_batch_tokens=400",
    "checkpoint.keep=9",
    "evaluate.decoding=[sampled]",
]
OF_A_RANK = {"perf/padding_share", "perf/shared_prompt_share"}
ROUNDING = {"training/rollout_probs_diff_mean", "training/rollout_probs_diff_max", "actor/ppo_kl"}  # about 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the one-process run, of the two-process run, what the two ranks saw)."""
    folder = tmp_path_factory.mktemp("ranks")
    assert train(f"run_dir={folder / 'one'}", *SETTINGS) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.train.two_ranks", str(folder), "practice", *SMALL, *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 2/2") == 2  # only the first rank prints
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    return folder / "one", folder / "two", ranks


def weights_of(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"global_step_{step}" / "actor" / "model.safetensors")


def same(one, other):
    assert len(one) == len(other) == 2
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - ROUNDING - OF_A_RANK:
            assert left[name] == pytest.approx(right[name], rel=2e-3, abs=1e-5), name


def test_the_metrics_are_those_of_one_process(runs):
    one, two, ranks = runs
    assert [rank["codes"] for rank in ranks] == [[0, 0, 0], [0, 0, 0]]
    same(lines_of(one), lines_of(two))
    records = [json.loads((run / "evaluation.json").read_text()) for run in (one, two)]
    assert records[0] == records[1]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_so_are_the_weights(runs):
    one, two, _ = runs
    assert weights_of(one, 0).keys() == weights_of(two, 2).keys()
    moved = 0.0
    for name, start in weights_of(one, 0).items():
        ended = weights_of(one, 2)[name]
        moved = max(moved, float((ended - start).abs().max()))
        assert torch.allclose(ended, weights_of(two, 2)[name], atol=2e-5), name
    assert moved > 1e-4


def test_one_process_goes_on_where_two_stopped(runs, tmp_path):
    _, two, _ = runs
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "global_step_2")
    state = torch.load(tmp_path / "run" / "checkpoints" / "global_step_1" / "trainer.pt", weights_only=True)
    assert all(type(value) is torch.Tensor for value in state["critic"]["network"].values())
    assert train(f"run_dir={tmp_path / 'run'}", *SETTINGS) == 0
    same(lines_of(tmp_path / "run"), lines_of(two))


def test_two_processes_go_on_where_they_stopped(runs):
    _, two, _ = runs
    same(lines_of(two.with_name("resumed")), lines_of(two))


def test_a_policy_that_is_loaded_trains_as_in_one_process(runs, tmp_path):
    _, two, _ = runs
    assert train(f"run_dir={tmp_path}", *SETTINGS, *loaded_from(two)) == 0
    (one,), (other,) = lines_of(tmp_path), lines_of(two.with_name("two_loaded"))
    for name in ("actor/entropy", "actor/loss", "actor/kl_loss", "actor/grad_norm", "critic/vf_loss"):
        assert one[name] == pytest.approx(other[name], rel=0.02, abs=1e-4), name


@pytest.mark.parametrize("name", ["tied", "untied", "experts"])
def test_a_model_is_split_before_its_weights_are_read(runs, name):
    *_, ranks = runs
    assert sum(rank["loaded"][name]["own_bytes"] for rank in ranks) == ranks[0]["loaded"][name]["all_bytes"]
    for rank in ranks:
        loaded = rank["loaded"][name]
        assert loaded["built_on_meta"]
        assert loaded["split"]
        assert loaded["same_type"]
        assert loaded["same_weights"]
        assert loaded["same_buffers"]
        assert loaded["same_logits"]
        assert loaded["tied"] == (name == "tied")


def test_no_rank_ever_holds_a_whole_model(runs):
    *_, ranks = runs
    for rank in ranks:
        loaded = rank["loaded"]["tied"]
        assert loaded["all_bytes"] > 100e6
        assert loaded["own_bytes"] < loaded["peak"] < 0.75 * loaded["all_bytes"]


def test_broken_weights_are_found_on_every_rank(runs):
    *_, ranks = runs
    assert [rank["broken_weights"] for rank in ranks] == [["model.layers.0.mlp.up_proj.weight"]] * 2


def test_what_stops_one_rank_stops_all(runs):
    *_, ranks = runs
    for rank in ranks:
        assert rank["played"] == [0, 11, 2, 13, 4]  # every rank has all, each played by its own
        assert rank["stopped"] == "Stopped: stopped by SIGTERM"
        assert rank["lost"].startswith("EnvironmentFailure: ")
        assert "it died" in rank["lost"]
        assert rank["too_long"].startswith("PromptTooLong: ")
        assert "raise it" in rank["too_long"]
        assert rank["prefetched"].startswith("EnvironmentFailure: ")
        assert "it died in a reset" in rank["prefetched"]
        assert rank["asked"] == "stopped by SIGTERM"
        assert rank["refused"] == "in use, says rank 0"
    assert ranks[0]["broken"] == "RuntimeError: rank 1 failed: ValueError: bad"


def test_layers_are_split_and_whole_while_sampling(runs):
    *_, ranks = runs
    for rank in ranks:
        sharded = rank["sharded"]
        assert 0 < sharded["split"] < sharded["all"]  # embedding, last norm and head stay whole
        assert sharded["local_share"] == 0.5
        assert sharded["same"]
        assert sharded["split_again"]


def test_shares_are_even(runs):
    *_, ranks = runs
    assert ranks[0]["dealt"] == [["a", True], ["c", True], ["e", True]]
    assert ranks[1]["dealt"] == [["b", True], ["d", True], ["e", False]]
    assert list(Ranks().deal("abc")) == [("a", True), ("b", True), ("c", True)]
