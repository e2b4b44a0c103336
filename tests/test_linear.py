"""The linear losses: chunks against whole logits, masked rows, and weights as in real models.

`eager` is the chunked way around eager row kernels, exact in float64; it is held against the reference backend, which
computes whole logits.
"""

import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import epo_kernels as ek
from epo_kernels import backends, inputs
from epo_kernels.fused import linear_ops
from epo_kernels.fused.backend import FusedBackend
from epo_kernels.fused.head import Head, chunk_rows, unmasked_tokens
from tests.eager_rows import EagerRows

B, T, D, V = 3, 50, 6, 11
SMALL = 128 * (V + 2 * D) * 8  # bytes of a chunk of 128 float64 rows: two chunks of the 150 tokens
ONE_OR_SEVERAL_CHUNKS = [1 << 20, 3000]
HINGE: dict = {"penalty": "hinge", "penalty_alpha": 2.0, "entropy_coeff": 0.1}


_no_cpu = ek.available_backends()["cpu"]
NEEDS_CPU = pytest.mark.skipif(_no_cpu is not None, reason=f"the cpu backend can't run: {_no_cpu}")


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FusedBackend("eager", ("cpu",), EagerRows, lambda: None)
    backend.dtypes = (*backend.dtypes, torch.float64)
    monkeypatch.setitem(backends._BACKENDS, "eager", backend)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """A batch, its head, and a way to run both backends on it."""

    def __init__(self, dtype: torch.dtype = torch.float64, active: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight, self.bias = normal(B, T, D).to(dtype), normal(V, D).to(dtype), normal(V).to(dtype)
        self.tokens = torch.randint(0, V, (B, T), generator=generator)
        self.mask = torch.rand(B, T, generator=generator) < active
        self.old_log_probs = normal(B, T) - math.log(V)
        self.advantages = normal(B, T)
        self.keywords: dict = {
            "entropy_bounds": (torch.full((B, T), 1.2), torch.full((B, T), 1.6)),
            "ref_log_probs": normal(B, T) - math.log(V),
            "is_weights": torch.rand(B, T, generator=generator),
            "max_chunk_bytes": SMALL,
        }

    def run(self, backend: str, cfg: ek.EPOConfig, upstream: float = 1.0, **keywords) -> list[Tensor]:
        """[loss, log_probs, entropy, ∂hidden, ∂weight, ∂bias]"""
        leaves = [value.detach().clone().requires_grad_() for value in (self.hidden, self.weight, self.bias)]
        out = self.loss(backend, cfg, *leaves, **keywords)
        (upstream * out.loss).backward()
        return [out.loss.detach(), out.log_probs, out.entropy, *(leaf.grad for leaf in leaves)]

    def loss(self, backend: str, cfg: ek.EPOConfig, hidden: Tensor, weight: Tensor, bias: Tensor | None, **keywords):
        batch = self.tokens, self.old_log_probs, self.advantages, self.mask
        keywords = {**self.keywords, **keywords}
        return ek.linear_epo_loss(hidden, weight, *batch, cfg, bias=bias, backend=backend, **keywords)


def assert_alike(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """Fused ways keep their weights and coefficients in float32: 1e-6 is a rounding of those."""
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        ({}, {}),
        (HINGE, {"penalty_weight": 1.5}),
        (HINGE | {"band_scope": "segment"}, {"penalty_weight": torch.tensor(1.5)}),
        (HINGE | {"band_scope": "segment"}, {"segment_ids": torch.arange(T).expand(B, T) // 10}),
        ({"penalty": "gate", "entropy_coeff": 0.1}, {}),
        ({"penalty": "quadratic", "kl_coeff": 0.1, "kl_type": "k2"}, {"kl_coeff": torch.tensor(0.3)}),
        ({"clip_ratio_c": None, "kl_coeff": 0.1}, {"entropy_coeff": 0.0}),
        ({"loss_agg_mode": "seq-mean-token-sum"}, {"loss_scale": 3.0}),
        ({"loss_agg_mode": "seq-mean-token-mean"}, {"normalizer": 7.0}),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, {"max_length": 100}),
        ({"temperature": 0.7}, {}),
        ({}, {"temperature": torch.linspace(0.5, 2.0, B * T).reshape(B, T)}),
        (HINGE, {"logit_softcap": 3.0, "logit_scale": 1.7, "vocab_size": V - 2}),
        ({}, {"max_chunk_bytes": 1}),
    ],
)
def test_equals_whole_logits(config: dict, keywords: dict) -> None:
    case, cfg = Case(), ek.EPOConfig(**config)
    case.tokens %= keywords.get("vocab_size", V)
    assert_alike(case.run("eager", cfg, 2.5, **keywords), case.run("reference", cfg, 2.5, **keywords))


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_metrics_equal_whole_logits(scope: str) -> None:
    case, cfg = Case(), ek.EPOConfig(band_scope=scope, kl_coeff=0.1, **HINGE)
    with torch.no_grad():
        assert case.loss("eager", cfg, case.hidden, case.weight, None).metrics.recomputed_tokens == 0
    ours = case.loss("eager", cfg, case.hidden.requires_grad_(), case.weight, None).metrics
    whole = case.loss("reference", cfg, case.hidden, case.weight, None).metrics
    recomputed = whole.tokens if scope == "segment" else 0
    torch.testing.assert_close(ours.values, whole.replace(recomputed_tokens=recomputed).values, rtol=1e-6, atol=1e-6)


def test_on_policy_packed() -> None:
    case = Case()
    hidden, tokens, mask = case.hidden.reshape(-1, D), case.tokens.reshape(-1), case.mask.reshape(-1)
    cfg = ek.EPOConfig(loss_agg_mode="seq-mean-token-mean", band_scope="segment", **HINGE)
    cu_seqlens = torch.tensor([0, 20, 20, 110, 150])
    bounds = (torch.full((4,), 1.2), torch.full((4,), 1.6))

    def run(backend: str) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (hidden, case.weight)]
        out = ek.linear_epo_loss(
            *leaves,
            tokens,
            None,
            torch.tensor([1.0, 2.0, -1.0, 0.5]),
            mask,
            cfg,
            cu_seqlens=cu_seqlens,
            entropy_bounds=bounds,
            backend=backend,
            max_chunk_bytes=SMALL,
        )
        out.loss.backward()
        return [out.loss.detach(), out.log_probs, out.entropy, *(leaf.grad for leaf in leaves)]

    assert_alike(run("eager"), run("reference"))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("scope", ["token", "segment"])
