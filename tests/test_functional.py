"""epo_loss and log_probs_and_entropy as users call them: layouts, autograd, precision, backends."""

import math

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from tests import plain
from tests.cases import MODES, PENALTIES, assert_equals_plain, assert_identical, random_case, run, to_packed
from tests.test_linear import NEEDS_CPU

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(mode, band_scope):
    lengths = [5, 2, 4, 0, 3]
    keep = torch.arange(5) < torch.tensor(lengths)[:, None]
    for seed, penalty in enumerate(PENALTIES):
        cfg = ek.EPOConfig(
            loss_agg_mode=mode,
            band_scope=band_scope,
            penalty=penalty,
            kl_coeff=0.1,
            entropy_coeff=0.5,
            clip_ratio_c=1.5,
        )
        tau = 0.5 + torch.rand(5, 5, **F64)
        case = random_case(cfg, batch=5, seed=seed, temperature=tau, is_weights=torch.rand(5, 5, **F64))
        case["mask"] &= keep
        turns = torch.arange(25).reshape(5, 5) // 2
        forms = [{}, {"segment_ids": turns}, {"advantages": torch.randn(5, **F64), "is_weights": torch.rand(5, **F64)}]
        if penalty != "none":
            lower, upper = case["entropy_bounds"]
            forms.append({"entropy_bounds": (lower[:, 0], upper[:, 0])})
            thirteen = (lower.flatten()[:13], upper.flatten()[:13])
            forms.append({"entropy_bounds": thirteen, "segment_ids": turns})
        for form in forms:
            padded = {**case, **form}
            packed, kept = to_packed(padded, lengths)
            for borders in (packed["cu_seqlens"], packed["cu_seqlens"].int()):
                out, gradient, _ = assert_equals_plain({**packed, "cu_seqlens": borders})
            whole, whole_gradient = run(padded)
            close = {"rtol": 1e-12, "atol": 1e-14}
            assert_close(out.loss, whole.loss, **close)
            assert_close(out.metrics.values, whole.metrics.values, **close)
            assert_close(out.log_probs, whole.log_probs[kept], **close)
            assert_close(gradient, whole_gradient[kept], **close)


def test_packed_without_borders_is_enough_for_token_mean():
    case = random_case(ek.EPOConfig(penalty="hinge"))
    packed, _ = to_packed(case, [5, 5, 5])
    bare, gradient = run({k: v for k, v in packed.items() if k not in ("cu_seqlens", "max_length")})
    out, whole_gradient = run(packed)
    assert_close(bare.loss, out.loss, rtol=0, atol=0)
    assert_close(gradient, whole_gradient, rtol=0, atol=0)


def test_advantages_and_is_weights_of_a_sequence_are_spread():
    cfg = ek.EPOConfig(entropy_coeff=0.5)
    case = random_case(cfg, advantages=torch.randn(3, **F64), is_weights=torch.rand(3, **F64))
    spread = {name: case[name][:, None].expand(3, 5).contiguous() for name in ("advantages", "is_weights")}
    assert_identical(run(case), run({**case, **spread}))
    assert_equals_plain(case)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
@pytest.mark.parametrize("band_scope", ["token", "segment"])
def test_batches_of_no_tokens(shape, band_scope):
    cfg = ek.EPOConfig(penalty="hinge", band_scope=band_scope)
    per_token = torch.zeros(shape)
    for ids in (None, per_token.long()):
        if ids is None and shape == (0,) and band_scope == "segment":
            continue  # packed and without borders: an error, see test_inputs
        logits = torch.zeros(*shape, 7, requires_grad=True)
        out = ek.epo_loss(
            logits, per_token.long(), per_token, per_token, per_token, cfg, entropy_bounds=(per_token, per_token),
            segment_ids=ids, backend="reference",
        )  # fmt: skip
        out.loss.backward()
        assert out.loss == 0
        assert logits.grad.shape == logits.shape
        assert not out.metrics.values.any()


