"""Four gloo ranks under FSDP2 with uneven shares, one of which is killed; two ranks and one go on from what is left."""

import re
import signal
import time

import pytest
import torch

from epo_kernels.train.io.checkpoint import list_checkpoints, load_state, step_of
from tests.train import faults
from tests.train.conftest import command, lines_of, train, weights_of

SETTINGS = [
    "algorithm.name=ppo",
    "algorithm.groups=3",  # six episodes: two, two, one and one
    "algorithm.group_size=2",
    "loss.kl_coeff=0.01",
    "optim.minibatches=2",
    "optim.micro_batch_tokens=300",
    "checkpoint.keep=9",
    "evaluate.panels=[]",
    "model.device=cpu",
]
BOUND = 90  # seconds; gloo's own timeout here is two hours
DEAD = 2
ROUNDING = {"training/rollout_probs_diff_mean", "training/rollout_probs_diff_max", "actor/ppo_kl"}  # about 0
OF_A_RANK = {"perf/padding_share", "perf/shared_prompt_share"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """(folder of a run whose third rank was killed in the update of step 2, exit codes, logs, seconds from then on)."""
    folder = tmp_path_factory.mktemp("four")
    fault = (signal.SIGKILL, "epo_kernels.train.rl.optimizer:StepOptimizer.apply", 6)  # two updates, two networks
    ranks = faults.start_ranks(4, command(f"run_dir={folder / 'run'}", *SETTINGS), folder, {DEAD: fault})
    ranks[DEAD].join(300)
    began = time.monotonic()
    codes = [faults.end_of(process, BOUND) for process in ranks]
    logs = [(folder / f"rank_{rank}.log").read_text() for rank in range(4)]
    return folder / "run", codes, logs, time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert train(f"run_dir={folder}", *SETTINGS) == 0
    return folder


def assert_same(line, wanted):
    assert line.keys() == wanted.keys()
    for name in line.keys() - ROUNDING - OF_A_RANK:
        assert line[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), name


def test_the_others_end_with_an_error_that_says_what_to_do(broken):
    _, codes, logs, seconds = broken
    assert codes[DEAD] == -signal.SIGKILL, logs[DEAD]
    for rank, log in enumerate(logs):
        if rank != DEAD:
            assert codes[rank] == 1, log
            assert re.search(
                rf"^error: rank {rank} lost another rank.*; repeat the command to resume", log, re.MULTILINE
            ), log
    assert seconds < BOUND


def test_the_checkpoint_before_is_intact(broken, whole):
    run_dir, *_ = broken
    assert [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")] == [0, 1]
    assert load_state(run_dir / "checkpoints" / "global_step_1")["step"] == 1
    (line,) = lines_of(run_dir)
    assert_same(line, lines_of(whole)[0])


def flat(state, prefix=""):
    """{path: tensor} of nested dicts."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if not isinstance(state, dict):
        return {}
    return {path: value for key, part in state.items() for path, value in flat(part, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("size", [2, 1])
def test_fewer_ranks_go_on_with_the_same_state(broken, whole, tmp_path, size):
    """As a branch, whose first checkpoint is what its ranks have after loading."""
    run_dir, *_ = broken
    source = run_dir / "checkpoints" / "global_step_1"
    settings = [f"run_dir={tmp_path / 'run'}", f"resume={source}", *SETTINGS]
    if size == 1:
        assert train(*settings) == 0
    else:
        ranks = faults.start_ranks(size, command(*settings), tmp_path)
        codes = [faults.end_of(process, 300) for process in ranks]
        assert codes == [0] * size, (tmp_path / "rank_0.log").read_text()
    loaded, saved = (load_state(path) for path in (tmp_path / "run" / "checkpoints" / "global_step_1", source))
    for part in ("learner", "critic"):
        found, wanted = flat(loaded[part]), flat(saved[part])
        assert found.keys() == wanted.keys()
        assert sum("exp_avg" in name for name in wanted) > 20
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    start, wanted = weights_of(tmp_path / "run", 1), weights_of(run_dir, 1)
    assert all(torch.equal(start[name], wanted[name]) for name in wanted)
    assert_same(lines_of(tmp_path / "run")[-1], lines_of(whole)[1])
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == 2