def test_masked_rows_are_never_read(backend: str, scope: str) -> None:
    case, cfg = Case(), ek.EPOConfig(band_scope=scope, kl_coeff=0.1, **HINGE)
    clean = case.run(backend, cfg)
    case.hidden[~case.mask] = float("nan")
    case.tokens[~case.mask] = -100
    case.old_log_probs[~case.mask] = float("inf")
    case.advantages[~case.mask] = float("nan")
    for bound in case.keywords["entropy_bounds"]:
        bound[~case.mask] = float("nan")
    poisoned = case.run(backend, cfg)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(poisoned, clean, strict=True))
    assert torch.equal(poisoned[3][~case.mask], torch.zeros_like(poisoned[3][~case.mask]))


@pytest.mark.parametrize("backend", ["eager", "reference", pytest.param("cpu", marks=NEEDS_CPU)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
)
def test_padding_rows_of_the_head_are_never_read(backend: str, poison: float, dtype: torch.dtype, logits_dtype) -> None:
    """In all linear functions, and the gradient of the padding is 0."""
    clean, poisoned = Case(dtype), Case(dtype)
    poisoned.weight[V - 2 :], poisoned.bias[V - 2 :] = poison, poison

    def everything(case: Case) -> list[Tensor]:
        case.tokens %= V - 2
        results = []
        for scope in ("token", "segment"):
            cfg = ek.EPOConfig(band_scope=scope, **HINGE)
            results += case.run(backend, cfg, vocab_size=V - 2, logits_dtype=logits_dtype)
        leaves = [value.clone().requires_grad_() for value in (case.hidden, case.weight, case.bias)]
        log_probs, entropy = ek.linear_log_probs_and_entropy(
            *leaves[:2], case.tokens, bias=leaves[2], vocab_size=V - 2, backend=backend, logits_dtype=logits_dtype
        )
        (log_probs.sin() + entropy.square()).sum().backward()
        return [*results, log_probs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

    got = everything(poisoned)
    for ours, theirs in zip(got, everything(clean), strict=True):
        assert torch.equal(ours, theirs)
    for gradient in (got[4], got[5], got[10], got[11], got[-2], got[-1]):
        assert gradient[: V - 2].abs().min() > 0
        assert torch.equal(gradient[V - 2 :], torch.zeros_like(gradient[V - 2 :]))


@NEEDS_CPU
def test_padding_rows_are_never_read_in_the_operators_of_compiled_graphs() -> None:
    case, transform = Case(torch.float32), inputs.LogitTransform(V - 2, 1.0, None, None)
    case.weight[V - 2 :], case.bias[V - 2 :] = float("nan"), float("inf")
    heads = [value.clone().requires_grad_() for value in (case.hidden, case.weight, case.bias)]
    log_probs, entropy = linear_ops.traced_linear_statistics(
        "cpu",
        inputs.Projection(*heads, torch.float32, torch.float32),
        inputs.TokenInputs(case.mask.shape, transform, case.tokens % (V - 2), case.mask, None),
        inputs.Chunking(None, SMALL),
        entropy=True,
    )
    (log_probs + entropy).sum().backward()
    for gradient in (leaf.grad for leaf in heads[1:]):
        assert gradient[: V - 2].isfinite().all()
        assert torch.equal(gradient[V - 2 :], torch.zeros_like(gradient[V - 2 :]))
    assert heads[0].grad.isfinite().all()


@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("poisoned_memory")
def test_no_active_rows(scope: str, dtype: torch.dtype) -> None:
    case, cfg = Case(dtype, active=0.0), ek.EPOConfig(band_scope=scope, **HINGE)
    loss, log_probs, entropy, *gradients = case.run("eager", cfg)
    assert loss == 0
    for value in (log_probs, entropy, *gradients):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_num_active(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cfg = Case(), ek.EPOConfig(band_scope=scope, **HINGE)
    count = int(case.mask.sum())
    known, found = case.run("eager", cfg, num_active=count), case.run("eager", cfg)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(known, found, strict=True))
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"num_active must be {count}, the number of tokens whose mask is 1, got"):
            case.run("eager", cfg, num_active=wrong)
    monkeypatch.setattr(inputs.checks, "checks_values", lambda device: False)  # as on CUDA
    for wrong in (count - 1, count + 1):
        loss, _, _, *gradients = case.run("eager", cfg, num_active=wrong)
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("scope", ["token", "segment"])
def test_frozen_parts_get_no_gradient(needs: tuple[bool, ...], scope: str) -> None:
    case, cfg = Case(), ek.EPOConfig(band_scope=scope, **HINGE)
    leaves = [
        value.clone().requires_grad_(need)
        for value, need in zip((case.hidden, case.weight, case.bias), needs, strict=True)
    ]
    case.loss("eager", cfg, *leaves).loss.backward()
    whole = case.run("reference", cfg)[3:]
    for leaf, need, expected in zip(leaves, needs, whole, strict=True):
        if need:
            assert_alike([leaf.grad], [expected])
        else:
            assert leaf.grad is None


def test_no_chunk_is_kept_until_backward() -> None:
    """Two losses before one backward do not need the memory of two chunks."""
    case, cfg = Case(), ek.EPOConfig(**HINGE)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    kept = weakref.WeakSet()

    def chunks(self):
        kept.add(self)
        yield from every_chunk(self)

    every_chunk = Head.chunks
    with mock.patch.object(Head, "chunks", chunks):
        out = case.loss("eager", cfg, hidden, weight, None)
    gc.collect()
    assert not kept
    out.loss.backward()
    expected = torch.autograd.grad(case.loss("reference", cfg, hidden, weight, None).loss, (hidden, weight))
    assert_alike([hidden.grad, weight.grad], list(expected))


def test_without_gradient_nothing_is_kept() -> None:
    case, cfg = Case(), ek.EPOConfig(**HINGE)
    weight = case.weight.clone().requires_grad_()
    with torch.no_grad():
        out = case.loss("eager", cfg, case.hidden, weight, None)
    assert out.loss.grad_fn is None
    assert_alike([out.loss], [case.loss("reference", cfg, case.hidden, weight, None).loss.detach()])


def test_views_tied_and_adapted_weights() -> None:
    """hidden[:, :-1], a transposed weight, and one made of others (LoRA): the results do not depend on copies."""
    case, cfg = Case(), ek.EPOConfig(**HINGE)

    def run(backend: str) -> list[Tensor]:
        padded = torch.cat([case.hidden, case.hidden[:, :1]], dim=1).requires_grad_()
        base = case.weight.t().contiguous()
        left, right = case.weight[:, :2].clone().requires_grad_(), case.weight[:2].clone().requires_grad_()
        out = case.loss(backend, cfg, padded[:, :-1], base.t() + left @ right, None)
        out.loss.backward()
        return [out.loss.detach(), padded.grad, left.grad, right.grad]

    assert_alike(run("eager"), run("reference"))


def test_backward_gives_the_gradient_away_once() -> None:
    case, cfg = Case(), ek.EPOConfig()
    hidden = case.hidden.clone().requires_grad_()
    out = case.loss("eager", cfg, hidden, case.weight, None)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        out.loss.backward()


def test_accumulation_and_checkpointing() -> None:
    """Two micro-batches with the batch's normalizer, recomputed under activation checkpointing, equal the batch."""
    case, cfg = Case(), ek.EPOConfig(**HINGE)
    whole = case.run("reference", cfg)
    hidden, weight, bias = (value.clone().requires_grad_() for value in (case.hidden, case.weight, case.bias))
    for rows in (slice(0, 1), slice(1, 3)):
        part = Case()
        part.tokens, part.old_log_probs, part.advantages, part.mask = (
            value[rows] for value in (case.tokens, case.old_log_probs, case.advantages, case.mask)
        )
        keywords = {"normalizer": float(case.mask.sum()), "max_chunk_bytes": SMALL}
        for name in ("ref_log_probs", "is_weights"):
            keywords[name] = case.keywords[name][rows]
        keywords["entropy_bounds"] = tuple(bound[rows] for bound in case.keywords["entropy_bounds"])

        def loss(hidden: Tensor, part: Case = part, keywords: dict = keywords) -> Tensor:
            return part.loss("eager", cfg, hidden, weight, bias, **keywords).loss

        torch.utils.checkpoint.checkpoint(loss, hidden[rows], use_reentrant=False).backward()
    assert_alike([hidden.grad, weight.grad, bias.grad], whole[3:])


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=NEEDS_CPU)])
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("max_chunk_bytes", ONE_OR_SEVERAL_CHUNKS)
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_error_is_that_of_eager_or_less(
    backend: str,
    scope: str,
    dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    max_chunk_bytes: int,
    upstream: float,
) -> None:
    """The three-way rule, against float64 of the same inputs: loss, ∂hidden, ∂weight, ∂bias."""
    case, cfg = Case(dtype), ek.EPOConfig(band_scope=scope, **HINGE)
    exact = Case(dtype)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    truth = exact.run("reference", cfg, upstream)
    eager = case.run("reference", cfg, upstream, logits_dtype=logits_dtype)
    ours = case.run(backend, cfg, upstream, logits_dtype=logits_dtype, max_chunk_bytes=max_chunk_bytes)
    for index in (0, 3, 4, 5):
        rounded = 1.0 if index == 0 else truth[index].norm()  # the loss is a sum of terms of either sign, near 1
        allowed = (eager[index].double() - truth[index]).norm() + torch.finfo(dtype).eps * rounded
        assert (ours[index].double() - truth[index]).norm() <= allowed