# ---- memory layouts -------------------------------------------------------------------------------------------------


def test_strided_logits():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5), time=6)
    expected, gradient = run(case)
    contiguous = case["logits"]
    transposed = contiguous.transpose(0, 1).contiguous().transpose(0, 1)
    columns = contiguous.transpose(1, 2).contiguous().transpose(1, 2)  # stride of the vocabulary isn't 1
    reversed_twice = contiguous.flip(-1).flip(-1)
    for logits in (transposed, columns, reversed_twice):
        out, got = run({**case, "logits": logits})
        assert_close(out.loss, expected.loss, rtol=1e-13, atol=0)
        assert_close(got, gradient, rtol=1e-12, atol=1e-15)


def test_a_slice_of_longer_logits_gets_its_gradient_and_the_rest_zero():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5), time=5)
    expected, gradient = run(case)
    whole = torch.cat([case["logits"], torch.full((3, 1, 7), math.nan, **F64)], dim=1).requires_grad_()
    out = ek.epo_loss(**{**case, "logits": whole[:, :-1]}, backend="reference")
    out.loss.backward()
    assert_close(out.loss, expected.loss, rtol=0, atol=0)
    assert_close(whole.grad, torch.cat([gradient, torch.zeros(3, 1, 7, **F64)], dim=1), rtol=0, atol=0)


def test_rolled_tokens_with_a_masked_end_equal_the_slice():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5), time=6)
    mask = case["mask"].clone()
    mask[:, -1] = False
    whole = run({**case, "mask": mask})
    sliced = {name: value[:, :-1] for name, value in case.items() if name != "cfg"}
    out, gradient = run({**sliced, "cfg": case["cfg"]})
    assert_close(whole[0].loss, out.loss, rtol=1e-13, atol=0)
    assert_close(whole[1][:, :-1], gradient, rtol=1e-12, atol=1e-15)
    assert not whole[1][:, -1].any()


def test_expanded_logits_add_up_their_gradient():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5), batch=2, mask=torch.ones(2, 5, dtype=torch.bool))
    row = torch.randn(5, 7, **F64, requires_grad=True)
    out = ek.epo_loss(**{**case, "logits": row.expand(2, 5, 7)}, backend="reference")
    out.loss.backward()
    expected = plain.epo_loss(**{**case, "logits": row.detach().expand(2, 5, 7)})
    assert_close(out.loss.item(), expected.loss)
    assert_close(row.grad, expected.gradient.sum(0))


def test_arguments_are_left_as_they_are():
    case = random_case(ek.EPOConfig(penalty="hinge", kl_coeff=0.1))
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    run(case)
    for name, value in before.items():
        assert_close(case[name], value, rtol=0, atol=0)


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5, 65536.0])
def test_backward_scales_by_the_upstream_gradient(upstream):
    case = random_case(ek.EPOConfig(entropy_coeff=0.5))
    assert_close(run(case, upstream=upstream)[1], run(case)[1] * upstream, rtol=1e-12, atol=1e-15)


def test_two_losses_on_shared_logits_and_another_use_of_them():
    first = random_case(ek.EPOConfig(entropy_coeff=0.5))
    second = {**random_case(ek.EPOConfig(kl_coeff=0.2, penalty="hinge"), seed=1), "logits": first["logits"]}
    logits = first["logits"].clone().requires_grad_()
    losses = [ek.epo_loss(**{**case, "logits": logits}, backend="reference").loss for case in (first, second)]
    (2 * losses[0] + losses[1] + logits.square().sum()).backward()
    expected = 2 * run(first)[1] + run(second)[1] + 2 * first["logits"]
    assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)


def test_gradients_accumulate_over_calls():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5))
    head = torch.nn.Linear(4, 7, **F64)
    hidden = torch.randn(3, 5, 4, **F64)
    for _ in range(3):
        ek.epo_loss(**{**case, "logits": head(hidden)}, backend="reference", loss_scale=1 / 3).loss.backward()
    thrice = head.weight.grad.clone()
    head.zero_grad()
    ek.epo_loss(**{**case, "logits": head(hidden)}, backend="reference").loss.backward()
    assert_close(thrice, head.weight.grad, rtol=1e-12, atol=1e-14)


