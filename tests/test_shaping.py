"""Shaped advantages: plain versions turn by turn, packed against padded, and the order of an episode's turns."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek

NAN = math.nan
RULES = ("repo", "aem", "empg")


def batch(rows=6, time=8, seed=0):
    """NaN where the mask is 0; a row without tokens, a turn without tokens, and rows of two or three turns."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=generator) < 0.8
    mask[:, 0] = True
    mask[1] = False
    local = (torch.arange(time) >= 3).long() + (torch.arange(time) >= 6).long()
    segments = (torch.arange(rows) * 3)[:, None] + local
    mask &= segments != 7  # the second turn of the third row
    values = [torch.randn(rows, time, generator=generator), 2 * torch.rand(rows, time, generator=generator)]
    values.append(-torch.rand(rows, time, generator=generator))
    advantages, entropy, log_probs = (torch.where(mask, value, NAN) for value in values)
    return advantages, entropy, log_probs, mask, segments


def turns_of(mask, segments, episodes):
    """[(episode, segment, its counted places)] in the order of the batch."""
    found = {}
    for row, column in zip(*np.nonzero(np.asarray(mask)), strict=True):
        found.setdefault(int(segments[row, column]), []).append((row, column))
    return [(int(episodes[places[0][0]]), segment, places) for segment, places in found.items()]


def plain(rule, advantages, entropy, log_probs, mask, segments, episodes, groups, coeff, k=1.0, zeta=0.05):
    shaped = np.zeros(mask.shape)
    advantages, entropy, log_probs = (value.double().numpy() for value in (advantages, entropy, log_probs))
    if rule == "repo":
        for place in zip(*np.nonzero(np.asarray(mask)), strict=True):
            shaped[place] = advantages[place] - coeff * (log_probs[place] + entropy[place])
        return shaped
    turns = turns_of(mask, segments, episodes)
    means = [np.mean([entropy[place] for place in places]) for _, _, places in turns]
    group = [int(groups[places[0][0]]) for _, _, places in turns]
    certain = []
    for own, mean in zip(group, means, strict=True):
        others = [value for value, other in zip(means, group, strict=True) if other == own]
        width = max(others) - min(others)
        certain.append((mean - min(others)) / width if width else 0.0)
    for number, (episode, _, places) in enumerate(turns):
        others = [math.exp(-coeff * value) for value, g in zip(certain, group, strict=True) if g == group[number]]
        scale = math.exp(-coeff * certain[number]) / np.mean(others)
        later = [other for other in range(number + 1, len(turns)) if turns[other][0] == episode]
        bonus = zeta * math.exp(-k * certain[later[0]]) if later and rule == "empg" else 0.0
        for place in places:
            shaped[place] = advantages[place] * scale + bonus
    if rule == "empg":
        of_turns = [np.mean([shaped[place] for place in places]) for _, _, places in turns]
        for number, (_, _, places) in enumerate(turns):
            others = [value for value, g in zip(of_turns, group, strict=True) if g == group[number]]
            for place in places:
                shaped[place] -= np.mean(others)
    return shaped


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("turns", ["segments", "sequences", "several sequences an episode"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_plain_version(rule, turns, grouped):
    advantages, entropy, log_probs, mask, segments = batch()
    rows = torch.arange(len(mask))
    if turns == "sequences":
        segments = rows[:, None].expand(mask.shape)
    episodes = torch.tensor([5, 5, 2, 2, 5, 9]) if turns == "several sequences an episode" else rows
    groups = torch.tensor([7, 7, 3, 3, 7, 3]) if grouped else torch.zeros_like(rows)
    shaped = ek.shape_advantages(
        advantages,
        entropy,
        mask,
        rule=rule,
        coeff=0.7,
        log_probs=log_probs,
        clarity_coeff=1.3,
        clarity_weight=0.2,
        segment_ids=None if turns == "sequences" else segments,
        episode_ids=episodes if turns == "several sequences an episode" else None,
        group_ids=groups if grouped else None,
    )
    expected = plain(
        rule, advantages, entropy, log_probs, mask, segments.numpy(), episodes, groups, 0.7, k=1.3, zeta=0.2
    )
    assert shaped.dtype == torch.float32
    assert_close(shaped.double().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_packed_equals_padded(rule, by_segment):
    advantages, entropy, log_probs, mask, segments = batch()
    lengths = [8, 0, 5, 8, 1, 7]
    inside = torch.arange(8) < torch.tensor(lengths)[:, None]
    mask &= inside
    settings = {
        "rule": rule,
        "coeff": 0.5,
        "episode_ids": torch.tensor([1, 1, 0, 1, 0, 2]),
        "group_ids": torch.tensor([0, 0, 1, 0, 1, 1]),
        "num_segments": 18,
    }
    padded = ek.shape_advantages(
        advantages, entropy, mask, log_probs=log_probs, segment_ids=segments if by_segment else None, **settings
    )
    packed = ek.shape_advantages(
        advantages[inside],
        entropy[inside],
        mask[inside],
        log_probs=log_probs[inside],
        segment_ids=segments[inside] if by_segment else None,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)]),
        **settings,
    )
    assert_close(packed, padded[inside], rtol=0, atol=0)


def test_repo_by_hand():
    """log π + H is 0 on average: a token more likely than the average loses advantage."""
    shaped = ek.shape_advantages(
        torch.tensor([1.0]),  # one a sequence
        torch.tensor([[0.5, 0.5, 0.5]]),
        torch.tensor([[1, 1, 0]]),
        rule="repo",
        coeff=0.1,
        log_probs=torch.tensor([[-0.1, -2.5, NAN]]),
    )
    assert shaped.tolist() == [pytest.approx([1 - 0.1 * 0.4, 1 + 0.1 * 2.0, 0.0])]


