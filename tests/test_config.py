"""EPOConfig: defaults, presets, and rejected values."""

import dataclasses
import math

import pytest

import epo_kernels as ek


def test_defaults_are_those_of_the_contract():
    assert dataclasses.asdict(ek.EPOConfig()) == {
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.2,
        "clip_ratio_c": 3.0,
        "entropy_coeff": 1e-3,
        "kl_coeff": 0.0,
        "kl_type": "k3",
        "penalty": "none",
        "penalty_alpha": 0.1,
        "smooth_coeff": 1.0,
        "band_scope": "token",
        "loss_agg_mode": "token-mean",
        "temperature": 1.0,
        "policy_loss": "ppo",
        "ratio_scope": None,
        "ratio_gradient": "token",
        "sapo_tau_pos": 1.0,
        "sapo_tau_neg": 1.05,
        "dppo_divergence": "tv",
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "kl_bias_correction": False,
    }


def test_is_frozen_hashable_and_comparable():
    cfg = ek.EPOConfig(entropy_coeff=0.01)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.entropy_coeff = 0.0
    assert cfg == ek.EPOConfig(entropy_coeff=0.01) != ek.EPOConfig()
    assert hash(cfg) == hash(ek.EPOConfig(entropy_coeff=0.01))
    assert dataclasses.replace(cfg, kl_type="k1").kl_type == "k1"


@pytest.mark.parametrize(("env", "alpha"), [("scienceworld", 0.05), ("alfworld", 0.1)])
def test_presets_hold_the_published_settings(env, alpha):
    paper, code = ek.EPOConfig.paper(env), ek.EPOConfig.published_code(env)
    assert (paper.penalty, code.penalty) == ("hinge", "indicator")
    for cfg in (paper, code):
        assert (cfg.penalty_alpha, cfg.entropy_coeff, cfg.kl_coeff, cfg.kl_type) == (alpha, 0.001, 0.01, "k3")
        assert (cfg.smooth_coeff, cfg.band_scope, cfg.clip_ratio_c) == (1.0, "token", 3.0)
        # What DESIGN says of them: at β <= 2 the hinge never reverses the bonus.
        assert cfg.penalty_alpha * 2.0 * cfg.smooth_coeff < 1


def test_restoring_turns_the_bonus_round():
    cfg = ek.EPOConfig.restoring()
    assert (cfg.penalty, cfg.band_scope) == ("hinge", "segment")
    assert cfg.penalty_alpha * ek.phase_weight(0, 1, "constant") * cfg.smooth_coeff == 2.0


@pytest.mark.parametrize("preset", [ek.EPOConfig.paper, ek.EPOConfig.published_code])
def test_presets_name_the_environments_they_know(preset):
    with pytest.raises(ValueError, match=r"env must be one of scienceworld, alfworld, got 'webshop'"):
        preset("webshop")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_ratio_low", 0),
        ("clip_ratio_low", 1.0),
        ("clip_ratio_high", 0.0),
        ("clip_ratio_high", 5),
        ("clip_ratio_c", None),
        ("clip_ratio_c", 1.0000001),
        ("entropy_coeff", 0),
        ("kl_coeff", 0),
        ("penalty_alpha", 0.0),
        ("smooth_coeff", 0.0),
        ("temperature", 1e-6),
    ],
)
def test_takes_the_ends_of_each_range(field, value):
    assert getattr(ek.EPOConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("clip_ratio_low", -0.1, "finite and in [0, 1]"),
        ("clip_ratio_low", 1.1, "finite and in [0, 1]"),
        ("clip_ratio_high", -1e-9, "finite and in [0, inf)"),
        ("clip_ratio_high", math.inf, "finite and in [0, inf)"),
        ("clip_ratio_c", 1.0, "finite and in (1, inf)"),
        ("clip_ratio_c", 0.5, "finite and in (1, inf)"),
        ("entropy_coeff", math.nan, "finite"),
        ("entropy_coeff", -math.inf, "finite"),
        ("kl_coeff", -0.01, "finite and in [0, inf)"),
        ("penalty_alpha", -0.1, "finite and in [0, inf)"),
        ("smooth_coeff", math.nan, "finite and in [0, inf)"),
        ("temperature", 0.0, "finite and in (0, inf)"),
        ("temperature", -1.0, "finite and in (0, inf)"),
        ("temperature", 1e-40, "between 1.18e-38 and 3.4e+38"),
        ("kl_type", "low_var_kl", "one of k1, k2, k3, abs"),
        ("penalty", "Hinge", "one of none, hinge, quadratic, indicator, gate"),
        ("penalty", None, "one of none, hinge"),
        ("band_scope", "turn", "one of token, segment"),
        (
            "loss_agg_mode",
            "seq-mean",
            "one of token-mean, seq-mean-token-sum, seq-mean-token-mean",
        ),
    ],
)
def test_refuses_a_value_out_of_range_and_says_which(field, value, wanted):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is looked at)
        ek.EPOConfig(**{field: value})
    assert str(error.value).startswith(f"EPOConfig.{field} must be {wanted}")
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", ["0.2", True, [0.2], None])
@pytest.mark.parametrize("field", ["clip_ratio_low", "entropy_coeff", "kl_coeff", "penalty_alpha", "temperature"])
def test_refuses_what_is_no_number(field, value):
    with pytest.raises(TypeError, match=rf"EPOConfig\.{field} must be a number, got .*{type(value).__name__}"):
        ek.EPOConfig(**{field: value})


def test_refuses_an_unknown_field():
    with pytest.raises(TypeError, match="entropy_coef"):
        ek.EPOConfig(entropy_coef=0.1)
