"""verl's policy losses under loss_mode=epo: against verl's own functions, and with the band through a real update."""

import pytest
import torch
from torch.testing import assert_close
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers import config as verl_config

from epo_kernels.integrations.verl_keys import POLICY_LOSS_ALIASES, POLICY_LOSSES, EPOSettings
from tests.integrations.verl.harness import actor_config, episodes, update, update_again
from tests.integrations.verl.test_engine import KL, MODES, assert_same_update

# clip ranges that bind for each loss on the random tensors below
NARROW = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
KEYS = dict.fromkeys(POLICY_LOSSES, NARROW) | {
    "dppo_tv": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.5},
    "dppo_kl": {"clip_ratio_low": 0.005, "clip_ratio_high": 0.01, "clip_ratio_c": 1.5},
    "sapo": {"tau_pos": 1.2, "tau_neg": 2.0},
}
SELECTION = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}
CLIPPING = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "geo_mean", "cispo", "clip_cov")


def config_of(loss_mode, epo=None, **keys):
    """An actor's config, whose policy_loss has `SELECTION` too."""
    actor = actor_config(loss_mode, epo, **keys)
    actor.policy_loss._mutable_fields = {*actor.policy_loss._mutable_fields, *SELECTION}
    for name, value in SELECTION.items():
        setattr(actor.policy_loss, name, value)
    return actor


def random_batch(seed=0, rows=6, time=9):
    """Responses with gaps, one of them empty; rubbish where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, time, generator=generator) < 0.8
    mask[2] = False
    old = -3.0 * torch.rand(rows, time, generator=generator) - 0.05
    new = (old + 0.4 * torch.randn(rows, time, generator=generator)).clamp(max=-0.01)
    advantages = torch.randn(rows, time, generator=generator)
    advantages[0, 0] = 0.0
    weights = 0.5 + torch.rand(rows, time, generator=generator)
    return old, new.where(mask, -50.0), advantages.where(mask, 7.0), mask, weights


def run(loss_mode, epo, name, mode, weighted, sizes):
    old, log_probs, advantages, mask, weights = random_batch()
    config = config_of(loss_mode, epo, loss_agg_mode=mode, **KEYS[name])
    config.global_batch_info.update(sizes)
    log_probs.requires_grad_()
    torch.manual_seed(3)  # clip_cov draws tokens
    loss, metrics = get_policy_loss_fn(loss_mode)(
        old, log_probs, advantages, mask, mode, config, weights if weighted else None
    )
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


SIZES = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 12, "loss_scale_factor": 20},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_registered_loss_is_verls_own(name, mode, weighted, sizes):
    expected = run(name, None, name, mode, weighted, SIZES[sizes])
    ours = run("epo", {"penalty": "none", "policy_loss": name}, name, mode, weighted, SIZES[sizes])
    assert_close(ours[:2], expected[:2], rtol=2e-6, atol=1e-7)
    assert ours[1].abs().max() > 0
    assert ours[2] == pytest.approx(expected[2], rel=1e-5, abs=1e-7)
    if name in CLIPPING:
        assert expected[2]["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("alias", POLICY_LOSS_ALIASES)
def test_the_librarys_names_mean_the_same(alias):
    name = POLICY_LOSS_ALIASES[alias]
    results = [
        run("epo", {"penalty": "none", "policy_loss": key}, name, "token-mean", True, {}) for key in (alias, name)
    ]
    assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_real_update_equals_verls(workers, name, mode):
    keys = {**KEYS[name], **KL, "entropy_coeff": 0.3, "loss_agg_mode": mode}
    torch.manual_seed(3)
    verls = update(workers(), config_of(name, **keys), episodes())
    expected = workers().gradients
    torch.manual_seed(3)
    ours = update(workers(), config_of("epo", {"penalty": "none", "policy_loss": name}, **keys), episodes())
    assert_same_update(workers(), ours, verls, expected)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_band_adds_the_same_to_each(workers, name):
    """What a gate changes in the gradient, and the penalty, do not depend on the policy loss."""

    def added(policy_loss):
        keys = {**KEYS[name], **KL, "entropy_coeff": 0.3}
        gradients = []
        for penalty in ("none", "indicator", "gate"):
            epo = {"policy_loss": policy_loss, "penalty": penalty, "penalty_alpha": 2.0, "phase_schedule": "constant"}
            actor = config_of("epo", {**epo, "band_low": 0.9, "band_high": 1.1}, **keys)
            torch.manual_seed(3)
            worker = workers()
            update(worker, actor, episodes())
            torch.manual_seed(3)
            metrics = update_again(worker, episodes())
            gradients.append((metrics, worker.gradients))
        (plain, base), (indicated, _), (gated, gate) = gradients
        assert gated["epo/band_low_share"] + gated["epo/band_high_share"] > 0
        assert indicated["actor/pg_loss"] == pytest.approx(plain["actor/pg_loss"], rel=1e-5)
        return {key: gate[key] - base[key] for key in base}, indicated["epo/penalty"]

    (ours, penalty), (vanillas, expected) = added(name), added("vanilla")
    largest = max(value.abs().max().item() for value in vanillas.values())
    assert largest > 0
    for key, value in vanillas.items():
        assert_close(ours[key], value, rtol=1e-3, atol=1e-4 * largest)
    assert penalty == pytest.approx(expected, rel=1e-5)


def test_an_unknown_policy_loss_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"policy_loss must be one of vanilla, dppo_tv.* gmpo \(geo_mean\); got 'gspi'"
    ):
        EPOSettings.of({"policy_loss": "gspi"})


@pytest.mark.parametrize(("name", "value"), [("clip_cov_ratio", 0.0), ("kl_cov_ratio", 1.5)])
def test_a_share_of_tokens_out_of_range_is_refused(name, value):
    epo = {"policy_loss": name.removesuffix("_ratio")}
    with pytest.raises(ValueError, match=rf"policy_loss.{name} must be in \(0, 1\], got {value}"):
        verl_config.PolicyLossConfig(loss_mode="epo", epo=epo, **{name: value})
