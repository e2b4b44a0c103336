"""The engine's policy q against the learner's p: weights by hand, and the gradients they correct."""

import math

import pytest
import torch

import epo_kernels as ek
from epo_kernels.train.config import load_config
from epo_kernels.train.data import ENVIRONMENT, MiniBatch, Sample
from epo_kernels.train.io.stopwatch import Stopwatch
from epo_kernels.train.rl.mismatch import mismatch_metrics, rollout_is_level, set_rollout_weights
from tests.train.test_learner import history_of, learner_of

# p/q of six tokens: two turns of an episode with the environment's answer between them.
RATIOS = [0.5, 3.0, math.nan, 4.0, 0.25, 0.5]
TURNS = [0, 0, ENVIRONMENT, 1, 1, 1]


def sample_of(ratios, turns, q=0.125):
    width = len(turns)
    rollout = torch.full((width,), math.log(q))
    scored = rollout + torch.tensor(ratios, dtype=torch.float64).log().float()
    return Sample([1], [2] * width, turns, rollout_log_probs=rollout, old_log_probs=scored)


def samples_of(layout):
    """The same tokens as one sample, or as one sample per turn."""
    if layout == "episode":
        return [sample_of(RATIOS, TURNS)]
    return [sample_of(RATIOS[:2], [0, 0]), sample_of(RATIOS[3:], [1, 1, 1])]


def weights_of(layout, level, cap):
    samples = samples_of(layout)
    set_rollout_weights(samples, level, cap)
    return samples, torch.cat([sample.is_weights[sample.mask] for sample in samples]).tolist()


@pytest.mark.parametrize("layout", ["turn", "episode"])
def test_weights_by_hand(layout):
    samples, weights = weights_of(layout, "token", 2.0)
    assert weights == pytest.approx([0.5, 2.0, 2.0, 0.25, 0.5])
    assert all(torch.isfinite(sample.is_weights).all() for sample in samples)
    _, weights = weights_of(layout, "turn", 2.0)  # 0.5 * 3, and 4 * 0.25 * 0.5
    assert weights == pytest.approx([1.5, 1.5, 0.5, 0.5, 0.5])
    _, weights = weights_of(layout, "turn", 1.0)
    assert weights == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.5])
    _, weights = weights_of(layout, "token", math.inf)
    assert weights == pytest.approx([0.5, 3.0, 4.0, 0.25, 0.5])
    samples = samples_of(layout)
    set_rollout_weights(samples, "none", 2.0)
    assert all(sample.is_weights is None for sample in samples)


@pytest.mark.parametrize("layout", ["turn", "episode"])
def test_what_is_told_of_the_mismatch(layout):
    samples, _ = weights_of(layout, "token", 2.0)
    told = mismatch_metrics(samples, "token", 2.0)
    ratios = torch.tensor([0.5, 3.0, 4.0, 0.25, 0.5], dtype=torch.float64)
    gaps = 0.125 * (ratios - 1).abs()
    assert told["training/rollout_probs_diff_mean"] == pytest.approx(float(gaps.mean()), rel=1e-5)
    assert told["training/rollout_probs_diff_max"] == pytest.approx(0.375, rel=1e-5)
    assert told["training/rollout_probs_diff_std"] == pytest.approx(float(gaps.std(unbiased=False)), rel=1e-5)
    assert told["training/rollout_kl_k1"] == pytest.approx(float(-ratios.log().mean()), rel=1e-5)
    assert told["training/rollout_kl_k3"] == pytest.approx(float((ratios - 1 - ratios.log()).mean()), rel=1e-5)
    assert told["training/rollout_is_truncated_share"] == pytest.approx(2 / 5)
    assert told["training/rollout_is_mean"] == pytest.approx((0.5 + 2 + 2 + 0.25 + 0.5) / 5)
    assert told["training/rollout_is_min"] == pytest.approx(0.25)
    by_turn = mismatch_metrics(samples, "turn", 1.25)
    assert by_turn["training/rollout_is_truncated_share"] == pytest.approx(2 / 5)
    assert by_turn["training/rollout_is_min"] == pytest.approx(0.5)
    # Where nothing is corrected, what correcting by token would do.
    assert mismatch_metrics(samples, "none", 2.0) == told


def test_the_estimates_meet_the_true_kl():
    """Of tokens in the proportions in which q draws them: k1 and k3 are unbiased."""
    p, counts = torch.tensor([0.2, 0.3, 0.5]), [4, 3, 1]
    q = torch.tensor(counts) / 8
    drawn = torch.tensor([token for token, count in enumerate(counts) for _ in range(count)])
    sample = Sample([1], drawn.tolist(), [0] * 8, rollout_log_probs=q[drawn].log(), old_log_probs=p[drawn].log())
    told = mismatch_metrics([sample], "none", 2.0)
    kl = float((q * (q / p).log()).sum())
    assert told["training/rollout_kl_k1"] == pytest.approx(kl, rel=1e-5)
    assert told["training/rollout_kl_k3"] == pytest.approx(kl, rel=1e-5)
    assert told["training/rollout_is_mean"] < 1


