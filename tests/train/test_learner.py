import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch

import epo_kernels as ek
from epo_kernels.config import LossAggMode, PolicyLossName
from epo_kernels.train import data
from epo_kernels.train.config import load_config
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.io.stopwatch import Stopwatch
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rl.metrics import sampled_entropy
from epo_kernels.train.rl.optimizer import StepOptimizer, cosine_with_warmup
from tests.train.conftest import SMALL
from tests.train.test_rollout import episodes_of, rollout_of


@pytest.fixture(scope="module")
def played(cloned, suite):
    episodes = episodes_of(suite.tasks("train")[:6])
    with EnvironmentPool(suite, 6) as pool:
        rollout_of(pool, cloned, max_turns=suite.max_turns).play(episodes)
    return episodes


def samples_of(episodes, layout="turn"):
    samples = data.samples_of(episodes, layout)
    for sample in samples:
        sample.advantages = torch.full((len(sample.turns),), sample.episode % 3 - 0.75)  # of both signs, no sum of 0
    return samples


def learner_of(policy, *settings):
    config = load_config("practice", [*SMALL, "optim.lr=1e-3", *settings])
    return Learner(policy, None, config)


def test_the_ids_sampled_are_the_ids_trained_on(cloned, played):
    samples = samples_of(played)
    learner_of(cloned).score(samples)
    sampled = [turn.log_probs for episode in played for turn in episode.turns]
    for sample, log_probs in zip(samples, sampled, strict=True):
        assert sample.old_log_probs.tolist() == pytest.approx(log_probs, abs=1e-5)


def test_scoring_and_updates_report_how_far_they_are(policy, played):
    samples = samples_of(played)
    learner = learner_of(policy, "optim.epochs=2", "optim.minibatches=2", "optim.micro_batch_tokens=300")
    scored, learned = [], []
    learner.score(samples, scored.append)
    learner.update(samples, history_of(samples), 1.0, (0,), learned.append)
    for reported, total in ((scored, len(samples)), (learned, 2 * len(samples))):
        assert len(reported) >= 4
        assert reported == sorted(set(reported))
        assert reported[-1] == total
    with_reference = Learner(policy, copy.deepcopy(policy.model), load_config("practice", [*SMALL, "loss.kl_coeff=1"]))
    scored.clear()
    with_reference.score(samples, scored.append)
    assert scored == [len(samples) / 2, len(samples)]


@pytest.mark.parametrize(
    "settings",
    [
        *([f"loss.loss_agg_mode={mode}"] for mode in get_args(LossAggMode)),
        *([f"loss.policy_loss={name}"] for name in get_args(PolicyLossName)),
        ["loss.policy_loss=sapo", "loss.ratio_scope=segment", "loss.ratio_gradient=sequence"],
    ],
    ids=",".join,
)
def test_micro_batches_add_up_to_the_whole(policy, played, settings):
    weights = []
    for tokens in (100_000, 300):
        samples, trained = samples_of(played), copy.deepcopy(policy)
        learner = learner_of(trained, *settings, f"optim.micro_batch_tokens={tokens}", "loss.penalty=hinge")
        learner.score(samples)
        metrics = learner._backward(samples, history_of(samples), 1.5, Stopwatch(torch.device("cpu")))
        gradient = torch.cat([p.grad.flatten() for p in trained.model.parameters()])
        weights.append((gradient, metrics.to_floats()))
    (whole, one), (parts, many) = weights
    assert (whole - parts).norm() <= 1e-5 * whole.norm()
    for name in ("loss", "pg_loss", "tokens", "entropy"):
        assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6)


def test_importance_weights_reach_the_loss(policy, played):
    losses = {}
    for weight in (None, 0.0, 2.0):
        samples = samples_of(played)
        learner = learner_of(policy, "loss.entropy_coeff=0", "loss.penalty=none")
        learner.score(samples)
        for sample in samples:
            sample.is_weights = None if weight is None else torch.full((len(sample.turns),), weight)
        watch = Stopwatch(torch.device("cpu"))
        losses[weight] = float(learner._backward(samples, history_of(samples), 1.0, watch).loss)
        assert 0 < watch.read()["loss"] < 60
    assert losses[0.0] == 0
    assert losses[2.0] == pytest.approx(2 * losses[None])
    assert losses[None] != 0


