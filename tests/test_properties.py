"""What holds for any shape, mask and settings (hypothesis)."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import epo_kernels as ek
from tests.cases import MODES, PENALTIES, assert_equals_plain, random_case, run, to_packed

MODERATELY = settings(deadline=None, max_examples=60, derandomize=True)
F64 = {"dtype": torch.float64}

configs = st.builds(
    ek.EPOConfig,
    clip_ratio_low=st.floats(0, 1),
    clip_ratio_high=st.floats(0, 2),
    clip_ratio_c=st.none() | st.floats(1.01, 4),
    entropy_coeff=st.sampled_from([0.0, 1e-3, 0.5, -0.5]),
    kl_coeff=st.sampled_from([0.0, 0.01, 1.0]),
    kl_type=st.sampled_from(["k1", "k2", "k3", "abs"]),
    penalty=st.sampled_from(PENALTIES),
    penalty_alpha=st.floats(0, 3),
    smooth_coeff=st.floats(0, 2),
    band_scope=st.sampled_from(["token", "segment"]),
    loss_agg_mode=st.sampled_from(MODES),
    temperature=st.floats(0.3, 3),
)
shapes = st.fixed_dictionaries(
    {"batch": st.integers(1, 4), "time": st.integers(1, 5), "vocab": st.integers(1, 9), "seed": st.integers(0, 10**6)}
)


@st.composite
def cases(draw):
    """A padded case with every optional argument given or not."""
    shape = draw(shapes)
    case = random_case(draw(configs), **shape)
    size = (shape["batch"], shape["time"])
    generator = torch.Generator().manual_seed(shape["seed"] + 1)

    def uniform(*size):
        return 0.2 + torch.rand(*size, generator=generator, **F64)

    vocab_size = draw(st.none() | st.integers(1, shape["vocab"]))
    if vocab_size is not None:
        case["tokens"].clamp_(max=vocab_size - 1)
    ids = torch.randint(size[0] * size[1], size, generator=generator)
    choices = {
        "vocab_size": [vocab_size],
        "old_log_probs": [case["old_log_probs"], None],
        "advantages": [case["advantages"], case["advantages"][:, 0].contiguous()],
        "is_weights": [None, uniform(*size), uniform(size[0])],
        "temperature": [None, 0.7, torch.tensor(1.3), uniform(*size)],
        "segment_ids": [None, ids],
        "penalty_weight": [0.0, 1.0, torch.tensor(1.7, **F64)],
        "normalizer": [None, 3, torch.tensor(5.0)],
        "loss_scale": [1.0, -2.5],
        "max_length": [None, 11],
        "logit_softcap": [None, 2.5],
        "logit_scale": [None, 0.6],
    }
    return case | {name: draw(st.sampled_from(values)) for name, values in choices.items()}


@settings(MODERATELY, max_examples=200)
@given(cases())
def test_loss_gradient_and_metrics_equal_plain_python(case):
    assert_equals_plain(case, rtol=1e-8, atol=1e-9)


@MODERATELY
@given(cases(), st.data())
def test_packed_equals_plain_python_and_padded(case, data):
    batch, time = case["tokens"].shape
    lengths = [data.draw(st.integers(0, time)) for _ in range(batch)]
    count = sum(lengths)
    assume(count not in (0, batch))  # of N = B tokens, (N,) and (num_sequences,) cannot be distinguished
    if case["segment_ids"] is not None:
        case["segment_ids"] %= count
    packed, kept = to_packed(case, lengths)
    packed["max_length"] = case["max_length"] or time
    out, gradient, _ = assert_equals_plain(packed, rtol=1e-8, atol=1e-9)
    whole, whole_gradient = run({**case, "mask": case["mask"] & kept, "max_length": packed["max_length"]})
    assert_close(out.loss, whole.loss, rtol=1e-9, atol=1e-12)
    assert_close(gradient, whole_gradient[kept], rtol=1e-9, atol=1e-12)


def statistics(logits, tokens=None):
    tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64) if tokens is None else tokens
    return ek.log_probs_and_entropy(logits, tokens, backend="reference")


logit_rows = st.integers(1, 12).flatmap(
    lambda vocab: st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-math.inf), min_size=vocab, max_size=vocab)
        .filter(lambda row: max(row) > -math.inf)
        .map(tuple),
        min_size=1,
        max_size=4,
    )
)


@MODERATELY
@given(logit_rows)
def test_entropy_lies_between_0_and_log_of_the_possibilities(rows):
    logits = torch.tensor(rows)
    log_probs, entropy = statistics(logits)
    possible = (logits > -math.inf).sum(-1)
    assert (entropy >= -1e-6).all()
    assert (entropy <= possible.log() + 1e-6).all()
    assert (log_probs <= 1e-6).all()


@MODERATELY
@given(cases())
def test_gradients_sum_to_zero_over_the_vocabulary(case):
    _, gradient = run({**case, "logit_softcap": None})
    scale = gradient.abs().sum(-1)
    assert (gradient.sum(-1).abs() <= 1e-12 * scale + 1e-15).all()


@MODERATELY
@given(cases(), st.randoms(use_true_random=False))
def test_a_permutation_of_the_vocabulary_permutes_the_gradient(case, random):
    case["vocab_size"] = None
    order = list(range(case["logits"].shape[-1]))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    out, gradient = run(case)
    permuted, permuted_gradient = run({**case, "logits": case["logits"][..., order], "tokens": place[case["tokens"]]})
    assert_close(permuted.loss, out.loss, rtol=1e-8, atol=1e-10)
    assert_close(permuted_gradient, gradient[..., order], rtol=1e-8, atol=1e-10)


@MODERATELY
@given(cases(), st.floats(-1e3, 1e3))
def test_a_constant_added_to_a_row_changes_nothing(case, offset):
    case["logit_softcap"] = None
    out, gradient = run(case)
    moved, moved_gradient = run({**case, "logits": case["logits"] + offset})
    assert_close(moved.loss, out.loss, rtol=1e-8, atol=1e-8)
    assert_close(moved_gradient, gradient, rtol=1e-8, atol=1e-8)


@MODERATELY
@given(cases(), st.sampled_from([-3.0, 0.0, 0.25, 1e4]))
def test_loss_scale_and_normalizer_scale_everything_weighted(case, factor):
    out, gradient = run(case)
    scaled, scaled_gradient = run({**case, "loss_scale": case["loss_scale"] * factor})
    assert_close(scaled.loss, out.loss * factor, rtol=1e-11, atol=1e-13)
    assert_close(scaled_gradient, gradient * factor, rtol=1e-11, atol=1e-13)
    assert torch.equal(scaled.metrics.entropy_sum, out.metrics.entropy_sum)
    halved, halved_gradient = run({**case, "normalizer": 6.0})
    whole, whole_gradient = run({**case, "normalizer": 3.0})
    assert_close(halved.loss * 2, whole.loss, rtol=1e-11, atol=1e-13)
    assert_close(halved_gradient * 2, whole_gradient, rtol=1e-11, atol=1e-13)


@MODERATELY
@given(cases())
def test_the_order_of_sequences_does_not_matter(case):
    flipped = {
        name: value.flip(0) if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in case.items()
    }
    if "entropy_bounds" in case:
        flipped["entropy_bounds"] = tuple(bound.flip(0) for bound in case["entropy_bounds"])
    out, gradient = run(case)
    other, other_gradient = run(flipped)
    assert_close(other.loss, out.loss, rtol=1e-10, atol=1e-12)
    assert_close(other_gradient.flip(0), gradient, rtol=1e-10, atol=1e-12)
    assert_close(other.metrics.values, out.metrics.values, rtol=1e-10, atol=1e-12)


@MODERATELY
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 10, width=32)), max_size=6), min_size=1, max_size=5),
    st.none() | st.integers(1, 3),
    st.sampled_from(["turn", "global"]),
    st.sampled_from(["token", "step"]),
)
def test_history_equals_plain_python(steps, window, scope, weighting):
    history = ek.EntropyHistory(4, window=window, scope=scope, weighting=weighting)
    for tokens in steps:
        turns, values = zip(*tokens, strict=True) if tokens else ((), ())
        history.update(torch.tensor(turns, dtype=torch.int64), torch.tensor(values, **F64), torch.ones(len(tokens)))
        history.commit()
    kept = steps[-window:] if window else steps
    for turn, mean in enumerate(history.means().tolist()):
        seen = [[value for t, value in tokens if scope == "global" or t == turn] for tokens in kept]
        seen = [values for values in seen if values]
        if weighting == "step":
            seen = [[math.fsum(values) / len(values) for values in seen]] if seen else []
        flat = [value for values in seen for value in values]
        expected = math.fsum(flat) / len(flat) if flat else math.nan
        # Each entropy is rounded to a multiple of 2^-32 nat, so that sums don't depend on their order.
        assert mean == pytest.approx(expected, rel=1e-12, abs=2**-32, nan_ok=True)


@given(cases())
@settings(MODERATELY, max_examples=20)
def test_a_config_rebuilt_from_its_fields_is_the_same(case):
    assert ek.EPOConfig(**dataclasses.asdict(case["cfg"])) == case["cfg"]