def test_a_biased_engine_gives_the_on_policy_gradient_when_corrected(policy):
    """The engine drew every token once: uniform, far from p. Weighted, that gives the gradient of E_p[A]."""
    model, prompt = policy.model, [5, 6, 7]
    size = model.config.vocab_size
    advantages = torch.randn(size, generator=torch.Generator().manual_seed(0))

    def gradient():
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    (-(probabilities * advantages).sum()).backward()
    wanted = gradient()
    found = {}
    for level in ("none", "token", "turn"):
        samples = [
            Sample(
                prompt,
                [token],
                [0],
                rollout_log_probs=torch.tensor([-math.log(size)]),
                advantages=advantages[token : token + 1],
            )
            for token in range(size)
        ]
        learner = learner_of(policy, "loss.entropy_coeff=0", "loss.penalty=none", "loss.clip_ratio_c=null")
        learner.score(samples)
        set_rollout_weights(samples, level, math.inf)
        learner._backward(samples, history_of(samples), 1.0, Stopwatch(torch.device("cpu")))
        found[level] = gradient()
    for level in ("token", "turn"):
        assert (found[level] - wanted).norm() <= 1e-4 * wanted.norm()
    assert (found["none"] - wanted).norm() > 0.1 * wanted.norm()


def test_two_tokens_a_turn_need_the_weight_of_the_turn():
    """All nine turns of two tokens out of three, drawn uniformly; the turn earns what both tokens say."""
    random = torch.Generator().manual_seed(1)
    first = torch.randn(3, generator=random, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, generator=random, dtype=torch.float64, requires_grad=True)
    earned = torch.randn(3, 3, generator=random, dtype=torch.float64)
    chosen = torch.cartesian_prod(torch.arange(3), torch.arange(3))

    (-(first.softmax(-1)[:, None] * second.softmax(-1) * earned).sum()).backward()
    wanted = torch.cat([first.grad, second.grad.flatten()])

    def corrected(level):
        logits = torch.stack([first.expand(9, 3), second[chosen[:, 0]]], dim=1)
        scored = logits.log_softmax(-1).gather(2, chosen[:, :, None])[:, :, 0].detach()
        samples = [
            Sample(
                [0],
                tokens.tolist(),
                [0, 0],
                rollout_log_probs=torch.full((2,), -math.log(3)),
                old_log_probs=own.float(),
                advantages=earned[tuple(tokens)].float().expand(2),
            )
            for tokens, own in zip(chosen, scored, strict=True)
        ]
        set_rollout_weights(samples, level, math.inf)
        batch = MiniBatch.of(samples, 0, torch.device("cpu"))
        config = ek.EPOConfig(clip_ratio_c=None, entropy_coeff=0.0, loss_agg_mode="seq-mean-token-sum")
        first.grad = second.grad = None
        ek.epo_loss(
            logits,
            batch.tokens,
            batch.old_log_probs,
            batch.advantages,
            batch.mask,
            config,
            is_weights=batch.is_weights,
            backend="reference",
        ).loss.backward()
        return torch.cat([first.grad, second.grad.flatten()])

    assert (corrected("turn") - wanted).norm() <= 1e-5 * wanted.norm()
    assert (corrected("token") - wanted).norm() > 0.05 * wanted.norm()


def test_padding_carries_no_weight():
    samples = [sample_of([3.0], [0]), sample_of(RATIOS, TURNS)]
    set_rollout_weights(samples, "token", 2.0)
    batch = MiniBatch.of(samples, 0, torch.device("cpu"))
    assert batch.is_weights[0].tolist() == [2.0, 0, 0, 0, 0, 0]
    assert torch.where(batch.mask, 0.0, batch.is_weights).count_nonzero() == 0
    samples[0].is_weights = None
    with pytest.raises(ValueError, match="must be set in all samples or in none, got 1 of 2"):
        MiniBatch.of(samples, 0, torch.device("cpu"))


def test_a_ratio_that_is_no_number_is_not_hidden():
    sample = sample_of([1.0, math.nan], [0, 0])
    set_rollout_weights([sample], "token", 2.0)
    assert math.isnan(sample.is_weights[1])  # the loss is NaN with it, and that update is left out and counted
    with pytest.raises(ValueError, match="rollout_log_probs"):
        set_rollout_weights([Sample.of_turn([1], [2], 0)], "token", 2.0)


def test_which_engine_is_corrected():
    config = load_config("practice", [])
    assert rollout_is_level(config) == "none"
    config.rollout.engine = "another"
    assert rollout_is_level(config) == "token"
    assert rollout_is_level(load_config("practice", ["loss.rollout_is=turn"])) == "turn"