def test_aem_by_hand():
    """Two turns: H̃ 0 and 1, scales 2 / (1 + e^-1) and 2 e^-1 / (1 + e^-1); the mean scale is 1."""
    entropy, mask = torch.tensor([[0.2, 0.2], [0.8, 0.8]]), torch.ones(2, 2)
    shaped = ek.shape_advantages(torch.tensor([1.0, -1.0]), entropy, mask, rule="aem", coeff=1.0)
    scales = [2 / (1 + math.exp(-1)), 2 * math.exp(-1) / (1 + math.exp(-1))]
    assert shaped.tolist() == [pytest.approx([scales[0]] * 2), pytest.approx([-scales[1]] * 2)]


def test_empg_by_hand():
    """One episode of two turns, A = 1: the first turn gets the clarity of the second, and the mean is subtracted."""
    entropy, segments = torch.tensor([[0.2, 0.2, 0.8]]), torch.tensor([[0, 0, 1]])
    shaped = ek.shape_advantages(
        torch.tensor([1.0]), entropy, torch.ones(1, 3), rule="empg", coeff=1.0, clarity_weight=0.1, segment_ids=segments
    )
    e = math.exp(-1)
    first, second = 2 / (1 + e) + 0.1 * e, 2 * e / (1 + e)
    half = (first - second) / 2
    assert shaped.tolist() == [pytest.approx([half, half, -half])]


@pytest.mark.parametrize("rule", ["aem", "empg"])
def test_equal_entropies_scale_nothing(rule):
    shaped = ek.shape_advantages(
        torch.tensor([1.0, -1.0]), torch.full((2, 3), 0.4), torch.ones(2, 3), rule=rule, coeff=3.0, clarity_weight=0
    )
    assert_close(shaped, torch.tensor([[1.0], [-1.0]]).expand(2, 3))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (3,), (0,)])
@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_no_token_counts(rule, shape, by_segment):
    values, segments = torch.full(shape, NAN), torch.full(shape, -1)
    shaped = ek.shape_advantages(
        values,
        values,
        torch.zeros(shape),
        rule=rule,
        coeff=1.0,
        log_probs=values,
        segment_ids=segments if by_segment else None,
        cu_seqlens=torch.tensor([0, *shape]) if len(shape) == 1 else None,
    )
    assert shaped.shape == shape
    assert not shaped.any()


@pytest.mark.parametrize(("rule", "expected"), [("repo", 2 - 0.5 * (-1 + 0.3)), ("aem", 2.0), ("empg", 0.0)])
def test_one_token(rule, expected):
    one = torch.ones(1, 1)
    shaped = ek.shape_advantages(2 * one, 0.3 * one, one, rule=rule, coeff=0.5, log_probs=-one)
    assert shaped.item() == pytest.approx(expected)


def test_an_entropy_that_is_no_number_stays_one():
    entropy = torch.tensor([[0.1, NAN], [0.2, 0.3]])
    for rule in RULES:
        shaped = ek.shape_advantages(
            torch.ones(2), entropy, torch.ones(2, 2), rule=rule, coeff=1.0, log_probs=torch.zeros(2, 2)
        )
        assert shaped[0, 1].isnan()


def test_no_gradient_flows_and_a_tensor_may_be_the_coefficient():
    entropy, log_probs = torch.rand(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    for rule in RULES:
        given = {"rule": rule, "log_probs": log_probs}
        shaped = ek.shape_advantages(torch.ones(2), entropy, torch.ones(2, 3), coeff=torch.tensor(0.5), **given)
        assert not shaped.requires_grad
        assert_close(shaped, ek.shape_advantages(torch.ones(2), entropy, torch.ones(2, 3), coeff=0.5, **given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "grpo"}, ValueError, "rule must be one of repo, aem, empg"),
        ({"coeff": NAN}, ValueError, "coeff must be finite"),
        ({"coeff": torch.ones(2)}, ValueError, "coeff must be a number or a 0-d tensor"),
        ({"rule": "repo"}, ValueError, "log_probs must be given with rule='repo'"),
        ({"rule": "repo", "log_probs": torch.zeros(4).bfloat16()}, TypeError, "log_probs must be float32"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages"),
        ({"entropy": torch.zeros(4).long()}, TypeError, "entropy must be floating"),
        ({"mask": torch.full((4,), 2)}, ValueError, "mask must be bool"),
        ({}, ValueError, "segment_ids or cu_seqlens must be given"),
        ({"segment_ids": torch.zeros(4).long(), "rule": "empg"}, ValueError, "cu_seqlens must be given"),
        ({"segment_ids": torch.tensor([0, 0, 0, 4])}, ValueError, "segment_ids must be in"),
        ({"cu_seqlens": torch.tensor([0, 4]), "group_ids": torch.zeros(1)}, TypeError, "group_ids must be an int64"),
        ({"cu_seqlens": torch.tensor([0, 4]), "group_ids": torch.zeros(4).long()}, ValueError, "group_ids must have"),
        (
            {"cu_seqlens": torch.tensor([0, 4]), "episode_ids": torch.zeros(2).long(), "rule": "empg"},
            ValueError,
            "episode_ids must have",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 4]), "rule": "empg", "clarity_weight": math.inf},
            ValueError,
            "clarity_weight",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    given = {
        "advantages": torch.zeros(4),
        "entropy": torch.zeros(4),
        "mask": torch.ones(4),
        "rule": "aem",
        "coeff": 1.0,
    }
    with pytest.raises(error, match=message):
        ek.shape_advantages(**{**given, **change})
