"""Importance weights for rollout mismatch: a plain NumPy version, packed against padded, and rejected arguments."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek

NAN = math.nan
MODES = ("truncate", "mask")
LEVELS = ("token", "sequence", "geometric")
BOUNDS = [(None, 2.0), (0.5, 5.0), (0.8, None), (None, None), (0.9, 1.1)]


def batch(rows=5, time=7, seed=0):
    """Log-probs with NaN where the mask is 0; one row without any token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[1] = False
    mask[2] = torch.arange(time) == 3
    old = -3 * torch.rand(rows, time, generator=generator)
    engine = old + 0.4 * torch.randn(rows, time, generator=generator)
    segments = torch.arange(rows)[:, None] * 2 + (torch.arange(time) >= 4)
    return torch.where(mask, old, NAN), torch.where(mask, engine, NAN), mask, segments


def plain(old, engine, mask, groups, mode, level, low, high):
    """Token by token in Python; `groups` names the group of each token."""
    old, engine, mask, groups = (np.asarray(value) for value in (old, engine, mask, groups))
    weights, ratios = np.zeros(mask.shape), {}
    for place in zip(*np.nonzero(mask), strict=True):
        members = [other for other in zip(*np.nonzero(mask), strict=True) if groups[other] == groups[place]]
        if level == "token":
            members = [place]
        logs = [float(old[other]) - float(engine[other]) for other in members]
        ratio = math.exp(sum(logs) / (len(logs) if level == "geometric" else 1))
        ratios[place] = ratio
        low_, high_ = 0.0 if low is None else low, math.inf if high is None else high
        if mode == "truncate":
            weights[place] = min(max(ratio, low_), high_)
        elif low_ <= ratio <= high_:
            weights[place] = ratio
    return weights, ratios


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_segment", [False, True])
def test_weights_and_metrics_equal_plain_ones(mode, level, bounds, by_segment):
    old, engine, mask, segments = batch()
    low, high = bounds
    groups = segments if by_segment else torch.arange(len(old))[:, None].expand(old.shape)
    weights, metrics = ek.rollout_weights(
        old, engine, mask, mode=mode, level=level, low=low, high=high, segment_ids=segments if by_segment else None
    )
    expected, ratios = plain(old, engine, mask, groups, mode, level, low, high)
    assert weights.dtype == torch.float32
    assert_close(weights.double().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert torch.all(weights[~mask] == 0)

    counted = expected[mask.numpy()]
    ratio = np.array([ratios[place] for place in zip(*np.nonzero(mask.numpy()), strict=True)])
    gaps = (old - engine).double()[mask].numpy()
    probs = np.abs(np.exp(old[mask].double().numpy()) - np.exp(engine[mask].double().numpy()))
    wanted = {
        "rollout_is_mean": counted.mean(),
        "rollout_is_min": counted.min(),
        "rollout_is_max": counted.max(),
        "rollout_is_ratio_mean": ratio.mean(),
        "rollout_is_ratio_fraction_high": (ratio > (math.inf if high is None else high)).mean(),
        "rollout_is_ratio_fraction_low": (ratio < (low or 0)).mean(),
        "rollout_is_eff_sample_size": counted.mean() ** 2 / (counted**2).mean() if counted.any() else 0,
        "rollout_kl_k1": -gaps.mean(),
        "rollout_kl_k3": (np.expm1(gaps) - gaps).mean(),
        "rollout_probs_diff_mean": probs.mean(),
        "rollout_probs_diff_max": probs.max(),
        "rollout_probs_diff_std": probs.std(),
    }
    assert set(metrics) == set(wanted)
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_segment", [False, True])
def test_packed_equals_padded(mode, level, by_segment):
    old, engine, mask, segments = batch()
    lengths = [7, 3, 5, 0, 6]
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]
    mask = mask & inside
    settings = {"mode": mode, "level": level, "low": 0.7, "high": 1.5}
    padded, told = ek.rollout_weights(
        old, engine, mask, **settings, segment_ids=segments if by_segment else None, num_segments=10
    )
    packed, told_packed = ek.rollout_weights(
        old[inside],
        engine[inside],
        mask[inside],
        **settings,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)]),
        segment_ids=segments[inside] if by_segment else None,
        num_segments=10,
    )
    assert_close(packed, padded[inside], rtol=0, atol=0)
    for name, value in told.items():
        assert_close(told_packed[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_modes_of_trl():
    """Two tokens and two sequences by hand, as TRL 1.16 computes its four modes."""
    old = torch.tensor([[0.5, 0.9], [0.5, 0.2]]).log()
    engine = torch.tensor([[0.25, 0.45], [0.5, 0.8]]).log()  # ratios 2, 2 | 1, 0.25; by sequence 4 | 0.25
    mask = torch.ones(2, 2)

    def weights(mode, level):
        return ek.rollout_weights(old, engine, mask, mode=mode, level=level, low=0.5, high=3.0)[0].tolist()

    assert weights("truncate", "token") == [pytest.approx([2, 2]), pytest.approx([1, 0.5])]
    assert weights("mask", "token") == [pytest.approx([2, 2]), pytest.approx([1, 0])]
    assert weights("truncate", "sequence") == [pytest.approx([3, 3]), pytest.approx([0.5, 0.5])]
    assert weights("mask", "sequence") == [[0, 0], [0, 0]]
    old[1, 1] = math.log(0.25)  # a geometric mean of (0.25 / 0.8)^(1/2)
    assert weights("mask", "geometric") == [pytest.approx([2, 2]), pytest.approx([0.559017, 0.559017])]


def test_bounds_themselves_are_kept():
    old, engine = torch.zeros(4, dtype=torch.float64), -torch.tensor([0.5, 5.0, 0.4999, 5.001]).double().log()
    weights, metrics = ek.rollout_weights(old, engine, torch.ones(4), mode="mask", low=0.5, high=5.0)
    assert weights.tolist() == [pytest.approx(0.5), pytest.approx(5.0), 0, 0]
    assert float(metrics["rollout_is_ratio_fraction_high"]) == float(metrics["rollout_is_ratio_fraction_low"]) == 0.25


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (3,), (0,)])
@pytest.mark.parametrize("level", LEVELS)
def test_no_token_counts(shape, level):
    borders = torch.tensor([0, *shape]) if len(shape) == 1 else None
    values = torch.full(shape, NAN)
    weights, metrics = ek.rollout_weights(values, values, torch.zeros(shape), level=level, cu_seqlens=borders)
    assert weights.shape == shape
    assert not weights.any()
    assert all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize("level", LEVELS)
