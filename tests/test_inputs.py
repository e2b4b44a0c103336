"""Invalid arguments of the loss are named before any work; valid ones are used unchanged."""

import math
import warnings

import numpy as np
import pytest
import torch

import epo_kernels as ek
from epo_kernels import inputs
from tests.cases import assert_identical, random_case, run

F32 = torch.float32


def ones(*shape, dtype=F32):
    return torch.ones(*shape, dtype=dtype)


def tokens_with(value):
    return torch.zeros(3, 5, dtype=torch.int64).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))


HINGE = ek.EPOConfig(penalty="hinge")
SEGMENT = ek.EPOConfig(penalty="hinge", band_scope="segment")
BANDS = (ones(3, 5), ones(3, 5))

# (arguments that replace good ones, error, pattern); the good ones are a padded batch (3, 5, 7).
WRONG = {
    "logits list": ({"logits": [[1.0]]}, TypeError, r"logits must be a tensor, got list"),
    "logits int": ({"logits": ones(3, 5, 7, dtype=torch.int64)}, TypeError, r"logits must be float32.*got torch.int64"),
    "logits 1-d": ({"logits": ones(7)}, ValueError, r"logits must be \(batch, time, width\) or packed.*got \(7,\)"),
    "logits 4-d": ({"logits": ones(1, 3, 5, 7)}, ValueError, r"logits must be .*got \(1, 3, 5, 7\)"),
    "logits empty": ({"logits": ones(3, 5, 0)}, ValueError, r"logits must be .*width > 0, got \(3, 5, 0\)"),
    "tokens float": ({"tokens": ones(3, 5)}, TypeError, r"tokens must be int64 \(or int32\), got torch.float32"),
    "tokens shape": ({"tokens": ones(3, 4).long()}, ValueError, r"tokens must have shape \(3, 5\), got \(3, 4\)"),
    "tokens none": ({"tokens": None}, TypeError, r"tokens must be a tensor, got NoneType"),
    "token high": ({"tokens": tokens_with(7)}, ValueError, r"tokens must be in \[0, 7\).*got 7 at row 1, position 2"),
    "token low": ({"tokens": tokens_with(-100)}, ValueError, r"tokens must be in .*-100 labels.*got -100 at row 1"),
    "token tail": ({"tokens": tokens_with(6), "vocab_size": 6}, ValueError, r"tokens must be in \[0, 6\).*got 6"),
    "device": ({"tokens": ones(3, 5).long().to("meta")}, ValueError, r"tokens must be on cpu.*got meta"),
    "old shape": ({"old_log_probs": ones(3, 4)}, ValueError, r"old_log_probs must have the shape of tokens \(3, 5\)"),
    "old number": ({"old_log_probs": 0.0}, TypeError, r"old_log_probs must be a tensor, got float"),
    "old int": ({"old_log_probs": ones(3, 5).long()}, TypeError, "old_log_probs must be floating-point, got"),
    "advantages shape": ({"advantages": ones(5)}, ValueError, r"advantages must have .* sequence \(3,\), got \(5,\)"),
    "advantages none": ({"advantages": None}, TypeError, r"advantages must be a tensor, got NoneType"),
    "mask none": ({"mask": None}, TypeError, r"mask must be a tensor.*got None"),
    "mask shape": ({"mask": ones(3)}, ValueError, r"mask must have shape \(3, 5\), got \(3,\)"),
    "mask half": ({"mask": ones(3, 5) / 2}, ValueError, r"mask must be bool.*0 and 1, got 0.5 at row 0, position 0"),
    "mask two": ({"mask": 2 * ones(3, 5).long()}, ValueError, r"mask must be bool.*0 and 1, got 2 at row 0"),
    "mask nan": ({"mask": ones(3, 5) * math.nan}, ValueError, r"mask must be bool.*0 and 1, got nan"),
    "cfg": ({"cfg": {"entropy_coeff": 0}}, TypeError, r"cfg must be an EPOConfig, got dict"),
    "no bounds": (
        {"cfg": HINGE},
        ValueError,
        r"entropy_bounds must be \(lower, upper\) if penalty is 'hinge', got None",
    ),
    "bounds nan": (
        {"entropy_bounds": (ones(3, 5), ones(3, 5) * math.nan)},
        ValueError,
        r"entropy_bounds must be \(lower, upper\), lower <= upper.*got \[1.0, nan\] at row 0, position 0",
    ),
    "bounds crossed": (
        {"cfg": HINGE, "entropy_bounds": (ones(3) * 2, ones(3))},
        ValueError,
        r"entropy_bounds must be .*lower <= upper.*got \[2.0, 1.0\]",
    ),
    "bounds crossed a turn": (
        {
            "cfg": SEGMENT,
            "entropy_bounds": (torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0])),
            "segment_ids": tokens_with(1),
        },
        ValueError,
        r"entropy_bounds must be .*got \[3.0, 2.0\] at row 1, position 2",
    ),
    "bounds tensor": ({"entropy_bounds": ones(2, 3, 5)}, TypeError, r"entropy_bounds must be a pair.*got Tensor"),
    "bounds numbers": ({"entropy_bounds": (0.0, 1.0)}, TypeError, r"entropy_bounds must be a pair of tensors"),
    "bounds three": ({"entropy_bounds": (*BANDS, BANDS[0])}, TypeError, r"entropy_bounds must be a pair"),
    "bounds differ": (
        {"entropy_bounds": (ones(3), ones(3, 5))},
        ValueError,
        r"entropy_bounds must be a pair with the same shape, got \(3,\) and \(3, 5\)",
    ),
    "bounds shape": ({"entropy_bounds": (ones(4), ones(4))}, ValueError, r"entropy_bounds\[0\] must have .*got \(4,\)"),
    "bounds int": ({"entropy_bounds": (BANDS[0], BANDS[1].long())}, TypeError, r"entropy_bounds\[1\] must be floating"),
    "no segments": (
        {"entropy_bounds": (ones(0), ones(0)), "segment_ids": ones(3, 5).long()},
        ValueError,
        r"entropy_bounds must hold at least one band, got shape \(0,\)",
    ),
    "segments float": ({"cfg": SEGMENT, "entropy_bounds": BANDS, "segment_ids": ones(3, 5)}, TypeError, r"segment_ids"),
    "segments shape": (
        {"cfg": SEGMENT, "entropy_bounds": BANDS, "segment_ids": ones(3).long()},
        ValueError,
        r"segment_ids must have shape \(3, 5\), got \(3,\)",
    ),
    "segment high": (
        {"cfg": SEGMENT, "entropy_bounds": (ones(4), ones(4)), "segment_ids": tokens_with(4)},
        ValueError,
        r"segment_ids must be in \[0, 4\) where the mask is 1.*got 4 at row 1, position 2",
    ),
    "segment low": (
        {"cfg": HINGE, "entropy_bounds": (ones(4), ones(4)), "segment_ids": tokens_with(-1)},
        ValueError,
        r"segment_ids must be in \[0, 4\).*got -1",
    ),
    "segment past tokens": (
        {"cfg": SEGMENT, "entropy_bounds": BANDS, "segment_ids": tokens_with(15)},
        ValueError,
        r"segment_ids must be in \[0, 15\).*got 15",
    ),
    "kl without ref": ({"kl_coeff": 0.1}, ValueError, r"ref_log_probs must be given unless kl_coeff is 0, got None"),
    "kl tensor without ref": ({"kl_coeff": torch.tensor(0.0)}, ValueError, r"ref_log_probs must be given"),
    "ref shape": ({"ref_log_probs": ones(5, 3)}, ValueError, r"ref_log_probs must have the shape of tokens"),
    "is_weights": ({"is_weights": ones(3, 5, 1)}, ValueError, r"is_weights must have the shape of tokens"),
    "cu on padded": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        r"cu_seqlens goes with packed logits, got a padded batch of 3; pack the rows",
    ),
    "max_length": (
        {"cfg": ek.EPOConfig(loss_agg_mode="seq-mean-token-sum-norm"), "max_length": 0},
        ValueError,
        r"max_length must be an int of at least 1, got 0",
    ),
    "max_length float": (
        {"cfg": ek.EPOConfig(loss_agg_mode="seq-mean-token-sum-norm"), "max_length": 8.0},
        ValueError,
        r"max_length must be an int of at least 1, got 8.0",
    ),
    "vocab 0": ({"vocab_size": 0}, ValueError, r"vocab_size must be an int in \[1, 7\].*got 0"),
    "vocab 8": ({"vocab_size": 8}, ValueError, r"vocab_size must be an int in \[1, 7\].*got 8"),
    "vocab bool": ({"vocab_size": True}, ValueError, r"vocab_size must be an int in \[1, 7\].*got True"),
    "temperature 0": ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0.0"),
    "temperature text": (
        {"temperature": "1"},
        TypeError,
        r"temperature must be a number .*got '1' \(str",
    ),
    "temperature shape": ({"temperature": ones(5)}, ValueError, r"temperature must have the shape of tokens"),
    "temperature underflows": ({"temperature": 1e-40}, ValueError, r"temperature must be between 1.18e-38.*got 1e-40"),
    "temperature of a scale": (
        {"temperature": 1e-37, "logit_scale": 1e2},
        ValueError,
        r"temperature must be between 1.18e-36 .*got 1e-37",
    ),
    "temperature of a softcap": ({"temperature": 1e-37, "logit_softcap": 30.0}, ValueError, r"temperature must be b"),
    "temperature overflows": ({"temperature": 1e39}, ValueError, r"temperature must be between .*got 1e\+39"),
    "temperature 0-d": ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature must be > 0, .*got 0.0 at row 0"),
    "temperature 0-d nan": ({"temperature": torch.tensor(math.nan)}, ValueError, r"temperature must be > 0, .*got nan"),
    "temperatures inf": ({"temperature": ones(3, 5) * math.inf}, ValueError, r"temperature must be > 0, .*got inf"),
    "temperatures tiny": ({"temperature": ones(3) * 1e-40}, ValueError, r"temperature must be > 0, .*large enough"),
    "scale 0": ({"logit_scale": 0}, ValueError, r"logit_scale must be None, or .* between 1.18e-38 .*got 0"),
    "scale tiny": ({"logit_scale": -1e-50}, ValueError, r"logit_scale must be None, or .*got -1e-50"),
    "scale huge": ({"logit_scale": 1e39}, ValueError, r"logit_scale must be None, or .*got 1e\+39"),
    "softcap tiny": ({"logit_softcap": 1e-40}, ValueError, r"logit_softcap must be None, or .*got 1e-40"),
    "softcap of a scale": (
        {"logit_softcap": 1e-20, "logit_scale": 1e20},
        ValueError,
        r"logit_softcap must be large enough to divide logit_scale, got 1e-20",
    ),
    "softcap 0": ({"logit_softcap": 0.0}, ValueError, r"logit_softcap must be finite and > 0, got 0.0"),
    "softcap tensor": ({"logit_softcap": torch.tensor(1.0)}, TypeError, r"logit_softcap must be a number or None"),
    "scale inf": ({"logit_scale": math.inf}, ValueError, r"logit_scale must be finite, got inf"),
    "coeff vector": ({"entropy_coeff": ones(1)}, ValueError, r"entropy_coeff must be .*0-d tensor, got shape \(1,\)"),
    "coeff nan": ({"entropy_coeff": math.nan}, ValueError, r"entropy_coeff must be finite, got nan"),
    "coeff bool": ({"entropy_coeff": True}, TypeError, r"entropy_coeff must be a number or a 0-d tensor, got True"),
    "num_segments of bounds": (
        {
            "cfg": SEGMENT,
            "segment_ids": torch.zeros(3, 5).long(),
            "entropy_bounds": (ones(4), ones(4)),
            "num_segments": 5,
        },
        ValueError,
        r"num_segments must be 4, the length of entropy_bounds, which are given per segment; got 5",
    ),
    "penalty_weight": ({"penalty_weight": None}, TypeError, r"penalty_weight must be a number .*got None"),
    "normalizer": ({"normalizer": -1}, ValueError, r"normalizer must be finite and >= 0, got -1"),
    "loss_scale": ({"loss_scale": math.inf}, ValueError, r"loss_scale must be finite, got inf"),
    "backend": ({"backend": "cuda9"}, ValueError, r"backend must be one of auto, reference.*got 'cuda9'"),
}

