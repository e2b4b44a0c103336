"""Cases of a vocabulary split over ranks: each is called as (rank, world) on every rank, against the whole."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels import backends, inputs
from epo_kernels.fused.backend import FusedBackend
from epo_kernels.shard import gather
from tests.backends.matrix import BUSY, assert_no_worse, busy_case, moved
from tests.cases import POLICY_VARIANTS, metrics_of, policy_config, run, to_packed
from tests.eager_rows import EagerRows
from tests.test_linear import HINGE, SMALL, B, Case, T, V

INF = math.inf
RESULTS = ("loss", "log_probs", "entropy", "∂hidden", "∂weight", "∂bias")  # of `Case.run`
TRITON = ek.available_backends()["triton"] is None  # by its interpreter, which is slow
FUSED = "cpu" if ek.available_backends()["cpu"] is None else "reference"

eager = FusedBackend("eager", ("cpu",), EagerRows, lambda: None)
eager.dtypes = (*eager.dtypes, torch.float64)
backends._BACKENDS["eager"] = eager


def widths_of(total, world, kind):
    """Columns of each rank: "even", "uneven", or with a rank that has "none"."""
    if kind == "none":
        return [total - (total // world) * (world - 2), 0, *[total // world] * (world - 2)]
    share = total // world if kind == "even" else max(total // (3 * world), 1)
    return [share] * (world - 1) + [total - share * (world - 1)]


def own_columns(total, rank, world, kind):
    widths = widths_of(total, world, kind)
    start = sum(widths[:rank])
    return slice(start, start + widths[rank])


def assert_same_on_all_ranks(*values):
    for value in values:
        for other in gather(value.detach(), dist.group.WORLD):
            assert_close(other, value.detach(), rtol=0, atol=0, equal_nan=True)


# ---- linear losses ---------------------------------------------------------------------------------------------------


def run_part(case, backend, cfg, columns, **keywords):
    """`Case.run` of the rank's own rows of the head."""
    part = Case.__new__(Case)
    part.__dict__.update(case.__dict__, weight=case.weight[columns], bias=case.bias[columns])
    return part.run(backend, cfg, group=dist.group.WORLD, **keywords)


