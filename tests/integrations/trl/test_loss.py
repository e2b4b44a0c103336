"""With EPO off, the loss, its gradients and its metrics are TRL's own; with a bonus alone, too."""

import pytest
import torch

import epo_kernels as ek
from epo_kernels.integrations.trl import LOSS_TYPES
from tests.integrations.trl.pairs import assert_same, both, loss_and_gradients, make, micro_batch


def compare(folder, tmp_path, inputs, accumulated=1, **changes):
    theirs, ours = both(folder, tmp_path, **changes)
    expected = loss_and_gradients(theirs, inputs, accumulated)
    assert any(bool(g.abs().max() > 1e-4) for g in expected[1].values()), "a gradient to compare"
    assert_same(loss_and_gradients(ours, inputs, accumulated), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_every_loss_type(folder, tmp_path, loss_type, beta):
    inputs = micro_batch(ref=beta != 0, tools=True)
    compare(folder, tmp_path, inputs, accumulated=3, loss_type=loss_type, beta=beta, temperature=0.7)