# The same for a packed batch (6, 7).
WRONG_PACKED = {
    "cu list": ({"cu_seqlens": [0, 6]}, TypeError, r"cu_seqlens must be an int32 or int64 tensor, got list"),
    "cu float": ({"cu_seqlens": ones(2)}, TypeError, r"cu_seqlens must be an int32 or int64 tensor, got torch.float32"),
    "cu scalar": (
        {"cu_seqlens": torch.tensor([6])},
        ValueError,
        r"cu_seqlens must be \(num_sequences \+ 1,\)",
    ),
    "cu start": (
        {"cu_seqlens": torch.tensor([1, 6])},
        ValueError,
        r"cu_seqlens must rise from 0 to the 6 tokens, got 1 as its first border",
    ),
    "cu end": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens must rise .*, got 5 as its last border"),
    "cu order": (
        {"cu_seqlens": torch.tensor([0, 5, 3, 6])},
        ValueError,
        r"cu_seqlens must rise from 0 to the 6 tokens, got 3 after 5 at place 2 of 4",
    ),
    "cu batch": ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens must be .*cu_seqlens.squeeze\(0\)"),
    "mode": (
        {"cfg": ek.EPOConfig(loss_agg_mode="seq-mean-token-mean")},
        ValueError,
        r"cu_seqlens must be given for packed logits with loss_agg_mode='seq-mean-token-mean'",
    ),
    "scope": (
        {"cfg": SEGMENT, "entropy_bounds": (ones(6), ones(6))},
        ValueError,
        r"cu_seqlens must be given for packed logits with .*band_scope='segment'",
    ),
    "max_length": (
        {"cfg": ek.EPOConfig(loss_agg_mode="seq-mean-token-sum-norm"), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        r"max_length must be given for packed logits",
    ),
    "advantages": ({"advantages": ones(1)}, ValueError, r"cu_seqlens must be given to expand advantages \(1,\)"),
    "mask": ({"mask": ones(1, 6)}, ValueError, r"mask must have shape \(6,\), got \(1, 6\); pass mask.squeeze\(0\)"),
    "old": ({"old_log_probs": ones(1, 6)}, ValueError, r"old_log_probs must have .*; pass old_log_probs.squeeze\(0\)"),
    "rows": (
        {"logits": ones(1, 6, 7), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        r"cu_seqlens goes with packed logits, got a padded batch of 1; pass logits.squeeze\(0\), and squeeze\(0\) of",
    ),
}


def packed_case():
    return {
        "logits": torch.randn(6, 7),
        "tokens": torch.zeros(6, dtype=torch.int64),
        "old_log_probs": torch.zeros(6),
        "advantages": torch.ones(6),
        "mask": torch.ones(6, dtype=torch.bool),
        "cfg": ek.EPOConfig(),
    }


def padded_case():
    return random_case(dtype=F32, mask=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_before_any_work(name, monkeypatch):
    arguments, error, pattern = WRONG[name]
    _refuse(padded_case(), arguments, error, pattern, monkeypatch)


@pytest.mark.parametrize("name", WRONG_PACKED)
def test_wrong_packed_arguments_are_named_before_any_work(name, monkeypatch):
    arguments, error, pattern = WRONG_PACKED[name]
    _refuse(packed_case(), arguments, error, pattern, monkeypatch)


def _refuse(case, arguments, error, pattern, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("the backend was called")

    monkeypatch.setattr(type(ek.backends.choose_backend("reference", torch.device("cpu"))), "epo_loss", work)
    with pytest.raises(error, match=pattern):
        ek.epo_loss(**{"backend": "reference", **case, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ({"tokens": tokens_with(7)}, ValueError, r"tokens must be in \[0, 7\)"),
        ({"mask": ones(3, 5) / 2}, ValueError, r"mask must be bool"),
        ({"temperature": -1.0}, ValueError, r"temperature must be finite and > 0"),
        ({"vocab_size": 9}, ValueError, r"vocab_size must be an int in \[1, 7\]"),
        ({"logits": ones(7)}, ValueError, r"logits must be"),
    ],
)
def test_log_probs_and_entropy_checks_the_same(arguments, error, pattern):
    good = {"logits": ones(3, 5, 7), "tokens": tokens_with(0)}
    with pytest.raises(error, match=pattern):
        ek.log_probs_and_entropy(**{**good, **arguments}, backend="reference")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_may_be_bool_or_hold_0_and_1(dtype):
    case = random_case(dtype=F32)
    assert_identical(run({**case, "mask": case["mask"].to(dtype)}), run(case))


def test_other_dtypes_that_mean_the_same():
    case = random_case(ek.EPOConfig(penalty="hinge", kl_coeff=0.1), dtype=F32)
    case["advantages"] = case["advantages"].bfloat16().float()
    case["entropy_bounds"] = tuple(bound.bfloat16().float() for bound in case["entropy_bounds"])
    wider = {name: case[name].double() for name in ("old_log_probs", "advantages", "ref_log_probs")}
    narrow = {"advantages": case["advantages"].bfloat16()}
    bounds = {"entropy_bounds": [bound.bfloat16() for bound in case["entropy_bounds"]]}
    assert_identical(run({**case, **wider, "tokens": case["tokens"].int()}), run(case))
    assert_identical(run({**case, **narrow, **bounds}), run(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["old_log_probs", "ref_log_probs", "normalizer"])
def test_what_16_bits_would_round_away_is_refused(name, dtype):
    case = {**random_case(ek.EPOConfig(kl_coeff=0.1), dtype=F32), "normalizer": torch.tensor(7.0)}
    message = f"{name} must be float32 or float64, got {dtype}, .* MixedPrecisionPolicy\\(cast_forward_inputs=False\\)"
    with pytest.raises(TypeError, match=message):
        run({**case, name: case[name].to(dtype)})


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "ref_log_probs"])
def test_log_probs_of_16_bits_are_refused(name):
    given = {name: -torch.rand(2, 3) for name in ("log_probs", "entropy", "old_log_probs", "advantages")}
    given |= {"mask": torch.ones(2, 3), "cfg": ek.EPOConfig(), "ref_log_probs": -torch.rand(2, 3)}
    ek.epo_loss_from_log_probs(**given)
    with pytest.raises(TypeError, match=f"{name} must be float32 or float64, got torch.bfloat16"):
        ek.epo_loss_from_log_probs(**{**given, name: given[name].bfloat16()})


def test_canonical_arguments_are_viewed_never_copied():
    case = random_case(dtype=F32)
    rows, layout = inputs.as_rows(case["logits"], case["tokens"], None)
    transform = inputs.LogitTransform(7, 1.0, None, None)
    scored = inputs.as_token_inputs(layout, case["tokens"], case["mask"], transform)
    old = layout.floats("old_log_probs", case["old_log_probs"])
    for view, name in ((rows, "logits"), (scored.tokens, "tokens"), (scored.mask, "mask"), (old, "old_log_probs")):
        assert view.data_ptr() == case[name].data_ptr()
    packed, layout = inputs.as_rows(case["logits"][0], case["tokens"][0], None)
    assert packed.shape == (1, 5, 7)
    assert packed.data_ptr() == case["logits"].data_ptr()
    advantages = torch.rand(3)
    _, layout = inputs.as_rows(case["logits"], case["tokens"], None)
    spread = layout.floats("advantages", advantages, a_sequence=True)
    assert (spread.shape, spread.stride(), spread.data_ptr()) == ((3, 5), (1, 0), advantages.data_ptr())


# ---- where values aren't read ---------------------------------------------------------------------------------------


def test_values_are_read_where_it_is_free_or_asked_for(monkeypatch):
    monkeypatch.delenv("EPO_KERNELS_CHECK", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert inputs.checks_values(cpu)
    assert not inputs.checks_values(cuda)
    for value, expected in (("0", False), ("1", True), ("", False)):
        monkeypatch.setenv("EPO_KERNELS_CHECK", value)
        assert inputs.checks_values(cuda) is expected
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not inputs.checks_values(cpu)


@pytest.fixture
def blind(monkeypatch):
    """As on a CUDA device: no value is read before the kernels run."""
    monkeypatch.setattr(inputs.checks, "checks_values", lambda device: False)


SEGMENTS = {"cfg": SEGMENT, "entropy_bounds": (ones(4), 2 * ones(4))}


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": tokens_with(7)},
        {"tokens": tokens_with(-100)},
        {"tokens": tokens_with(2**40)},
        {"tokens": tokens_with(6), "vocab_size": 6},
        {"mask": ones(3, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.5))},
        {"mask": ones(3, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan))},
        {**SEGMENTS, "segment_ids": tokens_with(4)},
        {**SEGMENTS, "segment_ids": tokens_with(-1)},
        {**SEGMENTS, "segment_ids": tokens_with(2**40)},
        {**SEGMENTS, "cfg": HINGE, "segment_ids": tokens_with(4)},
    ],
)
def test_unread_bad_values_make_the_loss_nan_and_are_counted(arguments):
    case = {**padded_case(), "tokens": torch.zeros(3, 5, dtype=torch.int64), **arguments}
    out, gradient = run(case)
    assert out.loss.isnan()
    assert (out.metrics.invalid_tokens, out.metrics.nonfinite_tokens) == (1, 0)
    assert out.metrics.tokens == 15
    assert out.log_probs[1, 2].isnan()
    width = case.get("vocab_size", 7)
    assert gradient[1, 2, :width].isnan().all()  # no optimizer step can take it for a gradient
    if case["cfg"] is not SEGMENT:  # a segment shares its tokens' fate
        assert torch.isfinite(gradient).sum() == 15 * 7 - width


