"""The entropy controller: each rule against a plain version, TRL's gate by hand, and resuming from a saved state."""

import io
import math

import pytest
import torch

import epo_kernels as ek
from tests.sharded.launch import run_on_ranks

RULES = {
    "step": {"entropy_coeff": 0.1, "delta": 0.05, "coeff_min": 0.02, "coeff_max": 0.2},
    "pi": {"entropy_coeff": 0.1, "kp": 0.3, "ki": 0.1, "coeff_max": 0.3},
    "boxed": {"entropy_coeff": 0.1, "lr": 0.2, "target_high": 0.4, "coeff_min": 0.05, "coeff_max": 0.3},
}


def fed(controller, entropies):
    """λ before the first update and after each."""
    told = [float(controller.entropy_coeff)]
    for entropy in entropies:
        controller.update(torch.tensor(entropy, dtype=torch.float64))
        told.append(float(controller.entropy_coeff))
    return told


def test_trls_adaptive_entropy_by_hand():
    """use_adaptive_entropy, target 0.2, delta 0.005, bounds [0, 0.01], from 0: what each window applies.

    Its coefficient goes 0, 0.005, 0.01, 0.01 (bound), 0.005, 0, 0 (bound), 0.005; it is applied only where the last
    entropy was at or below the target, and never in the first window.
    """
    controller = ek.EntropyController(0.2, coeff_max=0.01)
    entropies = [0.15, 0.2, 0.1, 0.3, 0.25, 0.9, 0.19]
    assert fed(controller, entropies) == pytest.approx([0, 0.005, 0.01, 0.01, 0, 0, 0, 0.005], abs=1e-9)


def test_trls_first_window_is_gated_from_any_coefficient():
    controller = ek.EntropyController(0.2, entropy_coeff=0.5)
    assert fed(controller, [0.21, 0.2]) == pytest.approx([0, 0, 0.5])
    assert controller.state_dict()["coeff"] == pytest.approx(0.5)