def test_dr_grpo_divides_by_a_constant_length(policy, played):
    """Ratio 1 and advantage 1: each token's loss is -1; over samples times max_response_tokens, whatever they took."""
    samples = samples_of(played)
    for sample in samples:
        sample.advantages.fill_(1.0)
    settings = ("loss.loss_agg_mode=seq-mean-token-sum-norm", "loss.entropy_coeff=0", "loss.penalty=none")
    for micro in (100_000, 300):
        learner = learner_of(policy, *settings, f"optim.micro_batch_tokens={micro}")
        learner.score(samples)
        loss = learner._backward(samples, history_of(samples), 1.0, Stopwatch(torch.device("cpu"))).loss
        tokens = sum(sample.num_sampled for sample in samples)
        assert float(loss) == pytest.approx(-tokens / (len(samples) * 6), rel=1e-5)


def history_of(samples):
    history = ek.EntropyHistory(16)
    turns, entropy = sampled_entropy(samples)
    history.update(turns, entropy, torch.ones_like(turns))
    history.commit()
    return history


def test_an_update_makes_good_actions_likelier(policy, played):
    samples = samples_of(played)
    learner = learner_of(policy, "optim.epochs=2", "optim.minibatches=3", "steps=1")
    learner.score(samples)
    before = [s.old_log_probs for s in samples]
    metrics = learner.update(samples, history_of(samples), 1.0, seed=(0,))
    learner.score(samples)
    moved = sum(float((s.advantages * (s.old_log_probs - old)).sum()) for s, old in zip(samples, before, strict=True))
    assert moved > 0
    assert metrics["actor/grad_norm"] > 0
    assert 0 <= metrics["actor/pg_clipfrac"] <= 1
    assert metrics["actor/skipped_updates"] == 0


def test_a_gradient_that_is_not_finite_is_left_out(policy, played):
    samples = samples_of(played)[:4]
    learner = learner_of(policy, "optim.minibatches=1")
    learner.score(samples)
    history = history_of(samples)
    samples[0].advantages[0] = float("inf")
    before = copy.deepcopy(policy.model.state_dict())
    metrics = learner.update(samples, history, 1.0, seed=(0,))
    assert metrics["actor/skipped_updates"] == 1
    assert "actor/grad_norm" not in metrics
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())


def test_the_reference_model_pulls_back(policy, played):
    samples = samples_of(played)
    only_kl = ["optim.lr=1e-4", "loss.kl_coeff=1.0", "loss.entropy_coeff=0", "loss.penalty=none"]
    config = load_config("practice", [*SMALL, *only_kl])
    reference = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    learner = Learner(policy, reference, config)
    for sample in samples:
        sample.advantages.zero_()
    learner.score(samples)
    history = history_of(samples)
    first = learner.update(samples, history, 1.0, seed=(0,))["actor/kl_loss"]
    for _ in range(4):
        learner.score(samples)
        last = learner.update(samples, history, 1.0, seed=(0,))["actor/kl_loss"]
    assert 0 < last < first