@pytest.mark.usefixtures("blind")
def test_unread_good_values_change_nothing(monkeypatch):
    case = random_case(SEGMENT, segment_ids=torch.arange(15).reshape(3, 5) // 2)
    expected = run(case)
    monkeypatch.undo()
    assert_identical(run(case), expected)


@pytest.mark.usefixtures("blind")
def test_unread_poison_in_masked_tokens_is_not_counted():
    case = random_case(SEGMENT, dtype=F32, segment_ids=torch.zeros(3, 5, dtype=torch.int64))
    expected = run(case)
    masked = ~case["mask"]
    poison = {"tokens": case["tokens"].masked_fill(masked, -100), "segment_ids": (-7 * masked).long()}
    assert_identical(run({**case, **poison}), expected)
    assert expected[0].metrics.invalid_tokens == 0


@pytest.mark.usefixtures("blind")
def test_log_probs_and_entropy_of_an_unread_invalid_token_is_nan():
    logits = torch.randn(2, 3, requires_grad=True)
    log_probs, entropy = ek.log_probs_and_entropy(logits, torch.tensor([1, 3]), backend="reference")
    assert log_probs.isnan().tolist() == [False, True]
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("checked", ["0", "1"])
def test_meta_tensors_pass_by_shape_alone(checked, monkeypatch):
    monkeypatch.setenv("EPO_KERNELS_CHECK", checked)
    case = random_case(SEGMENT, dtype=F32)
    case["entropy_bounds"] = tuple(bound.to("meta") for bound in case["entropy_bounds"])
    case = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in case.items()}
    logits, tokens, mask = case.pop("logits").requires_grad_(), case["tokens"], case["mask"]
    hidden, weight = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((3, 5, 4), (7, 4)))
    statistics = ek.log_probs_and_entropy(logits, tokens, mask=mask)
    linear_statistics = ek.linear_log_probs_and_entropy(hidden, weight, tokens, mask=mask, num_active=12)
    given = {name: value for name, value in case.items() if name != "tokens"}
    for out, leaf in [
        (ek.epo_loss(logits, **case), logits),
        (ek.linear_epo_loss(hidden, weight, **case), hidden),
        (ek.epo_loss_from_log_probs(*statistics, **given), logits),
        (ek.epo_loss_from_log_probs(*linear_statistics, **given), weight),
    ]:
        assert (out.loss.shape, out.log_probs.shape, out.entropy.dtype) == ((), (3, 5), F32)
        assert {value.device.type for value in (out.loss, out.log_probs, out.entropy, out.metrics.values)} == {"meta"}
        assert torch.autograd.grad(out.loss, leaf, retain_graph=True)[0].shape == leaf.shape


