"""Beyond first derivatives in reverse mode: correct on the reference, rejected with advice by the fused backends."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels import backends
from epo_kernels.fused.backend import FusedBackend
from tests.eager_rows import EagerRows
from tests.test_linear import NEEDS_CPU

B, T, D, V = 2, 3, 4, 5
ADVICE = 'Use backend="reference"'


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch):
    """A fused backend that runs anywhere, also in float64."""
    backend = FusedBackend("eager", ("cpu",), EagerRows, lambda: None)
    backend.dtypes = (*backend.dtypes, torch.float64)
    monkeypatch.setitem(backends._BACKENDS, "eager", backend)


def leaves():
    """The weight of a layer below the head, and the head's weight and bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((D, D), (V, D), (V,))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def batch(scope="token"):
    """The arguments of a loss from `tokens` on, and its keywords."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(V, (B, T), generator=generator)
    old, advantages = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    cfg = ek.EPOConfig(penalty="quadratic", penalty_alpha=2.0, entropy_coeff=0.5, band_scope=scope, kl_coeff=0.1)
    bounds = torch.full((B, T), 0.9), torch.full((B, T), 1.0)
    return (tokens, old - 1.6, advantages, mask, cfg), {"entropy_bounds": bounds, "ref_log_probs": old - 1.5}


def statistics_form(function):
    (tokens, _, _, mask, _), _ = batch()

    def total(*head, backend):
        log_probs, entropy = function(*head, tokens, mask, backend)
        return log_probs.sin().sum() + entropy.square().sum()

    return total


def loss_form(scope, function):
    arguments, keywords = batch(scope)

    def loss(*head, backend):
        return function(*head, *arguments, backend=backend, **keywords).loss

    return loss


def from_logits(hidden, weight, bias, *arguments, **keywords):
    return ek.epo_loss(hidden @ weight.t() + bias, *arguments, **keywords)


def from_hidden(hidden, weight, bias, *arguments, **keywords):
    return ek.linear_epo_loss(hidden, weight, *arguments, bias=bias, **keywords)


def from_log_probs(hidden, weight, bias, tokens, *arguments, backend, **keywords):
    statistics = ek.log_probs_and_entropy(hidden @ weight.t() + bias, tokens, backend=backend)
    return ek.epo_loss_from_log_probs(*statistics, *arguments, **keywords)


FORMS = {
    "logits": loss_form("token", from_logits),
    "logits, in place": loss_form("token", lambda *call, **keywords: from_logits(*call, inplace=True, **keywords)),
    "logits, segment": loss_form("segment", from_logits),
    "linear": loss_form("token", from_hidden),
    "linear, segment": loss_form("segment", from_hidden),
    "log_probs": loss_form("token", from_log_probs),
    "statistics": statistics_form(
        lambda hidden, weight, bias, tokens, mask, backend: ek.log_probs_and_entropy(
            hidden @ weight.t() + bias, tokens, mask=mask, backend=backend
        )
    ),
    "linear statistics": statistics_form(
        lambda hidden, weight, bias, tokens, mask, backend: ek.linear_log_probs_and_entropy(
            hidden, weight, tokens, bias=bias, mask=mask, backend=backend
        )
    ),
}


@pytest.fixture(params=FORMS)
def form(request):
    """A function of (layer, weight, bias), and of the backend's name."""
    hidden = torch.randn(B, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda layer, weight, bias, backend="eager": FORMS[request.param](
        torch.tanh(hidden @ layer), weight, bias, backend=backend
    )


def test_the_reference_has_every_derivative(form):
    def reference(*inputs):
        return form(*inputs, backend="reference")

    assert torch.autograd.gradcheck(reference, leaves(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(reference, leaves())


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (1, 2), (2, 2)])
def test_second_derivatives_raise(form, first, second):
    """Also if only part of them would be lost: the head's gradient depends on the layer through its input too."""
    inputs = leaves()
    (gradient,) = torch.autograd.grad(form(*inputs), inputs[first], create_graph=True)
    (expected,) = torch.autograd.grad(form(*inputs, backend="reference"), inputs[first])
    assert_close(gradient.detach(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.autograd.grad(gradient.square().sum(), inputs[second])


def test_derivatives_of_a_gradient_in_its_upstream_raise(form):
    inputs, factor = leaves(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(form(*inputs) * factor, inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.autograd.grad(gradient.sum(), factor)


@pytest.mark.parametrize("form", ["logits", "logits, in place", "linear"], indirect=True)
def test_a_gradient_is_given_away_once_under_create_graph_too(form):
    inputs = leaves()
    loss = form(*inputs)
    torch.autograd.grad(loss, inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, inputs[1], create_graph=True)


def test_a_loss_may_be_scaled_in_place(form):
    inputs = leaves()
    loss = form(*inputs)
    loss /= 4
    loss.backward()
    (expected,) = torch.autograd.grad(form(*inputs), inputs[1])
    assert_close(inputs[1].grad, expected / 4)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_raises(form, place, grad):
    inputs = leaves()
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        inputs[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
        with pytest.raises(RuntimeError, match=f"forward-mode AD.*{ADVICE}"):
            form(*inputs)


def test_forward_mode_over_backward_raises(form):
    inputs = leaves()
    loss = form(*inputs)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(RuntimeError, match=f"forward-mode AD.*{ADVICE}"):
            torch.autograd.grad(loss, inputs[1], upstream)


def test_transforms_raise(form):
    layer, weight, bias = (leaf.detach() for leaf in leaves())

    def loss(weight):
        return form(layer, weight, bias)

    with pytest.raises(RuntimeError, match=f"torch.func.*{ADVICE}"):
        torch.func.grad(loss)(weight)
    with pytest.raises(RuntimeError, match=f"torch.func.*{ADVICE}"):
        torch.func.jvp(loss, (weight,), (weight,))
    with pytest.raises(RuntimeError, match=f"torch.func.*{ADVICE}"):
        torch.func.vmap(loss)(torch.stack([weight, 2 * weight]))


@NEEDS_CPU
@pytest.mark.parametrize("given", ["logits", "hidden"])
def test_transforms_of_statistics_without_gradients_raise(given):
    layer, weight, _ = (leaf.detach().float() for leaf in leaves())

    def entropy(weight):
        if given == "logits":
            return ek.distribution_statistics(weight.expand(2, *weight.shape), backend="cpu").entropy
        return ek.linear_distribution_statistics(layer, weight, backend="cpu").entropy

    entropy(weight)
    with pytest.raises(RuntimeError, match=f"torch.func.*{ADVICE}"):
        torch.func.vmap(entropy)(torch.stack([weight, 2 * weight]))


def test_batched_gradients_raise(form):
    inputs = leaves()
    with pytest.raises(RuntimeError, match=f"is_grads_batched.*{ADVICE}"):
        torch.autograd.grad(form(*inputs), inputs[1], torch.ones(3, dtype=torch.float64), is_grads_batched=True)


def test_transforms_of_the_reference_are_right(form):
    layer, weight, bias = (leaf.detach() for leaf in leaves())

    def loss(weight):
        return form(layer, weight, bias, backend="reference")

    weights = torch.stack([weight, 2 * weight])
    assert_close(torch.func.vmap(loss)(weights), torch.stack([loss(one) for one in weights]))
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(weight), expected)
    tangent = torch.randn_like(weight)
    assert_close(torch.func.jvp(loss, (weight,), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.parametrize("form", ["logits", "linear"], indirect=True)
def test_compiled_operators_raise_too(form):
    torch._dynamo.reset()
    inputs = leaves()
    compiled = torch.compile(form, backend="eager")
    (gradient,) = torch.autograd.grad(compiled(*inputs), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.autograd.grad(gradient.square().sum(), inputs[0])
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.autograd.grad(compiled(*inputs), inputs[1], torch.ones(3, dtype=torch.float64), is_grads_batched=True)
    layer, weight, bias = (leaf.detach() for leaf in inputs)
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.func.jvp(lambda weight: compiled(layer, weight, bias), (weight,), (weight,))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("scope", ["token", "segment"])
@pytest.mark.parametrize("function", [from_logits, from_hidden, from_log_probs])
def test_fake_tensors_pass_by_shape_alone(function, scope, backend):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        arguments, keywords = batch(scope)
        head = [torch.randn(*shape, requires_grad=True) for shape in ((B, T, D), (V, D), (V,))]
        out = function(*head, *arguments, backend=backend, **keywords)
        gradients = torch.autograd.grad(out.loss, head)
    assert (out.loss.shape, out.loss.dtype) == ((), torch.float32)
    assert (out.log_probs.shape, out.entropy.shape, out.metrics.values.dtype) == ((B, T), (B, T), torch.float64)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in head]