def test_a_second_backward_needs_retain_graph():
    case = random_case()
    logits = case["logits"].requires_grad_()
    loss = ek.epo_loss(**case, backend="reference").loss
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert_close(logits.grad, 2 * once, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_without_gradient_there_is_none():
    case = random_case()
    assert not ek.epo_loss(**case, backend="reference").loss.requires_grad
    with torch.no_grad():
        assert not ek.epo_loss(
            **{**case, "logits": case["logits"].requires_grad_()}, backend="reference"
        ).loss.requires_grad
    with torch.inference_mode():
        assert torch.isfinite(ek.epo_loss(**random_case(), backend="reference").loss)


GRADCHECK = {
    f"{penalty}-{scope}-{mode}": ek.EPOConfig(
        penalty=penalty, penalty_alpha=0.7, band_scope=scope, loss_agg_mode=mode, kl_type=kl_type, kl_coeff=0.2,
        entropy_coeff=0.5, clip_ratio_c=1.5, temperature=0.7,
    )
    for penalty in PENALTIES
    for scope in ("token", "segment")
    for mode, kl_type in zip(MODES, ("k1", "k2", "k3", "abs"), strict=True)
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in GRADCHECK if not name.startswith(("gate", "indicator"))])
@pytest.mark.parametrize("transform", [{}, {"logit_softcap": 2.0, "logit_scale": 0.8, "vocab_size": 4}])
def test_gradcheck(name, transform):
    case = random_case(GRADCHECK[name], batch=2, time=3, vocab=5, penalty_weight=1.5, **transform)
    case["tokens"].clamp_(max=3)
    case["mask"][1, 1:] = True

    def loss(logits):
        return ek.epo_loss(**{**case, "logits": logits}, backend="reference").loss

    assert torch.autograd.gradcheck(loss, (case["logits"].requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in GRADCHECK if name.startswith(("gate", "indicator"))])
def test_gradcheck_inside_a_piece_of_the_gate_and_the_indicator(name):
    # Both are constant but for jumps, which the differences of this case don't cross.
    test_gradcheck(name, {})


def test_the_reference_is_differentiable_twice():
    case = random_case(ek.EPOConfig(penalty="quadratic", entropy_coeff=0.5), batch=1, time=2, vocab=4)

    def loss(logits):
        return ek.epo_loss(**{**case, "logits": logits}, backend="reference").loss

    assert torch.autograd.gradgradcheck(loss, (case["logits"].requires_grad_(),))