def test_bad_values_that_cannot_be_read_make_the_loss_nan(monkeypatch):
    """If values are not read, as on CUDA: a temperature of 0, and boundaries that do not end at the token count."""
    monkeypatch.setattr(inputs.checks, "checks_values", lambda device: False)
    logits, tokens, ones = torch.randn(6, 7), torch.arange(6), torch.ones(6)
    cfg = ek.EPOConfig()
    good = {"temperature": ones, "cu_seqlens": torch.tensor([0, 2, 6])}
    assert ek.epo_loss(logits, tokens, None, ones, ones, cfg, **good).loss.isfinite()
    for bad, count in [
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0, 1.0])}, 2),
        ({"temperature": torch.tensor([1.0, 1e-40, 1.0, math.inf, math.nan, 1.0])}, 3),
        ({"temperature": torch.tensor(1e-40)}, 6),
        ({"temperature": torch.tensor(-1.0)}, 6),
        ({"cu_seqlens": torch.tensor([2, 1, 6])}, 6),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, 6),
    ]:
        out = ek.epo_loss(logits, tokens, None, ones, ones, cfg, **{**good, **bad})
        assert out.loss.isnan()
        assert out.metrics.invalid_tokens == count


def test_a_temperature_that_is_not_positive_is_named():
    logits, tokens, ones = torch.randn(6, 7), torch.arange(6), torch.ones(6)
    cold = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"temperature must be > 0, .* got 0\.0"):
        ek.epo_loss(logits, tokens, None, ones, ones, ek.EPOConfig(), temperature=cold)
    mask = cold > 0
    assert ek.epo_loss(logits, tokens, None, ones, mask, ek.EPOConfig(), temperature=cold).loss.isfinite()


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_bounds_that_nobody_reads_may_be_anything(scope):
    """Those of masked tokens and of segments without a token; infinite ones are no bounds; equal ones are a band."""
    cfg = ek.EPOConfig(penalty="hinge", band_scope=scope, entropy_coeff=0.5)
    case = random_case(cfg, dtype=F32, segment_ids=torch.zeros(3, 5, dtype=torch.int64))
    lower, upper = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 1.0, math.nan])
    assert run({**case, "entropy_bounds": (lower, upper)})[0].loss.isfinite()
    lower, upper = (torch.where(case["mask"], bound, math.nan) for bound in (-torch.inf, torch.inf))
    assert run({**case, "entropy_bounds": (lower, upper)})[0].loss.isfinite()


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("kind", [np.int64, np.uint8, Index, torch.tensor])
def test_what_stands_for_an_int_is_one(kind):
    """Like NumPy's scalars, which are numbers too."""
    logits, tokens, ones = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0]), torch.ones(6)
    head = {"hidden": logits, "weight": torch.eye(5, 4)}
    cfg = ek.EPOConfig(penalty="hinge", band_scope="segment", loss_agg_mode="seq-mean-token-sum-norm")
    arguments = {"tokens": tokens, "old_log_probs": None, "advantages": ones, "mask": ones, "cfg": cfg}
    bands = {"entropy_bounds": (ones, ones), "segment_ids": tokens, "cu_seqlens": torch.tensor([0, 6])}

    def loss(integer, scalar):
        rows = {"vocab_size": integer(3), "max_length": integer(9), "num_segments": integer(3)}
        chunks = {"num_active": integer(6), "max_chunk_bytes": integer(200)}
        numbers = {"normalizer": scalar(3), "entropy_coeff": np.float32(0.5)}
        return ek.linear_epo_loss(**head, **arguments, **bands, **rows, **chunks, **numbers).loss

    assert torch.equal(loss(kind, np.int64), loss(int, int))
    history = ek.EntropyHistory(kind(3), window=kind(2))
    assert (type(history.num_turns), type(history.window)) == (int, int)
    with pytest.raises(ValueError, match=r"vocab_size must be an int in \[1, 4\].*, got"):
        ek.epo_loss(logits, **arguments, **bands, vocab_size=kind(5))