class Made(TorchDispatchMode):
    """Shapes and dtypes of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors |= {(tuple(value.shape), value.dtype) for value in (result,) if isinstance(value, Tensor)}
        return result


@pytest.mark.parametrize(
    ("dtype", "max_chunk_bytes", "is_wide"),
    [
        (torch.bfloat16, 1 << 20, False),
        (torch.bfloat16, 3000, True),  # chunks are added up in float32
        (torch.float16, 1 << 20, True),  # the scale of ∂logits is divided out in float32
    ],
)
def test_a_single_chunk_needs_no_float32_gradient_of_the_weight(
    dtype: torch.dtype, max_chunk_bytes: int, is_wide: bool
) -> None:
    case, cfg = Case(dtype), ek.EPOConfig(**HINGE)
    weight = case.weight.clone().requires_grad_()
    with Made() as made:
        case.loss("eager", cfg, case.hidden, weight, None, max_chunk_bytes=max_chunk_bytes).loss.backward()
    assert (((V, D), torch.float32) in made.tensors) == is_wide


def test_float16_gradients_do_not_vanish() -> None:
    """Token weights of 2^-26 and a GradScaler: without a scale of its own the kept gradient would be all zeros."""
    case, cfg = Case(torch.float16), ek.EPOConfig()
    ours = case.run("eager", cfg, upstream=2.0**10, normalizer=2.0**26)
    exact = Case(torch.float16)
    exact.hidden, exact.weight, exact.bias = (v.double() for v in (case.hidden, case.weight, case.bias))
    truth = exact.run("reference", cfg, upstream=2.0**10, normalizer=2.0**26)
    assert truth[4].abs().max() < 2.0**-12  # small enough to matter
    torch.testing.assert_close(ours[4].double(), truth[4], rtol=0.02, atol=2.0**-24)


def test_autocast_and_master_weights() -> None:
    """float32 parameters under bfloat16 autocast: gradients come back in float32, as from F.linear."""
    case, cfg = Case(torch.float32), ek.EPOConfig(**HINGE)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = case.run("eager", cfg), case.run("reference", cfg)
    assert [value.dtype for value in ours[3:]] == [torch.float32] * 3
    exact = case.run("reference", cfg)
    for got, theirs, truth in zip(ours[3:], eager[3:], exact[3:], strict=True):
        assert (got - truth).norm() <= 1.05 * (theirs - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize(
    ("backend", "inside"),  # backward inside of autocast too: PyTorch's own products would be cast there
    [
        ("reference", False),
        ("eager", False),
        ("eager", True),
        pytest.param("cpu", False, marks=NEEDS_CPU),
        pytest.param("cpu", True, marks=NEEDS_CPU),
    ],
)
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_head_under_autocast(dtype: torch.dtype, scope: str, backend: str, inside: bool) -> None:
    """Products in float32 of the unchanged operands, forward and backward: bit-identical to no autocast."""
    case, cfg = Case(dtype), ek.EPOConfig(band_scope=scope, **HINGE)
    expected = case.run(backend, cfg, logits_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [value.clone().requires_grad_() for value in (case.hidden, case.weight, case.bias)]
        out = case.loss(backend, cfg, *leaves, logits_dtype=torch.float32)
        if inside:
            out.loss.backward()
    if not inside:
        out.loss.backward()
    got = [out.loss.detach(), out.log_probs, out.entropy, *(leaf.grad for leaf in leaves)]
    assert_alike(got, expected, tolerance=0.0)
    wide = [value.float() for value in (case.hidden, case.weight, case.bias)]
    truth = torch.log_softmax(wide[0] @ wide[1].t() + wide[2], -1).gather(-1, case.tokens[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, torch.where(case.mask, truth, 0.0), rtol=1e-5, atol=1e-5)


def test_scores_of_a_float32_head_under_autocast() -> None:
    case = Case(torch.bfloat16)
    call = {"mask": case.mask, "bias": case.bias, "logits_dtype": torch.float32, "backend": "eager"}

    def score(function=ek.linear_log_probs_and_entropy) -> list[Tensor]:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        log_probs, entropy = function(hidden, weight, case.tokens, **call)
        gradients = torch.autograd.grad((log_probs * entropy).sum(), [hidden, weight])
        return [log_probs.detach(), entropy.detach(), *gradients]

    expected = score()
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(score(), expected, tolerance=0.0)
        torch._dynamo.reset()
        compiled = score(torch.compile(ek.linear_log_probs_and_entropy, backend="eager"))
    assert_alike(compiled, expected, tolerance=0.0)


def test_autocast_leaves_float64_alone() -> None:
    case, cfg = Case(), ek.EPOConfig(**HINGE)
    expected = case.run("auto", cfg)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run("auto", cfg)
        mixed = case.loss("auto", cfg, case.hidden.float(), case.weight, case.bias)
    assert [value.dtype for value in got] == [torch.float64] * 6
    assert_alike(got, expected, tolerance=0.0)
    assert (mixed.loss.dtype, mixed.log_probs.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("entropy", [True, False])
def test_log_probs_and_entropy(entropy: bool) -> None:
    case = Case()

    def run(backend: str) -> list[Tensor]:
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        log_probs, entropies = ek.linear_log_probs_and_entropy(
            hidden, weight, case.tokens, mask=case.mask, entropy=entropy, backend=backend, max_chunk_bytes=SMALL
        )
        assert (entropies is None) != entropy
        total = log_probs.sin().sum()
        if entropies is not None:
            total = total + entropies.square().sum()
        total.backward(retain_graph=True)
        total.backward()  # nothing is given away here
        return [log_probs.detach(), hidden.grad, weight.grad]

    assert_alike(run("eager"), run("reference"), 1e-12)


@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("num_active", [None, "count"])
def test_compiles_whole(scope: str, num_active: str | None) -> None:
    case, cfg = Case(torch.float32), ek.EPOConfig(band_scope=scope, **HINGE)
    count = int(case.mask.sum()) if num_active else None
    compiled = torch.compile(case.loss, fullgraph=True, backend="aot_eager")

    def run(loss) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in (case.hidden, case.weight, case.bias)]
        out = loss("eager", cfg, *leaves, num_active=count)
        out.loss.backward()
        return [out.loss.detach(), out.log_probs, out.entropy, *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    assert_alike(run(compiled), run(case.loss), 2e-6)


@NEEDS_CPU
def test_inductor_takes_a_transposed_weight() -> None:
    case, cfg = Case(torch.float32), ek.EPOConfig(**HINGE)
    compiled = torch.compile(case.loss, fullgraph=True)

    def run(loss) -> list[Tensor]:
        columns = case.weight.t().contiguous().requires_grad_()
        out = loss("cpu", cfg, case.hidden, columns.t(), None)
        out.loss.backward()
        return [out.loss.detach(), columns.grad]

    torch._dynamo.reset()
    assert_alike(run(compiled), run(case.loss), 2e-6)


@NEEDS_CPU
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_operators_keep_their_promises(needs: tuple[bool, ...]) -> None:
    case = Case(torch.float32)
    heads = [
        value.requires_grad_(need) for value, need in zip((case.hidden, case.weight, case.bias), needs, strict=True)
    ]
    rest = case.tokens, case.mask, torch.ones(()), V, None, None, torch.float32, torch.float32, None, SMALL, "cpu"
    for entropy in (True, False):
        torch.library.opcheck(torch.ops.epo_kernels.linear_statistics.default, (*heads, *rest, entropy))
    given = [value.detach() for value in heads]
    given[1] = given[1].t().contiguous().t()
    statistics = torch.ops.epo_kernels.linear_statistics(*given, *rest, True)
    upstream = torch.ones(case.tokens.shape)
    gradient = torch.ops.epo_kernels.linear_gradient.default
    torch.library.opcheck(gradient, (*given, *rest, list(statistics), upstream, upstream, list(needs)))


PEAK = """
import resource, sys, torch
import epo_kernels as ek
hidden = torch.randn(1, 4096, 64).requires_grad_()
weight = torch.randn(151_936, 64).div(8).requires_grad_()
tokens = torch.randint(151_936, (1, 4096))
batch = tokens, torch.full((1, 4096), -12.0), torch.randn(1, 4096), torch.ones(1, 4096, dtype=torch.bool)
cfg = ek.EPOConfig(penalty="hinge", band_scope=sys.argv[1])
bounds = torch.ones(1), torch.full((1,), 2.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = ek.linear_epo_loss(hidden, weight, *batch, cfg, entropy_bounds=bounds, max_chunk_bytes=512 << 20)
out.loss.backward()
assert weight.grad.isfinite().all() and hidden.grad.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@NEEDS_CPU
@pytest.mark.parametrize("scope", ["token", "segment"])
def test_peak_memory_is_a_chunk_and_the_weight_gradient(scope: str) -> None:
    """4,096 x 64 x 151,936: the logits alone are 2,374 MiB; a chunk is 512, hidden and weight gradient 40."""
    done = subprocess.run([sys.executable, "-c", PEAK, scope], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) <= 700


def test_chunks_are_multiples_of_tiles_within_the_budget() -> None:
    row = 152_064 * 2
    for budget in (1 << 30, 512 << 20, 40 << 20):
        rows = chunk_rows(8192, row, budget, 3584, 132)
        assert rows % 128 == 0
        assert rows * row <= budget
        assert math.ceil(8192 / rows) == math.ceil(8192 / (budget // (128 * row) * 128)), "no more chunks than needed"
    # 8192 tokens are 64 multiples of 128, and take three chunks of 22 to 27. 3584 columns are 14 tiles:
    # 132 processors are filled by 9.43 rows of tiles.
    filling = {m: (m * 14 / 132) / math.ceil(m * 14 / 132) for m in range(22, 28)}
    assert chunk_rows(8192, row, 27 * 128 * row, 3584, 132) == 128 * max(filling, key=lambda m: (filling[m], m))
    assert chunk_rows(1230, row, 27 * 128 * row, 4096, 132) == 1280, "one chunk, though 1024 would fill its last wave"
    assert chunk_rows(8192, row, 27 * 128 * row, 3584, 1) == 27 * 128, "a CPU has no waves: the most that fit"
    assert chunk_rows(8192, row, 100 * row, 3584, 132) == 100
    assert chunk_rows(8192, row, 1, 3584, 132) == 1
    assert chunk_rows(300, row, 1 << 40, 3584, 1) == 384
    assert chunk_rows(0, row, 1 << 30, 3584, 132) == 128


@pytest.mark.parametrize(("width", "vocab"), [(1024, 2), (8, 4096)])
def test_chunks_count_their_hidden_states(width: int, vocab: int) -> None:
    hidden, budget = torch.zeros(1, 3000, width), 2 << 20
    unmasked = unmasked_tokens(torch.ones(1, 3000, dtype=torch.bool), None)
    head = Head(
        hidden,
        torch.zeros(vocab, width),
        None,
        vocab_size=vocab,
        product_dtype=torch.float32,
        logits_dtype=torch.float32,
        unmasked=unmasked,
        max_chunk_bytes=budget,
    )
    chunks = [4 * (2 * chunk.numel() + logits.numel()) for _, chunk, logits in head.chunks()]
    assert len(chunks) > 1
    assert budget / 2 < chunks[0] == max(chunks) <= budget


def test_errors_name_the_argument() -> None:
    case, cfg = Case(), ek.EPOConfig()
    for keywords, message in [
        ({"max_chunk_bytes": 0}, "max_chunk_bytes must be an int of at least 1, got 0"),
        ({"num_active": -1}, r"num_active must be an int in \[0, 150\]"),
        ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float64"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(11,\), got \(3,\)"),
    ]:
        keywords = {"bias": None, **keywords}
        with pytest.raises(ValueError, match=message):
            case.loss("eager", cfg, case.hidden, case.weight, **keywords)
    with pytest.raises(ValueError, match=r"weight must be \(vocabulary, 6\) to match hidden's width 6, got \(6, 11\)"):
        case.loss("eager", cfg, case.hidden, case.weight.t(), None)
    with pytest.raises(TypeError, match=r"bias must be a float32, .*\(float64 if .* are\), got torch\.float64"):
        case.loss("reference", cfg, case.hidden.float(), case.weight.float(), case.bias)
    with pytest.raises(TypeError, match=r"bias must be a float32, .* got torch\.int64"):
        case.loss("eager", cfg, case.hidden, case.weight, torch.zeros(V, dtype=torch.int64))
    with pytest.raises(TypeError, match="weight must be a float32"):
        case.loss("eager", cfg, case.hidden, None, None)
    with pytest.raises(ValueError, match=r"tokens must have shape \(3, 49\), got \(3, 50\)"):
        case.loss("eager", cfg, case.hidden[:, :-1], case.weight, None)


def test_modules_keep_their_config() -> None:
    case = Case()
    cfg = ek.EPOConfig(**HINGE)
    batch = case.tokens, case.old_log_probs, case.advantages, case.mask
    module = ek.LinearEPOLoss(cfg, entropy_bounds=case.keywords["entropy_bounds"], backend="reference")
    expected = case.loss("reference", cfg, case.hidden, case.weight, None, ref_log_probs=None, is_weights=None)
    assert torch.equal(module(case.hidden, case.weight, *batch).loss, expected.loss)
    logits = case.hidden @ case.weight.t()
    from_logits = ek.EPOLoss(cfg, entropy_bounds=case.keywords["entropy_bounds"], backend="reference")
    torch.testing.assert_close(from_logits(logits, *batch).loss, expected.loss)
    assert torch.equal(
        from_logits(logits, *batch, entropy_coeff=0.0).loss,
        from_logits(logits, *batch, entropy_coeff=torch.tensor(0.0)).loss,
    )
    assert "penalty='hinge'" in repr(module)
