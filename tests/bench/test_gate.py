"""The gate's truth equals the reference's, and incorrect results fail it."""

import pytest
import torch
from torch.testing import assert_close

import epo_kernels as ek
from bench import gate
from bench.cases import TINY, Case
from bench.implementations import ours, with_gradients
from bench.inputs import make_inputs
from bench.truth import CONTRACTS, POLICY_CONFIG, Truth, config_of, loss_arguments, without_last

CPU = torch.device("cpu")
LOSS = Case("loss", "tiny", 64, "fp32", unmasked=0.5)


def prepared(case, contract):
    truth = Truth(case, make_inputs(case, CPU, seed=1))
    return truth.inputs, truth.outputs(contract)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_truth_is_that_of_the_whole_float64_loss(case):
    inputs, truth = prepared(case, "loss" if case.gradient else "scores")
    wide = inputs.__class__(
        **{
            **vars(inputs),
            **{
                name: getattr(inputs, name).detach().double().requires_grad_(case.gradient)
                for name in ("logits", "hidden", "weight")
                if getattr(inputs, name) is not None
            },
        }
    )
    outputs = ours(case, "reference")(wide)
    assert outputs.keys() == truth.keys()
    for name, value in outputs.items():
        assert_close(value.double(), truth[name].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_reference_passes_in_its_own_dtype(case):
    inputs, truth = prepared(case, "loss" if case.gradient else "scores")
    assert gate.check(case, ours(case, "reference")(inputs), truth) == "pass"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_rounded_to_bfloat16_decide_no_clip_and_no_bound(backend):
    case = Case("linear-loss", "tiny", 1024, "bf16")
    inputs, truth = prepared(case, "loss")
    assert gate.check(case, ours(case, backend)(inputs), truth) == "pass"


def wrong_without_entropy(outputs, inputs):
    cfg = ek.EPOConfig(**{**vars(config_of(LOSS)), "entropy_coeff": 0.0})
    per_token = (inputs.tokens, inputs.old_log_probs, inputs.advantages, inputs.mask)
    out = ek.epo_loss(inputs.logits, *per_token, cfg, backend="reference", **loss_arguments(LOSS, inputs))
    return with_gradients({**outputs}, out.loss, inputs)


WRONG = {
    "gradient without the entropy's": (wrong_without_entropy, "grad_logits is off"),
    "gradient 1 % too large": (lambda o, _: {**o, "grad_logits": 1.01 * o["grad_logits"]}, "grad_logits is off"),
    "one row never written": (
        lambda o, _: {**o, "grad_logits": o["grad_logits"].index_fill(1, torch.tensor([63]), float("nan"))},
        "grad_logits is off by nan",
    ),
    "entropy in bits": (lambda o, _: {**o, "entropy": o["entropy"] / 0.693147}, "entropy is off"),
    "loss of the sum": (lambda o, _: {**o, "loss": o["loss"] * 32}, "loss is off"),
    "no log-probs": (lambda o, _: {k: v for k, v in o.items() if k != "log_probs"}, "log_probs is missing"),
    "flat log-probs": (lambda o, _: {**o, "log_probs": o["log_probs"].flatten()}, "log_probs has shape (64,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_implementation_is_refused(name):
    spoil, words = WRONG[name]
    inputs, truth = prepared(LOSS, "loss")
    verdict = gate.check(LOSS, spoil(ours(LOSS, "reference")(inputs), inputs), truth)
    assert verdict.startswith("fails: ")
    assert words in verdict


def test_every_contract_demands_a_gradient_of_what_it_says():
    truth = Truth(LOSS, make_inputs(LOSS, CPU, seed=2))
    for name, contract in CONTRACTS.items():
        outputs = truth.outputs(name)
        gradient = {"grad_logits"} if contract.objective is not None else set()
        assert outputs.keys() == set(contract.outputs) | gradient
        if gradient:
            assert outputs["grad_logits"].abs().sum() > 0
            assert outputs["grad_logits"][~truth.inputs.mask].abs().sum() == 0


def test_shifted_policy_loss_leaves_the_last_column_out():
    inputs, truth = prepared(LOSS, "shifted policy loss")
    assert truth["grad_logits"][:, -1].abs().sum() == 0
    out = ek.epo_loss(
        inputs.logits,
        inputs.tokens,
        inputs.old_log_probs,
        inputs.advantages,
        without_last(inputs.mask),
        POLICY_CONFIG,
        ref_log_probs=inputs.ref_log_probs,
        backend="reference",
    )
    assert_close(out.loss.double(), truth["loss"], rtol=1e-5, atol=1e-6)


def test_mask_counts_what_the_case_says():
    for case in (LOSS, *TINY, Case("score", "tiny", 256, "fp32", unmasked=0.15)):
        assert make_inputs(case, CPU, seed=0).mask.sum() == case.counted
