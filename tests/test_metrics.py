"""LossMetrics: additive sums, and the usual means."""

import copy
import math
import pickle

import pytest
import torch

import epo_kernels as ek
from epo_kernels.metrics import METRIC_NAMES
from tests.cases import metrics_of, random_case, run


def made(**values):
    return ek.LossMetrics(torch.tensor([float(values.get(name, 0)) for name in METRIC_NAMES], dtype=torch.float64))


def test_every_name_is_an_attribute_on_the_device():
    metrics = made(tokens=4, entropy_sum=6.0)
    assert metrics.values.shape == (len(METRIC_NAMES),) == (len(set(METRIC_NAMES)),)
    for name in METRIC_NAMES:
        value = getattr(metrics, name)
        assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float64, False)
    assert (metrics.tokens, metrics.entropy_sum) == (4, 6)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"LossMetrics has no 'clipfrac'; it has tokens, loss"):
        made().clipfrac  # noqa: B018
    assert not hasattr(made(), "__array__")


def test_copies_and_pickles():
    for clone in (copy.copy(made(tokens=3)), copy.deepcopy(made(tokens=3)), pickle.loads(pickle.dumps(made(tokens=3)))):
        assert clone.tokens == 3


def test_adding_leaves_both_alone():
    first, second = made(tokens=1, loss=0.5), made(tokens=2, loss=-2.0)
    total = first + second
    assert (total.tokens, total.loss, first.tokens, second.loss) == (3, -1.5, 1, -2)


def test_floats_by_hand():
    floats = made(
        tokens=8, entropy_sum=4, log_prob_sum=-16, ratio_sum=10, ppo_kl_sum=-2, clipped_tokens=2, dual_clipped_tokens=1,
        below_band_tokens=4, above_band_tokens=3, loss=0.25, sequences=2,
    ).to_floats()  # fmt: skip
    means = {
        "entropy": 0.5,
        "log_prob": -2.0,
        "ratio": 1.25,
        "ppo_kl": -0.25,
        "pg_clipfrac": 0.25,
        "pg_clipfrac_lower": 0.125,
        "below_band_fraction": 0.5,
        "above_band_fraction": 0.375,
    }
    assert {name: floats[name] for name in means} == means
    assert {name: floats[name] for name in ("loss", "sequences", "tokens")} == {
        "loss": 0.25,
        "sequences": 2,
        "tokens": 8,
    }
    assert set(floats) == set(METRIC_NAMES) | set(means)
    assert all(type(value) is float for value in floats.values())


def test_means_of_no_token_are_nan_and_sums_zero():
    floats = made().to_floats()
    assert math.isnan(floats["entropy"])
    assert floats["loss"] == floats["tokens"] == 0


def test_the_loss_is_among_them_and_the_parts_make_it_up():
    cfg = ek.EPOConfig(penalty="hinge", entropy_coeff=0.3, smooth_coeff=0.5, kl_coeff=0.2)
    out, _ = run(random_case(cfg, penalty_weight=1.5))
    metrics, mask = metrics_of(out), random_case(cfg)["mask"]
    assert metrics["tokens"] == mask.sum()
    assert metrics["sequences"] == mask.any(1).sum()
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-12)
    bonus = metrics["entropy_sum"] / metrics["tokens"]  # token-mean: Σ w H
    whole = metrics["pg_loss"] - 0.3 * (bonus - 1.5 * 0.5 * metrics["penalty"]) + 0.2 * metrics["kl_loss"]
    assert metrics["loss"] == pytest.approx(whole, rel=1e-12)


def test_kl_is_logged_where_its_coefficient_is_zero():
    case = random_case(ek.EPOConfig(kl_coeff=0.1))
    with_kl, _ = run(case)
    logged, _ = run({**case, "kl_coeff": 0.0})
    assert logged.metrics.kl_loss == with_kl.metrics.kl_loss != 0
    entropy = logged.metrics.entropy_sum / logged.metrics.tokens
    assert logged.loss.item() == pytest.approx((logged.metrics.pg_loss - 0.001 * entropy).item(), rel=1e-12)


def test_every_nonfinite_token_is_counted_once():
    case = random_case(mask=torch.ones(3, 5, dtype=torch.bool))
    case["logits"][0, 0, 0] = math.nan
    case["logits"][1, 1] = -math.inf
    case["old_log_probs"][2, 2] = math.nan
    case["advantages"][2, 3] = math.inf
    out, _ = run(case)
    assert out.loss.isnan()
    assert (out.metrics.nonfinite_tokens, out.metrics.invalid_tokens, out.metrics.tokens) == (4, 0, 15)


def test_sum_adds_metrics_up():
    first, second = (ek.LossMetrics(torch.arange(len(ek.metrics.METRIC_NAMES)).double() + i) for i in range(2))
    assert torch.equal(sum([first, second]).values, (first + second).values)