def plain(rule, entropies, target, *, entropy_coeff, coeff_min=0.0, coeff_max=1.0, target_high=None, **gains):
    told, coeff, integral = [0.0 if rule == "step" else entropy_coeff], entropy_coeff, 0.0

    def clip(value):
        return min(max(value, coeff_min), coeff_max)

    for entropy in entropies:
        if rule == "step":
            low = entropy <= target
            coeff = min(coeff + gains["delta"], coeff_max) if low else max(coeff - gains["delta"], coeff_min)
            told.append(coeff if low else 0.0)
        elif rule == "pi":
            error = target - entropy
            integral = (clip(entropy_coeff + gains["ki"] * (integral + error)) - entropy_coeff) / gains["ki"]
            told.append(clip(entropy_coeff + gains["kp"] * error + gains["ki"] * integral))
        else:
            coeff = clip(coeff - gains["lr"] * (min(0.0, entropy - target) + max(0.0, entropy - target_high)))
            told.append(coeff)
    return told


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_plain_rule(rule):
    generator = torch.Generator().manual_seed(0)
    entropies = (0.8 * torch.rand(60, generator=generator, dtype=torch.float64)).tolist() + [0.0] * 20 + [2.0] * 20
    controller = ek.EntropyController(0.3, rule, **RULES[rule])
    expected = plain(rule, entropies, 0.3, **RULES[rule])
    assert len(set(expected)) > 3
    assert fed(controller, [float(value) for value in entropies]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_boxed_leaves_the_coefficient_between_its_entropies():
    controller = ek.EntropyController(0.3, "boxed", **RULES["boxed"])
    assert fed(controller, [0.3, 0.35, 0.4]) == pytest.approx([0.1] * 4)
    assert fed(controller, [0.2, 0.6])[1:] == pytest.approx([0.12, 0.08])


@pytest.mark.parametrize("rule", ["pi", "boxed"])
def test_it_holds_a_simple_system_at_its_target(rule):
    """A policy whose entropy falls by a tenth each update and rises with λ ends at the target."""
    settings = {"pi": {"kp": 0.1, "ki": 0.02}, "boxed": {"lr": 0.02}}[rule]
    controller, entropy = ek.EntropyController(0.5, rule, **settings), 1.0
    for _ in range(1500):
        controller.update(torch.tensor(entropy))
        entropy += -0.1 * entropy + float(controller.entropy_coeff)
    assert entropy == pytest.approx(0.5, abs=0.02)


def test_the_integral_does_not_wind_up():
    """However long λ was at its bound, it leaves it at the first entropies on the other side (anti-windup)."""
    controller = ek.EntropyController(0.3, "pi", kp=0.01, ki=0.1, coeff_max=0.05)
    fed(controller, [0.0] * 500)
    assert float(controller.entropy_coeff) == pytest.approx(0.05)
    assert fed(controller, [0.5, 0.5, 0.5])[-1] < 0.05


@pytest.mark.parametrize("rule", RULES)
def test_updates_without_entropy_change_nothing(rule):
    controller = ek.EntropyController(0.3, rule, **RULES[rule])
    fed(controller, [0.2, 0.25])
    before = controller.state_dict()
    controller.update(torch.zeros(0))
    controller.update(torch.zeros(2), torch.zeros(2))
    controller.update(torch.tensor([0.1, math.nan]))
    controller.update(torch.tensor(math.inf))
    assert controller.state_dict() == before


def test_masked_entropies_are_not_read():
    controller, other = ek.EntropyController(0.3), ek.EntropyController(0.3)
    controller.update(torch.tensor([[0.2, math.nan], [0.6, 0.1]]), torch.tensor([[1, 0], [0, 1]]))
    other.update(torch.tensor(0.15))
    assert controller.state_dict() == pytest.approx(other.state_dict() | {"entropy": pytest.approx(0.15)})


def loss_of(entropy_coeff, seed=0, tokens=6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, tokens, 9, generator=generator)
    mask = torch.ones(1, tokens)
    ids = torch.randint(9, (1, tokens), generator=generator)
    cfg = ek.EPOConfig(entropy_coeff=0.0)
    return ek.epo_loss(logits, ids, None, torch.ones(1), mask, cfg, entropy_coeff=entropy_coeff)


def test_the_metrics_of_micro_batches_are_one_update():
    controller, whole = ek.EntropyController(1.5, "pi"), ek.EntropyController(1.5, "pi")
    outputs = [loss_of(controller.entropy_coeff, seed, tokens) for seed, tokens in ((0, 6), (1, 2))]
    controller.update(sum(out.metrics for out in outputs))
    whole.update(torch.cat([out.entropy.reshape(-1) for out in outputs]))
    assert float(controller.entropy_coeff) == pytest.approx(float(whole.entropy_coeff), rel=1e-6)
    with pytest.raises(ValueError, match="mask must be None"):
        controller.update(outputs[0].metrics, torch.ones(6))


def test_the_loss_takes_the_tensor_and_it_stays_the_same_object():
    controller = ek.EntropyController(3.0, entropy_coeff=0.3)
    coeff = controller.entropy_coeff
    assert (coeff.dtype, coeff.shape) == (torch.float32, ())
    assert float(loss_of(coeff).loss) == pytest.approx(float(loss_of(0.0).loss))
    out = loss_of(coeff)
    controller.update(out.metrics)
    assert controller.entropy_coeff is coeff
    assert float(coeff) == pytest.approx(0.305)
    assert float(loss_of(coeff).loss) == pytest.approx(float(loss_of(0.305).loss))
    assert float(loss_of(coeff).loss) < float(loss_of(0.0).loss)


def test_a_compiled_loss_is_compiled_once():
    controller, graphs = ek.EntropyController(3.0, entropy_coeff=0.3), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda entropy, coeff: (entropy * coeff).sum(), backend=count)
    told = []
    for _ in range(4):
        entropy = torch.ones(3)
        told.append(float(compiled(entropy, controller.entropy_coeff)))
        controller.update(entropy)
    assert told == pytest.approx([0, 0.915, 0.93, 0.945])
    assert len(graphs) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_state_goes_on_to_the_last_bit(rule):
    generator = torch.Generator().manual_seed(1)
    entropies = (0.7 * torch.rand(30, generator=generator)).tolist()
    whole, first = (ek.EntropyController(0.3, rule, **RULES[rule]) for _ in range(2))
    expected = fed(whole, entropies)
    fed(first, entropies[:13])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = ek.EntropyController(0.3, rule, **RULES[rule])
    coeff = second.entropy_coeff
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.entropy_coeff is coeff
    assert fed(second, entropies[13:]) == expected[13:]
    assert second.state_dict() == whole.state_dict()


def test_a_state_of_another_rule_is_refused():
    with pytest.raises(ValueError, match=r"rule must match .*'step', got 'pi'"):
        ek.EntropyController(0.3, "pi").load_state_dict(ek.EntropyController(0.3).state_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "pid"}, ValueError, "rule must be one of step, pi, boxed"),
        ({"target": math.nan}, ValueError, "target must be finite"),
        ({"target": torch.tensor(0.1)}, TypeError, "target must be a number"),
        ({"target_high": 0.1}, ValueError, "target_high must be at least"),
        ({"entropy_coeff": 2.0}, ValueError, "entropy_coeff must be in"),
        ({"coeff_min": 0.5}, ValueError, "entropy_coeff must be in"),
        ({"delta": -1.0}, ValueError, "delta must be"),
        ({"kp": -1.0}, ValueError, "kp must be"),
        ({"ki": -1.0}, ValueError, "ki must be"),
        ({"lr": "fast"}, TypeError, "lr must be"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        ek.EntropyController(**{"target": 0.3, **change})


def test_bad_updates():
    controller = ek.EntropyController(0.3)
    with pytest.raises(TypeError, match="entropy must be"):
        controller.update(0.3)
    with pytest.raises(TypeError, match="entropy must be"):
        controller.update(torch.tensor([1]))
    with pytest.raises(ValueError, match="mask must have the shape"):
        controller.update(torch.zeros(2), torch.ones(3))


def test_on_two_ranks(tmp_path):
    told = run_on_ranks(["controller"], 2, tmp_path)
    assert told == [{}, {}], "\n".join(text for failed in told for text in failed.values())