def test_log_probs_and_entropy_gradcheck():
    tokens, mask = torch.tensor([[0, 3, 2], [4, 1, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    logits = torch.randn(2, 3, 5, **F64, requires_grad=True)
    for arguments in ({}, {"temperature": 0.5 + torch.rand(2, 3, **F64)}, {"logit_softcap": 1.5, "logit_scale": 2.0}):

        def both(z, arguments=arguments):
            return ek.log_probs_and_entropy(z, tokens, mask=mask, backend="reference", **arguments)

        assert torch.autograd.gradcheck(both, (logits,))


# ---- log_probs_and_entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (15,)])
def test_log_probs_and_entropy_like_tokens(shape):
    case = random_case()
    expected = plain.epo_loss(**case)
    logits, tokens, mask = case["logits"].reshape(*shape, 7), case["tokens"].reshape(shape), case["mask"].reshape(shape)
    log_probs, entropy = ek.log_probs_and_entropy(logits, tokens, mask=mask, backend="reference")
    assert_close(log_probs, expected.log_probs.reshape(shape))
    assert_close(entropy, expected.entropy.reshape(shape))
    everywhere, _ = ek.log_probs_and_entropy(logits, tokens, backend="reference")
    assert_close(everywhere[mask], log_probs[mask], rtol=0, atol=0)
    assert everywhere[~mask].all()


def test_entropy_that_is_not_wanted_costs_no_gradient():
    logits, tokens = torch.randn(4, 6, requires_grad=True), torch.arange(4)
    log_probs, entropy = ek.log_probs_and_entropy(logits, tokens, entropy_grad=False, backend="reference")
    assert log_probs.requires_grad
    assert not entropy.requires_grad
    again, none = ek.log_probs_and_entropy(logits, tokens, entropy=False, backend="reference")
    assert none is None
    assert torch.equal(again, log_probs)


# ---- epo_loss_from_log_probs ----------------------------------------------------------------------------------------


def from_log_probs(case, logits):
    """The loss from the statistics: two calls instead of one `epo_loss`."""
    case = {name: value for name, value in case.items() if name not in ("logits", "tokens", "temperature")}
    return ek.epo_loss_from_log_probs(*logits, **case)


@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("mode", MODES)
def test_from_log_probs_equals_epo_loss(mode, band_scope):
    for seed, penalty in enumerate(PENALTIES):
        cfg = ek.EPOConfig(
            loss_agg_mode=mode, band_scope=band_scope, penalty=penalty, kl_coeff=0.1, entropy_coeff=0.5,
            clip_ratio_c=1.5, temperature=0.7,
        )  # fmt: skip
        case = random_case(cfg, seed=seed, is_weights=torch.rand(3, 5, **F64), penalty_weight=1.3, normalizer=4.0)
        padded_and_packed = [case, to_packed(case, [5, 5, 5])[0]]
        for form in padded_and_packed:
            expected, gradient = run(form)
            logits = form["logits"].clone().requires_grad_()
            both = ek.log_probs_and_entropy(
                logits, form["tokens"], mask=form["mask"], temperature=0.7, backend="reference"
            )
            out = from_log_probs(form, both)
            out.loss.backward()
            assert_close(out.loss, expected.loss, rtol=1e-13, atol=0)
            assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-15)
            assert_close(out.metrics.values, expected.metrics.values, rtol=1e-12, atol=1e-14)
            assert_close(out.entropy, expected.entropy, rtol=0, atol=0)


def test_from_log_probs_reads_nothing_where_the_mask_is_0():
    case = random_case(ek.EPOConfig(entropy_coeff=0.5))
    mask = case["mask"]
    both = [torch.randn(3, 5, **F64), torch.rand(3, 5, **F64)]
    clean = from_log_probs(case, both)
    dirty = [torch.where(mask, value, math.nan).requires_grad_() for value in both]
    out = from_log_probs({**case, "advantages": torch.where(mask, case["advantages"], math.nan)}, dirty)
    out.loss.backward()
    assert_close(out.loss, clean.loss, rtol=0, atol=0)
    for value in dirty:
        assert value.grad[mask].any()
        assert not value.grad[~mask].any()


def test_from_log_probs_takes_an_entropy_of_16_bits_and_names_what_is_wrong():
    case = random_case(ek.EPOConfig(), dtype=torch.float32)
    log_probs, entropy = torch.randn(3, 5), torch.rand(3, 5).bfloat16()
    out = from_log_probs(case, (log_probs, entropy))
    assert_close(out.loss, from_log_probs(case, (log_probs, entropy.float())).loss, rtol=0, atol=0)
    for wrong, error, match in (
        ((case["tokens"], entropy), TypeError, "log_probs must be a floating-point tensor, got torch.int64"),
        ((log_probs.half(), entropy), TypeError, "log_probs must be float32 or float64, got torch.float16"),
        ((log_probs, None), TypeError, "entropy must be a floating-point tensor, got NoneType"),
        ((log_probs, entropy[:, :2]), ValueError, "entropy must have shape"),
        ((log_probs[..., None], entropy), ValueError, "log_probs must be"),
    ):
        with pytest.raises(error, match=match):
            from_log_probs(case, wrong)


def test_from_log_probs_counts_bad_bounds(monkeypatch):
    lower, upper = torch.zeros(3, 5), torch.ones(3, 5)
    lower[0, 0] = 2.0
    for scope in ("token", "segment"):
        case = random_case(ek.EPOConfig(penalty="hinge", band_scope=scope), entropy_bounds=(lower, upper))
        statistics = ek.log_probs_and_entropy(case["logits"], case["tokens"], backend="reference")
        with pytest.raises(ValueError, match=r"entropy_bounds must be .* got \[2.0, 1.0\] at row 0, position 0"):
            from_log_probs(case, statistics)
        with monkeypatch.context() as patch:
            patch.setattr("epo_kernels.inputs.checks.checks_values", lambda device: False)
            out = from_log_probs(case, statistics)
        assert out.loss.isnan()
        assert out.metrics.invalid_tokens == (1 if scope == "token" else case["mask"][0].sum())


# ---- mixed precision ------------------------------------------------------------------------------------------------


def test_float16_under_grad_scaler_keeps_gradients_of_weights_near_1_over_8192():
    case = random_case(ek.EPOConfig(), vocab=512, batch=4, time=8, old_log_probs=None, normalizer=8192)
    case["mask"][:] = True
    hidden = torch.randn(4, 8, 16)
    head = torch.nn.Linear(16, 512, bias=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    logits = head(hidden).half()
    expected = plain.epo_loss(**{**case, "logits": logits}).gradient
    lost = (expected.half().double() / expected - 1).abs() > 0.05
    assert lost.double().mean() > 0.5  # what float16 would do to these gradients unscaled
    scaler.scale(ek.epo_loss(**{**case, "logits": logits}, backend="reference").loss).backward()
    scaler.unscale_(optimizer)
    by_hand = torch.einsum("btv,btd->vd", expected, hidden.double())
    assert_close(head.weight.grad.double(), by_hand, rtol=2e-3, atol=1e-3 * by_hand.abs().max().item())
    before = head.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(head.weight, before)  # nothing was inf or NaN, so the step was taken


def test_autocast_leaves_the_statistics_in_float32():
    case = random_case(dtype=torch.float32, vocab=64)
    expected = run(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(run(case), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NEEDS_CPU)])
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("penalty", ["none", "gate"])
def test_defaults_of_torch_change_nothing(penalty, scope, backend, default):
    """Neither the default dtype nor the default device matters: results have the documented dtypes and values."""
    cfg = ek.EPOConfig(penalty=penalty, kl_coeff=0.1, band_scope=scope, loss_agg_mode="seq-mean-token-mean")
    bounds = torch.full((3, 5), 2.0), torch.full((3, 5), 2.5)
    case = random_case(cfg, dtype=torch.float32, vocab=64, entropy_bounds=bounds)
    expected, before = run(case, backend), torch.get_default_dtype()
    head, given = torch.eye(64), {name: value for name, value in case.items() if name not in ("logits", "tokens")}
    call = {"mask": case["mask"], "backend": backend}
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        assert_identical(run(case, backend), expected)
        statistics = ek.log_probs_and_entropy(case["logits"], case["tokens"], **call)
        linear = ek.linear_log_probs_and_entropy(case["logits"], head, case["tokens"], **call)
        outs = (
            ek.epo_loss_from_log_probs(*statistics, **given),
            ek.linear_epo_loss(hidden=case["logits"], weight=head, tokens=case["tokens"], **given, backend=backend),
        )
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert_close((*statistics, *linear), (*expected[0][2:], *expected[0][2:]))
    for out in outs:
        assert_close((out.loss, *out[2:]), (expected[0].loss, *expected[0][2:]))


# ---- backends -------------------------------------------------------------------------------------------------------


def test_available_backends_gives_a_reason_or_none():
    backends = ek.available_backends()
    assert backends["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in backends.values())


def test_inplace_is_only_a_permission():
    case = random_case()
    assert_identical(run({**case, "inplace": True}), run(case))