@pytest.mark.parametrize("name", ["vocab_size", "max_length", "num_segments", "num_active", "max_chunk_bytes"])
@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, "2", torch.tensor(2.0)])
def test_what_does_not_stand_for_an_int_is_named(name, value):
    logits, tokens, ones = torch.randn(1, 6, 4), torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 6)
    cfg = ek.EPOConfig(loss_agg_mode="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=f"{name} must be an int"):
        ek.linear_epo_loss(logits, torch.eye(4), tokens, None, ones, ones, cfg, **{name: value})


def test_messages_are_short_whatever_the_size():
    count = 100_000
    logits, tokens, ones = torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64), torch.ones(count)
    borders = torch.arange(count + 1)
    borders[70_000] = 3
    for wrong, told in [
        ({"cu_seqlens": borders}, "got 3 after 69999 at place 70000 of 100001"),
        ({"vocab_size": list(range(count))}, "vocab_size must be an int"),
        ({"normalizer": list(range(count))}, "normalizer must be a number"),
    ]:
        with pytest.raises((TypeError, ValueError), match=told) as error:
            ek.epo_loss(logits, tokens, None, ones, ones, ek.EPOConfig(), **wrong)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["old_log_probs", "ref_log_probs"])
def test_log_probs_of_a_sequence_are_refused(name):
    """Expanded to tokens they would give a wrong ratio instead of an error."""
    case = {"old_log_probs": torch.zeros(4, 6), "ref_log_probs": torch.zeros(4, 6)} | {name: torch.zeros(4)}
    logits, tokens, ones = torch.randn(4, 6, 7), torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6)
    with pytest.raises(ValueError, match=rf"{name} must have the shape of tokens \(4, 6\), got \(4,\)"):
        ek.epo_loss(logits, tokens, case.pop("old_log_probs"), ones, ones, ek.EPOConfig(), **case)