def check_linear(rank, world, backend, cfg, kind, **keywords):
    case = Case()
    case.tokens %= keywords.get("vocab_size", V)
    columns = own_columns(V, rank, world, kind)
    expected = case.run("reference", cfg, 2.5, **keywords)
    got = run_part(case, backend, cfg, columns, upstream=2.5, **keywords)
    expected[4:] = [gradient[columns] for gradient in expected[4:]]
    for name, ours, theirs in zip(RESULTS, got, expected, strict=True):
        assert_close(
            ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_same_on_all_ranks(*got[:4])


def case_linear_loss_equals_the_whole(rank, world):
    configs = [
        ({}, {}),
        ({}, {"max_chunk_bytes": 1}),  # a chunk a token
        (HINGE | {"kl_coeff": 0.1}, {"penalty_weight": torch.tensor(1.5)}),
        (HINGE | {"band_scope": "segment"}, {"segment_ids": torch.arange(T).expand(B, T) // 10}),
        ({"penalty": "gate", "entropy_coeff": 0.1}, {"temperature": torch.linspace(0.5, 2.0, B * T).reshape(B, T)}),
        (HINGE, {"logit_softcap": 3.0, "logit_scale": 1.7, "vocab_size": V - 2}),
        ({"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_c": None}, {"entropy_coeff": 0.0, "normalizer": 7.0}),
    ]
    for config, keywords in configs:
        for kind in ("uneven", "none"):
            check_linear(rank, world, "eager", ek.EPOConfig(**config), kind, **keywords)
    check_linear(rank, world, "reference", ek.EPOConfig(**HINGE), "uneven", vocab_size=V - 2)


def case_a_rank_of_padding_alone(rank, world):
    check_linear(rank, world, "eager", ek.EPOConfig(**HINGE), "even", vocab_size=V - V // world - V % world)
    check_linear(rank, world, "eager", ek.EPOConfig(**HINGE), "even", vocab_size=1)


def case_padding_of_the_head_is_never_read(rank, world):
    """Neither on a rank that has some padding, nor on one that has only padding."""
    for backend in ("eager", "reference"):
        for vocab_size in (V - 1, V - V // world - V % world):
            case, cfg = Case(), ek.EPOConfig(**HINGE)
            case.tokens %= vocab_size
            expected = case.run("reference", cfg, vocab_size=vocab_size)
            case.weight[vocab_size:], case.bias[vocab_size:] = math.nan, math.inf
            columns = own_columns(V, rank, world, "even")
            got = run_part(case, backend, cfg, columns, vocab_size=vocab_size)
            expected[4:] = [gradient[columns] for gradient in expected[4:]]
            for ours, theirs in zip(got, expected, strict=True):
                assert_close(ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


def case_bad_bounds_are_counted_and_make_the_loss_nan(rank, world):
    case, columns = busy_case(vocab=12), own_columns(12, rank, world, "even")
    case["entropy_bounds"][0][0, 0] = math.nan
    with mock.patch("epo_kernels.inputs.checks.checks_values", return_value=False):
        out, gradient = run_columns(case, FUSED, columns)
    assert out.loss.isnan()
    assert out.metrics.invalid_tokens == 1
    assert gradient.isnan().any(-1).sum() == 1


def case_float16_gradients_do_not_overflow(rank, world):
    columns, cfg = own_columns(V, rank, world, "uneven"), ek.EPOConfig(clip_ratio_c=None)
    case, exact = Case(torch.float16), Case(torch.float16)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    for one in (case, exact):
        one.old_log_probs[0, 0] -= 9.0
        one.advantages[0, 0] = -1.0
        one.mask[0, 0] = True
    truth = exact.run("reference", cfg)
    got = run_part(case, FUSED, cfg, columns)
    truth[4:] = [gradient[columns] for gradient in truth[4:]]
    for ours, true in zip(got[3:], truth[3:], strict=True):
        assert (ours.double() - true).norm() <= 2e-3 * true.norm()


def case_linear_error_is_that_of_eager_or_less(rank, world):
    columns = own_columns(V, rank, world, "uneven")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case, exact = Case(dtype), Case(dtype)
        exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
        for scope in ("token", "segment") if dtype == torch.float32 else ("token",):
            cfg = ek.EPOConfig(band_scope=scope, kl_coeff=0.1, **HINGE)
            truth, whole = exact.run("reference", cfg), case.run("reference", cfg)
            eps = torch.finfo(dtype).eps
            roundings = [eps * max(1.0 if true.dim() == 0 else 0.0, true.norm().item()) for true in truth]
            for results in (truth, whole):
                results[4:] = [gradient[columns] for gradient in results[4:]]
            ours = run_part(case, FUSED, cfg, columns)
            for name, got, theirs, true, rounding in zip(RESULTS, ours, whole, truth, roundings, strict=True):
                own, others = ((values.double() - true).norm().item() for values in (got, theirs))
                assert own <= others + rounding, (name, dtype, scope, FUSED, own, others, rounding)


def case_scoring_and_its_gradient(rank, world):
    case, columns = Case(torch.float32), own_columns(V, rank, world, "uneven")

    def score(weight, backend, **keywords):
        hidden, weight = case.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        call = {"mask": case.mask, "backend": backend, "max_chunk_bytes": SMALL // 2, **keywords}
        with torch.no_grad():
            first = ek.linear_log_probs_and_entropy(hidden, weight, case.tokens, **call)[0]
            alone = ek.linear_log_probs_and_entropy(hidden, weight, case.tokens, entropy=False, **call)
        log_probs, entropy = ek.linear_log_probs_and_entropy(hidden, weight, case.tokens, **call)
        assert alone[1] is None
        assert_close(first, log_probs, rtol=0, atol=0)
        assert_close(alone[0], log_probs)
        (log_probs.sin().sum() + entropy.square().sum()).backward()
        return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]

    expected = score(case.weight, "reference")
    expected[3] = expected[3][columns]
    for backend in (FUSED, "reference"):
        got = score(case.weight[columns], backend, group=dist.group.WORLD)
        assert_close(got, expected, rtol=2e-5, atol=2e-5)


def case_second_derivatives_and_forward_mode_raise(rank, world):
    case, columns, cfg = Case(), own_columns(V, rank, world, "even"), ek.EPOConfig()
    for backend in ("eager", "reference"):
        layer, weight = torch.ones((), dtype=torch.float64, requires_grad=True), case.weight[columns].requires_grad_()

        def loss(layer, weight=weight, backend=backend):
            return case.loss(backend, cfg, case.hidden * layer, weight, None, group=dist.group.WORLD).loss

        (gradient,) = torch.autograd.grad(loss(layer), weight, create_graph=True)
        with pytest.raises(RuntimeError, match='Use backend="reference" without group='):
            torch.autograd.grad(gradient.sum(), layer)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(layer.detach(), layer.detach())
            with pytest.raises(RuntimeError, match='Use backend="reference" without group='):
                loss(dual)


def case_no_token_counts(rank, world):
    case = Case(active=0.0)
    got = run_part(case, "eager", ek.EPOConfig(**HINGE), own_columns(V, rank, world, "even"))
    assert not any(value.any() for value in got)


def case_frozen_parts_get_no_gradient(rank, world):
    case, columns = Case(), own_columns(V, rank, world, "even")
    whole = case.run("reference", ek.EPOConfig())
    for frozen in ("hidden", "weight"):
        hidden = case.hidden.clone().requires_grad_(frozen != "hidden")
        weight = case.weight[columns].clone().requires_grad_(frozen != "weight")
        case.loss("eager", ek.EPOConfig(), hidden, weight, case.bias[columns], group=dist.group.WORLD).loss.backward()
        for leaf, expected in ((hidden, whole[3]), (weight, whole[4][columns])):
            if leaf.requires_grad:
                assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-6)
            else:
                assert leaf.grad is None


def case_two_collectives_a_chunk(rank, world):
    """One all-gather opens the call, then one and one all-reduce a chunk; no all-reduce without gradients."""
    case, columns = Case(), own_columns(V, rank, world, "even")
    count = int(case.mask.sum())
    gathers, sums = mock.Mock(wraps=dist.all_gather), mock.Mock(wraps=dist.all_reduce)
    with mock.patch.object(dist, "all_gather", gathers), mock.patch.object(dist, "all_reduce", sums):
        run_part(case, "eager", ek.EPOConfig(), columns, max_chunk_bytes=1)
        assert (gathers.call_count, sums.call_count) == (1 + count, count)
        with torch.no_grad():
            case.loss("eager", ek.EPOConfig(), case.hidden, case.weight[columns], None, group=dist.group.WORLD)
        assert sums.call_count == count


# ---- logits ----------------------------------------------------------------------------------------------------------


def run_columns(case, backend, columns, **keywords):
    """`run` of the rank's own columns of the logits."""
    return run(
        {**case, "logits": case["logits"][..., columns].contiguous(), "group": dist.group.WORLD, **keywords}, backend
    )


def check_logits(rank, world, case, backend, kind="uneven"):
    """The three-way rule of the backends' matrix, and the same bits on every rank."""
    columns = own_columns(case["logits"].shape[-1], rank, world, kind)
    truth, true_gradient = run(moved(case, "cpu", torch.float64))
    whole, whole_gradient = run(case)
    ours, gradient = run_columns(case, backend, columns)
    single = torch.finfo(torch.float32).eps * max(truth.log_probs.abs().max().item(), 1.0)
    for name in ("loss", "log_probs", "entropy"):
        assert_no_worse(name, *(getattr(out, name) for out in (ours, whole, truth)), single)
    dtype = case["logits"].dtype
    rounding = max(torch.finfo(dtype).eps, single) * true_gradient.abs().max().item()
    assert_no_worse("gradient", gradient, whole_gradient[..., columns], true_gradient[..., columns], rounding)
    expected = metrics_of(truth)
    for name, value in metrics_of(ours).items():
        assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert_same_on_all_ranks(ours.loss, ours.log_probs, ours.entropy, ours.metrics.values)


def case_logits_in_columns(rank, world):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_logits(rank, world, busy_case(vocab=203, dtype=dtype), FUSED)
    segment = replace(BUSY, band_scope="segment")
    check_logits(rank, world, busy_case(segment, vocab=50), FUSED, "even")
    case = busy_case(vocab=50, logit_scale=-1.5, temperature=torch.linspace(0.5, 2.0, 15).view(3, 5))
    check_logits(rank, world, case, FUSED)
    case = busy_case(vocab=50, logit_softcap=3.0, vocab_size=40)
    case["tokens"] %= 40
    check_logits(rank, world, case, FUSED)
    check_logits(rank, world, to_packed(busy_case(vocab=50), [5, 3, 4])[0], FUSED)
    check_logits(rank, world, busy_case(vocab=50, old_log_probs=None), FUSED)


def case_policy_losses(rank, world):
    turns = torch.arange(15).reshape(3, 5) // 2
    for name in POLICY_VARIANTS:
        cfg = policy_config(name, penalty="hinge", penalty_alpha=0.7, entropy_coeff=0.3, kl_coeff=0.2)
        check_logits(rank, world, busy_case(cfg, vocab=50, segment_ids=turns), FUSED)
        keywords = {"segment_ids": torch.arange(T).expand(B, T) // 10, "penalty_weight": 1.5}
        check_linear(rank, world, "eager", cfg, "uneven", **keywords)


def case_offsets_change_nothing(rank, world):
    case = busy_case(vocab=64)
    case["logits"] = (case["logits"] * 64).round() / 64
    columns = own_columns(64, rank, world, "uneven")
    here = run_columns(case, FUSED, columns, temperature=0.7)
    there = run_columns({**case, "logits": case["logits"] + 4096.0}, FUSED, columns, temperature=0.7)
    assert_close(there[0].log_probs, here[0].log_probs, rtol=0, atol=0)
    assert_close(there[1], here[1], rtol=0, atol=0)


def case_statistics_of_logits(rank, world):
    logits, tokens = torch.randn(2, 6, 70), torch.randint(70, (2, 6))
    columns = own_columns(70, rank, world, "uneven")

    def score(logits, backend, **keywords):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = ek.log_probs_and_entropy(leaf, tokens, backend=backend, **keywords)
        (log_probs.cos().sum() + entropy.exp().sum()).backward()
        return log_probs.detach(), entropy.detach(), leaf.grad

    *expected, gradient = score(logits, "reference")
    for backend in (FUSED, "reference", *(["triton"] if TRITON and world == 2 else [])):
        got = score(logits[..., columns], backend, group=dist.group.WORLD)
        assert_close(got, (*expected, gradient[..., columns]), rtol=1e-5, atol=1e-5)


def case_distribution_statistics(rank, world):
    logits, hidden, weight = torch.randn(2, 6, 70), torch.randn(2, 6, 16), torch.randn(70, 16)
    mask = torch.rand(2, 6) > 0.2
    settings = {"mask": mask, "temperature": 0.7, "vocab_size": 66}
    whole = ek.distribution_statistics(logits, **settings, backend="reference")
    whole_of_head = ek.linear_distribution_statistics(hidden, weight, **settings, backend="reference")
    for kind in ("even", "uneven"):
        columns = own_columns(70, rank, world, kind)
        for backend in (FUSED, "reference", *(["triton"] if TRITON and world == 2 else [])):
            over = {**settings, "backend": backend, "group": dist.group.WORLD}
            got = ek.distribution_statistics(logits[..., columns], **over)
            assert_close(got, whole, rtol=1e-5, atol=1e-5)
            assert_same_on_all_ranks(*got)
            assert_close(
                ek.linear_distribution_statistics(hidden, weight[columns], **over),
                whole_of_head, rtol=1e-5, atol=1e-5,
            )  # fmt: skip


def case_inplace(rank, world):
    case, columns = busy_case(vocab=60), own_columns(60, rank, world, "even")
    for scope in ("token", "segment"):
        case["cfg"] = replace(BUSY, band_scope=scope)
        expected = run_columns(case, FUSED, columns)[1]
        leaf = case["logits"][..., columns].clone().requires_grad_()
        logits = leaf * 1.0
        out = ek.epo_loss(**{**case, "logits": logits, "group": dist.group.WORLD, "inplace": True}, backend=FUSED)
        out.loss.backward()
        assert_close(leaf.grad, expected, rtol=0, atol=0)


def case_impossible_tokens(rank, world):
    """-inf: a whole rank's columns, the sampled token's own rank, and a row with no hope at all."""
    columns = own_columns(40, rank, world, "even")
    first, last = own_columns(40, 0, world, "even"), own_columns(40, world - 1, world, "even")
    for backend in (FUSED, "reference"):
        case = busy_case(vocab=40)
        case["mask"][:] = True
        case["logits"][0, :, last] = -INF
        case["tokens"][0] = first.start
        case["logits"][1, 0, last] = -INF
        case["tokens"][1, 0] = last.start  # p = 0: a ratio of e^-20
        case["ref_log_probs"][1, 0] = -3.0
        case["cfg"] = replace(BUSY, kl_coeff=0.0)
        ours, gradient = run_columns(case, backend, columns)
        whole, expected = run(case)
        assert ours.log_probs[1, 0] == -INF
        assert_close(ours.loss, whole.loss, rtol=1e-5, atol=1e-6)
        assert_close(ours.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
        assert_close(gradient, expected[..., columns], rtol=1e-5, atol=1e-6)
        case["logits"][2, 3] = -INF
        ours, gradient = run_columns(case, backend, columns)
        assert ours.loss.isnan()
        assert gradient[2, 3].isnan().all()
        gradient[2, 3] = 0
        assert gradient.isfinite().all()


def case_one_bad_value_on_one_rank(rank, world):
    columns = own_columns(40, rank, world, "even")
    for backend in (FUSED, "reference"):
        for bad in (math.nan, INF):
            case = busy_case(vocab=40)
            case["logits"][0, 0, 39] = bad
            if bad != bad:
                case["logits"][0, 0, own_columns(40, world - 1, world, "even").start : 39] = -INF
            case["tokens"][0, 0] = 0
            ours, gradient = run_columns(case, backend, columns)
            assert ours.loss.isnan()
            assert metrics_of(ours)["nonfinite_tokens"] == 1
            assert gradient[0, 0].isnan().all()
            gradient[0, 0] = 0
            assert gradient.isfinite().all()


def case_masked_tokens_are_never_read(rank, world):
    columns = own_columns(40, rank, world, "even")
    for backend in (FUSED, "reference"):
        case = busy_case(vocab=40)
        clean = run_columns(case, backend, columns)
        masked = ~case["mask"]
        case["logits"][masked] = math.nan
        case["tokens"][masked] = -100
        for name in ("old_log_probs", "advantages", "ref_log_probs"):
            case[name][masked] = math.nan
        poisoned = run_columns(case, backend, columns)
        assert_close((poisoned[0].loss, poisoned[1]), (clean[0].loss, clean[1]), rtol=0, atol=0)
        assert not poisoned[1][masked].any()


def case_invalid_tokens_are_counted(rank, world):
    columns = own_columns(40, rank, world, "even")
    for backend in (FUSED, "reference"):
        case = busy_case(vocab=40)
        case["mask"][0, :4] = True
        case["tokens"][0, :4] = torch.tensor([37, -1, 2**40, -(2**62)])  # padding, and nowhere
        case["vocab_size"] = 37
        case["tokens"][1:] %= 37
        case["tokens"][0, 4] = 3
        with mock.patch.object(inputs.checks, "checks_values", return_value=False):  # as on CUDA
            ours, gradient = run_columns(case, backend, columns)
            whole, expected = run(case)
        assert metrics_of(ours)["invalid_tokens"] == 4
        assert_close(ours.entropy, whole.entropy, rtol=1e-5, atol=1e-6)
        assert_close(gradient, expected[..., columns], rtol=1e-4, atol=1e-6, equal_nan=True)
        with pytest.raises(ValueError, match=r"tokens must be in \[0, 37\)"):
            run_columns(case, backend, columns)


# ---- calls that do not match -----------------------------------------------------------------------------------------


def refused(error, text, call):
    with pytest.raises(error, match=re.escape(text)):
        call()


def case_ranks_that_disagree_all_raise(rank, world):
    case = busy_case(vocab=12)
    columns = own_columns(12, rank, world, "even")
    odd = rank == world - 1

    def loss(**changed):
        return lambda: run_columns({**case, **changed}, FUSED, columns)

    fewer = {name: value[:2] for name, value in case.items() if isinstance(value, torch.Tensor)} if odd else {}
    bounds = tuple(bound[:2] for bound in case["entropy_bounds"]) if odd else case["entropy_bounds"]
    numbers = [15] * (world - 1) + [10]
    refused(ValueError, f"same number of tokens; they have {numbers}", loss(**fewer, entropy_bounds=bounds))
    mask = case["mask"].clone()
    mask[0, 0] = not odd
    refused(ValueError, "same number of counted tokens", loss(mask=mask))
    refused(ValueError, "same cfg; this rank has EPOConfig", loss(cfg=BUSY if odd else replace(BUSY, kl_coeff=0.5)))
    refused(
        ValueError, "same dtype; this rank has torch.", loss(logits=case["logits"].to((torch.float, torch.half)[odd]))
    )
    refused(ValueError, "same vocab size", loss(vocab_size=11 if odd else None))
    part = {**case, "logits": case["logits"][..., columns].clone().requires_grad_(odd), "group": dist.group.WORLD}
    refused(ValueError, "same gradient", lambda: ek.epo_loss(**part))


def case_ranks_in_different_functions_all_raise(rank, world):
    logits, tokens = torch.randn(1, 4, 3), torch.randint(3, (1, 4))
    group = dist.group.WORLD

    def call():
        if rank == 0:
            ek.log_probs_and_entropy(logits, tokens, group=group, backend=FUSED)
        else:
            ek.linear_log_probs_and_entropy(logits, torch.randn(3, 3), tokens, group=group, backend=FUSED)

    refused(ValueError, "same function; this rank has", call)


def case_wrong_groups_are_refused(rank, world):
    case = busy_case(vocab=12)
    refused(TypeError, "group must be a torch.distributed process group", lambda: run({**case, "group": 3}, FUSED))
    alone = dist.new_group([0])
    if rank == 0:  # a group of one is the whole
        assert_close(run({**case, "group": alone}, FUSED)[1], run(case)[1], rtol=1e-5, atol=1e-6)
    else:
        refused(
            TypeError, "group must be a torch.distributed process group", lambda: run({**case, "group": alone}, FUSED)
        )


def case_the_check_finds_what_differs(rank, world):
    case, columns = busy_case(vocab=12), own_columns(12, rank, world, "even")
    with mock.patch.dict(os.environ, {"EPO_KERNELS_CHECK": "1"}):
        run_columns(case, FUSED, columns)
        case["advantages"][~case["mask"]] = float(rank)  # never read
        run_columns(case, FUSED, columns)
        other = case["advantages"].clone()
        other[0, 0] += 1e-6 * rank
        refused(
            ValueError,
            "advantages must be bit-identical on every rank",
            lambda: run_columns({**case, "advantages": other}, FUSED, columns),
        )
        for name in ("penalty_weight", "temperature", "loss_scale", "logit_scale"):
            for given in (1.0 + rank, torch.tensor(1.0 + rank)) if name != "logit_scale" else (1.0 + rank,):
                refused(
                    ValueError,
                    f"{name} must be bit-identical on every rank",
                    lambda name=name, given=given: run_columns({**case, name: given}, FUSED, columns),
                )
        head = Case()
        head.hidden[0, head.mask[0].nonzero()[0, 0]] += rank
        part = own_columns(V, rank, world, "even")
        refused(ValueError, "hidden must be bit-identical", lambda: run_part(head, "eager", ek.EPOConfig(), part))


def case_compiling_is_refused(rank, world):
    case, columns = busy_case(vocab=12), own_columns(12, rank, world, "even")
    logits = case["logits"][..., columns].clone().requires_grad_()

    @torch.compile(backend="eager", fullgraph=True)
    def loss(logits):
        return ek.epo_loss(**{**case, "logits": logits, "group": dist.group.WORLD}, backend=FUSED).loss

    refused(Exception, "torch.compiler.disable", lambda: loss(logits))


def case_modules_take_a_group(rank, world):
    case, columns = Case(), own_columns(V, rank, world, "even")
    batch = case.tokens, case.old_log_probs, case.advantages, case.mask
    module = ek.LinearEPOLoss(ek.EPOConfig(), group=dist.group.WORLD, backend="eager")
    out = module(case.hidden, case.weight[columns], *batch, bias=case.bias[columns], **case.keywords)
    expected = case.run("reference", ek.EPOConfig())[0]
    assert_close(out.loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
