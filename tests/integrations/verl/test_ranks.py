"""Two data-parallel ranks against one process: the same history, loss and gradients."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.integrations.verl.harness import episodes
from tests.integrations.verl.rank import two_updates


@pytest.fixture(scope="module")
def ranks(model_path, tmp_path_factory):
    """What each of two ranks, with half of the episodes, saw."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = str(folder / "store"), str(model_path), str(folder / "result")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.integrations.verl.rank", str(rank), *paths],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(f"{folder / 'result'}.{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_two_ranks_are_one_process(workers, ranks, mode):
    metrics, gradients, means = two_updates(workers(True, "epo"), mode, episodes())
    assert metrics["epo/band_low_share"] > 0
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for rank in range(2):
        own_metrics, own_gradients, own_means = ranks[rank][mode]
        assert_close(own_means, means, rtol=1e-5, atol=0, equal_nan=True)
        for name in ("loss", "grad_norm", "actor/pg_loss", "actor/entropy_loss", "epo/penalty"):
            assert own_metrics[name] == pytest.approx(metrics[name], rel=1e-4), name
        for name, gradient in gradients.items():
            assert_close(own_gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    assert_close(ranks[0][mode][2], ranks[1][mode][2], rtol=0, atol=0, equal_nan=True)  # to the last bit
