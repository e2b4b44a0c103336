"""Cloning demonstrations of any length."""

import math
from dataclasses import replace

import pytest

from epo_kernels.train.rl.warm_start import clone, cloning_samples, demonstrate
from tests.train.conftest import prompts_of


def test_every_batch_is_reported_as_a_share_of_its_epoch(policy, suite, config):
    samples = cloning_samples(demonstrate(suite, 2), policy, prompts_of(policy), 6)
    reported = []
    clone(
        policy,
        samples,
        replace(config.model.warm_start, epochs=2, batch_size=-(-len(samples) // 4)),
        0,
        reported.append,
    )
    assert reported == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


@pytest.mark.parametrize("epochs", [1, 2, 4, 9, 10])
def test_however_few_epochs(policy, suite, config, epochs):
    samples = cloning_samples(demonstrate(suite, 1), policy, prompts_of(policy), 6)
    whole = replace(config.model.warm_start, epochs=epochs, batch_size=len(samples))
    reported = []
    losses = clone(policy, samples, whole, 0, reported.append)
    assert reported == list(range(1, epochs + 1))
    assert len(losses) == epochs
    assert all(math.isfinite(loss) for loss in losses)
