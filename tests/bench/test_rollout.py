"""The benchmark of rollouts, with a model of each size for two turns."""

import pytest

from bench import rollout
from tests.train.conftest import SMALL


@pytest.mark.parametrize("model", list(rollout.MODELS))
def test_driver_and_bare_engine_write_the_same_tokens(model):
    settings = [*SMALL, "model.warm_start.epochs=1", "env.options.length=2"]
    (found,) = rollout.measure("transformers", model, rounds=1, overrides=settings)
    assert found.driver.tokens == found.bare.tokens > 0
    assert found.driver.seconds > 0
    assert found.at_once is None
    assert set(rollout.ratios_of([found])) == {"ratio", "ratio_of_processor_time"}