def test_one_token(level):
    weights, metrics = ek.rollout_weights(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.ones(1, 1), level=level)
    assert weights.tolist() == [[2.0]]
    assert float(metrics["rollout_is_ratio_mean"]) == pytest.approx(math.e)


@pytest.mark.parametrize("mode", MODES)
def test_a_ratio_that_is_no_number_stays_one(mode):
    weights, _ = ek.rollout_weights(torch.tensor([0.0, NAN]), torch.zeros(2), torch.ones(2), mode=mode)
    assert weights[0] == 1
    assert weights[1].isnan()


def test_infinite_ratios():
    """A token that the learner calls impossible weighs 0; one that the engine did is truncated, or rejected."""
    old, engine = torch.tensor([-math.inf, 0.0]), torch.tensor([0.0, -math.inf])
    assert ek.rollout_weights(old, engine, torch.ones(2))[0].tolist() == [0.0, 2.0]
    assert ek.rollout_weights(old, engine, torch.ones(2), mode="mask", low=0.5)[0].tolist() == [0.0, 0.0]


def test_no_gradient_flows():
    old = torch.zeros(3, requires_grad=True)
    weights, metrics = ek.rollout_weights(old, torch.zeros(3), torch.ones(3))
    assert not weights.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_the_loss_takes_the_weights():
    logits, tokens = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    old = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    weights, _ = ek.rollout_weights(old, old - math.log(1.5), torch.ones(2, 3))
    cfg = ek.EPOConfig(entropy_coeff=0.0)

    def loss(**given):
        return ek.epo_loss(logits, tokens, old, torch.ones(2, 3), torch.ones(2, 3), cfg, **given).loss

    assert_close(loss(is_weights=weights), 1.5 * loss())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "clip"}, ValueError, "mode must be one of truncate, mask"),
        ({"level": "turn"}, ValueError, "level must be one of token, sequence, geometric"),
        ({"low": 3.0}, ValueError, "low and high"),
        ({"low": -1.0}, ValueError, "low must be"),
        ({"high": 0.0}, ValueError, "low and high"),
        ({"high": torch.tensor(2.0)}, TypeError, "high must be a number"),
        ({"old_log_probs": torch.zeros(4).half()}, TypeError, "old_log_probs must be float32"),
        ({"old_log_probs": [0.0] * 4}, TypeError, "old_log_probs must be a tensor"),
        ({"old_log_probs": torch.zeros(1, 2, 2)}, ValueError, "old_log_probs must be"),
        ({"rollout_log_probs": torch.zeros(3)}, ValueError, "rollout_log_probs"),
        ({"mask": torch.full((4,), 0.5)}, ValueError, "mask must be bool"),
        ({"level": "sequence"}, ValueError, "cu_seqlens or segment_ids must be given"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must rise"),
        ({"segment_ids": torch.tensor([0, 0, 1, 4])}, ValueError, "segment_ids must be in"),
        ({"segment_ids": torch.zeros(4)}, TypeError, "segment_ids must be int64"),
        ({"segment_ids": torch.zeros(4).long(), "num_segments": 0}, ValueError, "num_segments must be"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"old_log_probs": torch.zeros(4), "rollout_log_probs": torch.zeros(4), "mask": torch.ones(4), **change}
    with pytest.raises(error, match=message):
        ek.rollout_weights(**given)


def test_borders_belong_to_packed_tokens():
    with pytest.raises(ValueError, match="cu_seqlens goes with packed"):
        ek.rollout_weights(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4]))
