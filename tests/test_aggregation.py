"""Token weights: the four aggregation modes by hand, and micro-batches that add up."""

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.aggregation import sequence_lengths, token_weights
from epo_kernels.inputs import Aggregation
from tests.cases import MODES, PENALTIES, random_case, run

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)  # n = 3, 0, 1: N = 4, B = 2


def weights(mode, mask=MASK, sequence_ids=None, num_sequences=3, dtype=torch.float32, **settings):
    lengths = sequence_lengths(mask, sequence_ids, num_sequences)
    return token_weights(mask, Aggregation(mode, sequence_ids, num_sequences, **settings), lengths, dtype)


@pytest.mark.parametrize(
    ("mode", "first", "last"),
    [
        ("token-mean", 1 / 4, 1 / 4),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-mean", 1 / 6, 1 / 2),
        ("seq-mean-token-sum-norm", 1 / 16, 1 / 16),  # max_length 8
    ],
)
def test_weights_by_hand(mode, first, last):
    by_hand = torch.tensor([[first, first, 0, first], [0, 0, 0, 0], [0, last, 0, 0]])
    assert torch.equal(weights(mode, max_length=8), by_hand)
    # A normalizer takes the place of N = 4 or B = 2; loss_scale multiplies.
    replaced = 4 if mode == "token-mean" else 2
    for ten in (10, 10.0, torch.tensor(10), torch.tensor(10.0)):
        assert_close(weights(mode, max_length=8, normalizer=ten), by_hand * replaced / 10)
    for three in (3.0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)):
        got = weights(mode, max_length=8, loss_scale=three)
        assert_close(got, by_hand * 3)
        assert got.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_are_the_padded_ones(mode):
    ids = torch.arange(3).repeat_interleave(4)[None]
    packed = weights(mode, mask=MASK.reshape(1, -1), sequence_ids=ids, max_length=8)
    assert torch.equal(packed.reshape(3, 4), weights(mode, max_length=8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalizer", [None, 0, 0.0, torch.tensor(0.0)])
def test_no_token_means_weights_of_exactly_zero(mode, normalizer):
    assert not weights(mode, mask=torch.zeros(3, 4, dtype=torch.bool), max_length=8, normalizer=normalizer).any()


def test_float64_weights_are_exact():
    got = weights("seq-mean-token-mean", dtype=torch.float64, normalizer=3, loss_scale=0.1)
    assert got[0, 0].item() == 0.1 / (3 * 3)


def rows_of(case, rows):
    """The micro-batch of these rows: per-token tensors have a first dimension of 6 here, per-segment ones of 12."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == 6 else value
        for name, value in case.items()
    }


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("mode", MODES)
def test_three_unequal_micro_batches_add_up_to_the_whole(mode, penalty):
    turns = torch.arange(6)[:, None] * 2 + (torch.arange(5) // 3)
    for scope in ("token", "segment"):
        cfg = ek.EPOConfig(
            loss_agg_mode=mode, penalty=penalty, band_scope=scope, entropy_coeff=0.5, kl_coeff=0.1, clip_ratio_c=1.5
        )
        case = random_case(cfg, batch=6, segment_ids=turns, is_weights=torch.rand(6, dtype=torch.float64))
        case["entropy_bounds"] = (torch.full((12,), 1.0).double(), torch.full((12,), 1.2).double())
        whole, gradient = run({**case, "loss_scale": 3.0})
        count = whole.metrics.tokens if mode == "token-mean" else whole.metrics.sequences
        parts = [
            run({**rows_of(case, rows), "normalizer": count, "loss_scale": 3.0})
            for rows in (slice(0, 1), slice(1, 5), slice(5, 6))  # the last one holds no token that counts
        ]
        close = {"rtol": 1e-12, "atol": 1e-14}
        assert_close(sum(out.loss for out, _ in parts), whole.loss, **close)
        assert_close(torch.cat([part for _, part in parts]), gradient, **close)
        metrics = parts[0][0].metrics + parts[1][0].metrics + parts[2][0].metrics
        assert_close(metrics.values, whole.metrics.values, **close)


def test_tokens_of_a_sequence_in_two_micro_batches_add_up_in_token_mean():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5))
    whole, gradient = run(case)
    halves = [
        run({**case, "mask": case["mask"] & half, "normalizer": int(case["mask"].sum())})
        for half in (torch.arange(5) < 2, torch.arange(5) >= 2)
    ]
    assert_close(halves[0][0].loss + halves[1][0].loss, whole.loss, rtol=1e-12, atol=0)
    assert_close(halves[0][1] + halves[1][1], gradient, rtol=1e-12, atol=1e-15)
