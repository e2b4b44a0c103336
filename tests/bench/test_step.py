"""The whole step runs on the driver's own parts, and both backends take the same step."""

import pytest
import torch

from bench import step
from bench.cases import StepCase
from bench.step import Round

CASE = StepCase(vocabulary=1_200, episodes=2, rounds=2)


def test_step_by_phases():
    found = step.measure_step(CASE, torch.device("cpu"))
    records = step.records_of(CASE, found)
    assert list(records) == ["ours", "eager"]
    for record in records.values():
        assert record.gate == "pass"
        assert set(record.phases_ms) == {
            "rollout",
            "old log-probs: model",
            "old log-probs: scores",
            "update: model",
            "update: loss",
            "update: optimiser",
        }
        assert sum(record.phases_ms.values()) == pytest.approx(record.median_ms)
    assert records["ours"].ratio_to_ours == 1.0


def test_another_loss_fails_the_gate():
    eager = [Round({}, 1.0), Round({}, 2.0)]
    assert step.check(eager, eager) == "pass"
    assert step.check([Round({}, 1.0), Round({}, 2.01)], eager).startswith("fails: the loss is off by 1.0e-02")


def test_loss_share_counts_scores_and_loss():
    assert step.loss_share({"rollout": 6.0, "old log-probs: scores": 1.0, "update: loss": 3.0}) == 0.4