def test_padding_of_a_minibatch():
    samples = [Sample.of_turn([1, 2, 3], [4], 0), Sample.of_turn([5], [6, 7], 2, advantage=0.5)]
    batch = MiniBatch.of(samples, pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.places.tolist() == [[2, 0], [3, 4]]
    assert batch.num_padding == 1
    assert batch.tokens.tolist() == [[4, 0], [6, 7]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.turns.tolist() == [[0, data.ENVIRONMENT], [2, 2]]
    assert batch.num_sampled == 3
    assert batch.advantages.tolist() == [[0.0, 0.0], [0.5, 0.5]]
    assert batch.old_log_probs is None


def test_micro_batches_hold_all_and_keep_to_the_limit():
    samples = [Sample.of_turn([0] * length, [0] * (1 + length % 3), 0) for length in (5, 40, 7, 7, 90, 3, 33)]
    batches = list(micro_batches(samples, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(samples[i].length - 1 for i in batch) <= 60


def test_the_size_or_the_number_of_minibatches():
    def sizes(**settings):
        config = load_config("practice", [f"optim.{name}={value}" for name, value in settings.items()]).optim
        optimizer = StepOptimizer(torch.nn.Linear(1, 1), config, config, steps=4, ranks=Ranks())
        samples = [Sample.of_turn([0], [0], number) for number in range(10)]
        found = list(optimizer.minibatches(samples, seed=(0,)))
        assert sorted(s.turns[0] for batch in found for s in batch) == sorted([*range(10)] * config.epochs)
        return [len(batch) for batch in found]

    assert sizes(minibatches=3) == [4, 3, 3]
    assert sizes(minibatches=99) == [1] * 10
    assert sizes(minibatch_size=4) == [4, 3, 3]  # as even as they can be, none larger
    assert sizes(minibatch_size=64, epochs=2) == [10, 10]


def test_the_schedule_spans_the_run_whatever_the_number_of_updates():
    config = load_config("practice", ["optim.lr=1.0", "optim.minibatches=2"]).optim
    optimizer = StepOptimizer(torch.nn.Linear(1, 1), config, config, steps=10, ranks=Ranks())
    rates = []
    for _ in range(10):
        for _ in optimizer.minibatches([Sample.of_turn([0], [0], 0)] * 8, seed=(0,)):
            rates.append(optimizer.metrics("actor")["actor/lr"])
    assert rates == list(map(cosine_with_warmup(20, config.warmup_ratio, config.min_lr_ratio), range(20)))
    assert optimizer.state_dict()["steps_done"] == 10


def test_the_optimizer_s_state_comes_back_to_the_last_bit(tmp_path):
    config = load_config("practice", ["optim.lr=0.1", "optim.minibatches=1"]).optim
    samples = [Sample.of_turn([0], [0], 0)]
    models = [torch.nn.Linear(3, 2) for _ in range(3)]

    def step(optimizer, model):
        for _ in optimizer.minibatches(samples, seed=(0,)):
            loss = model(torch.tensor([1.0, -2.0, 3.0])).square().sum()
            loss.backward()
            optimizer.apply(loss)

    first = StepOptimizer(models[0], config, config, steps=4, ranks=Ranks())
    assert first.state_dict()["adamw"] == {}, "looking at the state must not begin it"
    step(first, models[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    others = []
    for model, own in zip(models[1:], (config, replace(config, weight_decay=0.5)), strict=True):
        model.load_state_dict(models[0].state_dict())
        others.append(StepOptimizer(model, own, own, steps=4, ranks=Ranks()))
        others[-1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    for optimizer, model in zip((first, *others), models, strict=True):
        step(optimizer, model)
        assert optimizer.state_dict()["steps_done"] == 2
    assert torch.equal(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, models[2].weight), "settings are the configuration's, not the state's"


def test_learning_rate_schedule():
    factors = list(map(cosine_with_warmup(11, warmup_ratio=0.2, min_ratio=0.1), range(13)))
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[6] == pytest.approx(0.55)  # half way down
    assert factors[10:] == pytest.approx([0.1] * 3)  # and no rise after the schedule's end
    assert cosine_with_warmup(1, 0.0, 0.2)(0) == 1.0
    assert list(map(cosine_with_warmup(4, 1.0, 0.0), range(6))) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_controller_moves_the_coefficient_of_the_next_update(policy, played):
    """Target far above: each of two updates adds a step. The first update is without a bonus, the second with one."""
    common = ["loss.entropy_coeff=0", "loss.penalty=none", "optim.minibatches=1", "optim.epochs=1", "optim.lr=1e-9"]

    def own_policy():
        return Policy(copy.deepcopy(policy.model), policy.tokenizer)

    def loss_of(*more):
        samples, learner = samples_of(played), learner_of(own_policy(), *common, *more)
        learner.score(samples)
        history = history_of(samples)
        told = [learner.update(samples, history, 1.0, (0,)) for _ in range(2)]
        return learner, told

    learner, moved = loss_of("loss.entropy_target=10", "loss.entropy_coeff_delta=0.5")
    _, still = loss_of()
    assert [told["actor/entropy_coeff"] for told in moved] == [0.5, 1.0]
    assert "actor/entropy_coeff" not in still[0]
    assert moved[0]["actor/loss"] == pytest.approx(still[0]["actor/loss"])
    entropy = learner._controller.state_dict()["entropy"]
    assert moved[1]["actor/loss"] == pytest.approx(still[1]["actor/loss"] - 0.5 * entropy, rel=1e-4)


def test_the_controllers_state_is_the_learners(policy, played):
    samples = samples_of(played)
    first = learner_of(policy, "loss.entropy_target=10")
    first.score(samples)
    first.update(samples, history_of(samples), 1.0, (0,))
    state = first.state_dict()
    second = learner_of(policy, "loss.entropy_target=10")
    second.load_state_dict(state)
    assert second._controller.state_dict() == first._controller.state_dict()
    branch = learner_of(policy, "loss.entropy_target=10", "loss.entropy_rule=boxed")
    begins = branch._controller.state_dict()
    branch.load_state_dict(state)
    assert branch._controller.state_dict() == begins
    plain = learner_of(policy)
    plain.load_state_dict(state)
    assert plain.state_dict()["entropy_controller"] is None
    del state["entropy_controller"]  # a checkpoint of an earlier version
    branch.load_state_dict(state)
