import copy

import pytest
import torch

import epo_kernels as ek
from epo_kernels.train.config import load_config
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.learner import Learner, cosine_with_warmup
from tests.train.conftest import SMALL
from tests.train.test_rollout import episodes_of, rollout_of


@pytest.fixture(scope="module")
def played(cloned, suite):
    episodes = episodes_of(suite.tasks("train")[:6])
    with EnvironmentPool(suite, 6) as pool:
        rollout_of(pool, cloned, max_turns=suite.max_turns).play(episodes)
    return episodes


def samples_of(episodes):
    return [
        Sample(turn.prompt_ids, turn.response_ids, number, advantage=float(index % 3 - 1))
        for index, episode in enumerate(episodes)
        for number, turn in enumerate(episode.turns)
    ]


def learner_of(policy, *settings):
    config = load_config("practice", [*SMALL, "optim.lr=1e-3", *settings])
    return Learner(policy, None, config)


def test_the_ids_sampled_are_the_ids_trained_on(cloned, played):
    samples = samples_of(played)
    learner_of(cloned).score(samples)
    sampled = [turn.log_probs for episode in played for turn in episode.turns]
    for sample, log_probs in zip(samples, sampled, strict=True):
        assert sample.old_log_probs.tolist() == pytest.approx(log_probs, abs=1e-5)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_micro_batches_add_up_to_the_whole(policy, played, mode):
    weights = []
    for tokens in (100_000, 300):
        samples, trained = samples_of(played), copy.deepcopy(policy)
        learner = learner_of(
            trained, f"loss.loss_agg_mode={mode}", f"optim.micro_batch_tokens={tokens}", "loss.penalty=hinge"
        )
        entropies = learner.score(samples)
        history = history_of(samples, entropies)
        metrics = learner._backward(samples, history, 1.5)
        gradient = torch.cat([p.grad.flatten() for p in trained.model.parameters()])
        weights.append((gradient, metrics.to_floats()))
    (whole, one), (parts, many) = weights
    assert (whole - parts).norm() <= 1e-5 * whole.norm()
    for name in ("loss", "pg_loss", "tokens", "entropy"):
        assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6)


def history_of(samples, entropies):
    history = ek.EntropyHistory(16)
    turns = torch.cat([torch.full((len(s.response_ids),), s.turn) for s in samples])
    history.update(turns, torch.cat(entropies), torch.ones_like(turns))
    history.commit()
    return history


def test_an_update_makes_good_actions_likelier(policy, played):
    samples = samples_of(played)
    learner = learner_of(policy, "optim.epochs=2", "optim.minibatches=3", "steps=1")
    before = [s.old_log_probs for s in (learner.score(samples), samples)[1]]
    metrics = learner.update(samples, history_of(samples, learner.score(samples)), 1.0, seed=(0,))
    learner.score(samples)
    moved = sum(s.advantage * float((s.old_log_probs - old).sum()) for s, old in zip(samples, before, strict=True))
    assert moved > 0
    assert metrics["actor/grad_norm"] > 0
    assert 0 <= metrics["actor/pg_clipfrac"] <= 1
    assert metrics["actor/skipped_updates"] == 0


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the only update of this test is skipped
def test_a_gradient_that_is_not_finite_is_left_out(policy, played):
    samples = samples_of(played)[:4]
    learner = learner_of(policy, "optim.minibatches=1")
    history = history_of(samples, learner.score(samples))
    samples[0].advantage = float("inf")
    before = copy.deepcopy(policy.model.state_dict())
    metrics = learner.update(samples, history, 1.0, seed=(0,))
    assert metrics["actor/skipped_updates"] == 1
    assert "actor/grad_norm" not in metrics
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_the_reference_model_pulls_back(policy, played):
    samples = samples_of(played)
    config = load_config("practice", [*SMALL, "loss.kl_coeff=1.0", "loss.entropy_coeff=0", "loss.penalty=none"])
    reference = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    learner = Learner(policy, reference, config)
    for sample in samples:
        sample.advantage = 0.0
    history = history_of(samples, learner.score(samples))
    first = learner.update(samples, history, 1.0, seed=(0,))["actor/kl_loss"]
    for _ in range(4):
        learner.score(samples)
        last = learner.update(samples, history, 1.0, seed=(0,))["actor/kl_loss"]
    assert 0 < last < first


def test_padding_of_a_minibatch():
    samples = [Sample([1, 2, 3], [4], 0), Sample([5], [6, 7], 2)]
    batch = MiniBatch.of(samples, pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch.tokens.tolist() == [[4, 0], [6, 7]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.old_log_probs is None


def test_micro_batches_hold_all_and_keep_to_the_limit():
    samples = [Sample([0] * length, [0] * (1 + length % 3), 0) for length in (5, 40, 7, 7, 90, 3, 33)]
    batches = list(micro_batches(samples, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        widths = max(len(samples[i].prompt_ids) for i in batch) + max(len(samples[i].response_ids) for i in batch)
        assert len(batch) == 1 or len(batch) * widths <= 60


def test_learning_rate_schedule():
    factors = [cosine_with_warmup(n, 11, warmup_ratio=0.2, min_ratio=0.1) for n in range(11)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[6] == pytest.approx(0.55)  # half way down
    assert factors[-1] == pytest.approx(0.1)
    assert cosine_with_warmup(0, 1, 0.0, 0.2) == 1.0