def test_a_normalizer_of_zero_is_refused_where_tokens_count():
    logits, tokens, ones = torch.randn(6, 7), torch.arange(6), torch.ones(6)
    with pytest.raises(ValueError, match="normalizer must be > 0 where tokens count, got 0"):
        ek.epo_loss(logits, tokens, None, ones, ones, ek.EPOConfig(), normalizer=0)
    assert ek.epo_loss(logits, tokens, None, ones, 0 * ones, ek.EPOConfig(), normalizer=0).loss == 0


def test_more_segments_than_tokens():
    """Separate turns per sequence, as built in the docs: 4 sequences of 6 tokens in 4 x 30 segments."""
    logits, tokens, ones = torch.randn(4, 6, 7), torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6)
    turns = torch.arange(6).expand(4, 6) // 2 + 27
    cfg = ek.EPOConfig(penalty="hinge", band_scope="segment")
    keywords = {"entropy_bounds": (0.5 * ones, ones), "segment_ids": turns + 30 * torch.arange(4)[:, None]}
    with pytest.raises(ValueError, match=r"segment_ids must be in \[0, 24\)"):
        ek.epo_loss(logits, tokens, None, ones, ones, cfg, **keywords)
    many = ek.epo_loss(logits, tokens, None, ones, ones, cfg, num_segments=120, **keywords)
    keywords["segment_ids"] = torch.arange(12).repeat_interleave(2).reshape(4, 6)
    assert torch.equal(many.loss, ek.epo_loss(logits, tokens, None, ones, ones, cfg, **keywords).loss)


def test_auto_says_once_when_only_the_reference_is_left(monkeypatch):
    monkeypatch.setattr(ek.backends._BACKENDS["cpu"], "_why_unavailable", lambda: "it was not built")
    ek.backends._warn_of_reference.cache_clear()
    logits, tokens, ones = torch.randn(6, 7), torch.arange(6), torch.ones(6)
    with pytest.warns(UserWarning, match="no fused backend can run here.*cpu: it was not built"):
        ek.epo_loss(logits, tokens, None, ones, ones, ek.EPOConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.epo_loss(logits, tokens, None, ones, ones, ek.EPOConfig())
