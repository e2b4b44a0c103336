"""Random arguments for the loss, and the comparison with the loss in plain Python."""

from __future__ import annotations

from typing import get_args

import torch
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.config import LossAggMode, Penalty
from tests import plain

PENALTIES = get_args(Penalty)
MODES = get_args(LossAggMode)
# The policy losses, each in the variants of its own settings.
POLICY_VARIANTS = {
    "ppo": {},
    "cispo": {"policy_loss": "cispo"},
    "cispo-sequence": {"policy_loss": "cispo", "ratio_scope": "sequence", "ratio_gradient": "sequence"},
    "sapo": {"policy_loss": "sapo", "sapo_tau_pos": 1.5, "sapo_tau_neg": 2.5},
    "sapo-segment": {"policy_loss": "sapo", "ratio_scope": "segment", "ratio_gradient": "sequence"},
    "reinforce": {"policy_loss": "reinforce"},
    "dppo-tv": {"policy_loss": "dppo", "dppo_divergence": "tv"},
    "dppo-kl": {"policy_loss": "dppo", "dppo_divergence": "kl"},
    "gspo": {"policy_loss": "gspo"},
    "gspo-mean": {"policy_loss": "gspo", "ratio_gradient": "sequence"},
    "vespo": {"policy_loss": "vespo"},
    "gmpo": {"policy_loss": "gmpo"},
}


def policy_config(name, **settings):
    """The config of a variant, with clip ranges that random cases cross on both sides."""
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
    return ek.EPOConfig(**{**clips, **POLICY_VARIANTS[name], **settings})


# The policy losses computed by row kernels, besides "ppo".
TOKEN_POLICIES = [name for name in POLICY_VARIANTS if name != "ppo" and policy_config(name).is_per_token]


def random_case(cfg=None, seed=0, batch=3, time=5, vocab=7, dtype=torch.float64, **arguments):
    """Arguments of `epo_loss` by name: ratios on both sides of every clip, ragged rows and gaps, the last row empty."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch, time, generator=generator, dtype=torch.float64)

    logits = (2.0 * torch.randn(batch, time, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    tokens = torch.randint(vocab, (batch, time), generator=generator)
    mask = uniform(0, 1) < 0.8
    mask[0, 0], mask[-1] = True, batch == 1
    log_probs = logits.double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    case = {
        "logits": logits,
        "tokens": tokens,
        "old_log_probs": (log_probs + uniform(-1.5, 1.5)).to(floats),
        "advantages": uniform(-2, 2).to(floats),
        "mask": mask,
        "cfg": ek.EPOConfig() if cfg is None else cfg,
    }
    if case["cfg"].kl_coeff != 0:
        case["ref_log_probs"] = (log_probs + uniform(-1, 1)).to(floats)
    if case["cfg"].penalty != "none":
        case["entropy_bounds"] = (uniform(0.6, 1.1).to(floats), uniform(1.2, 1.6).to(floats))
    return {**case, **arguments}


def to_packed(case, lengths):
    """The first lengths[s] tokens of each row s, end to end."""
    keep = torch.arange(case["tokens"].shape[1]) < torch.tensor(lengths)[:, None]

    def pack(value):
        if isinstance(value, (tuple, list)):
            return tuple(map(pack, value))
        per_token = isinstance(value, torch.Tensor) and value.shape[:2] == keep.shape
        return value[keep] if per_token else value

    borders = torch.tensor([0, *lengths]).cumsum(0)
    return {name: pack(value) for name, value in case.items()} | {"cu_seqlens": borders, "max_length": 5}, keep


def run(case, backend="reference", upstream=1.0):
    """(out, gradient of the logits) of one call and its backward."""
    logits = case["logits"].detach().requires_grad_()
    out = ek.epo_loss(**{**case, "logits": logits}, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss * upstream, logits)
    return out, gradient


def metrics_of(out):
    return dict(zip(ek.metrics.METRIC_NAMES, out.metrics.values.tolist(), strict=True))


def assert_equals_plain(case, rtol=1e-9, atol=1e-11):
    """Loss, gradient, statistics and every metric equal those of the loss in plain Python."""
    out, gradient = run(case)
    expected = plain.epo_loss(**case)
    close = {"rtol": rtol, "atol": atol}
    assert_close(out.loss.item(), expected.loss, **close)
    assert_close(gradient.double(), expected.gradient, **close)
    assert_close(out.log_probs.double(), expected.log_probs, **close)
    assert_close(out.entropy.double(), expected.entropy, **close)
    for name, value in metrics_of(out).items():
        assert_close(value, float(expected.metrics[name]), **close, msg=lambda text, name=name: f"{name}: {text}")
    return out, gradient, expected


def assert_identical(first, second):
    """Two (out, gradient) of `run` agree bit for bit."""
    for a, b in ((first[0].loss, second[0].loss), (first[1], second[1])):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(first[0][1:], second[0][1:], strict=True):
        a, b = (x.values if isinstance(x, ek.LossMetrics) else x for x in (a, b))
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
