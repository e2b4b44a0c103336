"""The quick start's demonstrations and tokenizer, shipped with the package."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from epo_kernels.train.config import ConfigError, load_config
from epo_kernels.train.envs.demonstrations import FROZEN, freeze, frozen_folder, read_frozen
from epo_kernels.train.models.policy import build_from_scratch
from epo_kernels.train.rl.warm_start import clone, cloning_samples
from epo_kernels.train.rollout.dialogue import make_prompts


@pytest.fixture(scope="module")
def config():
    return load_config("quickstart", [])


@pytest.fixture(scope="module")
def demonstrations(config):
    return read_frozen(frozen_folder("quickstart"), config.model.warm_start.demonstrations)


@pytest.fixture(scope="module")
def policy(config, demonstrations):
    return build_from_scratch(demonstrations, config.model, seed=0)


def animals(demonstration):
    return re.match(r"outside: (.+)\. Doors: ", demonstration.observations[-1].scene)[1].split(", ")


def test_every_animal_in_sight_is_chosen_once(demonstrations):
    by_task = {}
    for demonstration in demonstrations:
        by_task.setdefault(demonstration.task, []).append(demonstration)
    assert len(by_task) == 62
    for shown in by_task.values():
        assert [d.actions[-1] for d in shown] == [f"focus on {animal}" for animal in animals(shown[0])]
        assert sum(d.score == 100 for d in shown) == 1


def test_no_more_demonstrations_than_are_used(demonstrations):
    with pytest.raises(ValueError, match=rf"{FROZEN}.*got {len(demonstrations)}"):
        read_frozen(frozen_folder("quickstart"), len(demonstrations) + 1)


def test_tokenizer_covers_prompts_and_actions(config, demonstrations, policy):
    prompts = make_prompts(policy.chat, config.rollout)
    samples = cloning_samples(demonstrations, policy, prompts, config.rollout.max_response_tokens)
    actions = [action for demonstration in demonstrations for action in demonstration.actions]
    assert policy.read([sample.response_ids for sample in samples]) == actions
    assert all(sample.response_ids[-1] == policy.end_id for sample in samples)  # none is cut
    goal = demonstrations[0].observations[0].goal
    assert all(goal in policy.tokenizer.decode(sample.prompt_ids) for sample in samples)


def test_same_seed_clones_the_same_policy(config, demonstrations, policy):
    shown = demonstrations[:4]
    settings = replace(config.model.warm_start, epochs=1, batch_size=8)
    weights = []
    for _ in range(2):
        fresh = copy.deepcopy(build_from_scratch(shown, config.model, seed=0))
        samples = cloning_samples(shown, fresh, make_prompts(fresh.chat, config.rollout), 8)
        clone(fresh, samples, settings, 0, lambda done: None)
        weights.append(fresh.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["model.norm.weight"], policy.model.state_dict()["model.norm.weight"])


def test_initial_weights_have_the_spread_asked_for(config, policy):
    spread = policy.model.get_input_embeddings().weight.std().item()
    assert spread == pytest.approx(config.model.initializer_range, rel=0.05)


def test_frozen_demonstrations_survive_the_file(tmp_path, demonstrations):
    freeze(tmp_path / "new", demonstrations[:3])
    assert read_frozen(tmp_path / "new", 3) == demonstrations[:3]


def test_a_folder_without_them_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match=FROZEN):
        read_frozen(tmp_path, 1)
    (tmp_path / FROZEN).write_text('{"task": 1}\n')
    with pytest.raises(ValueError, match=f"{FROZEN}, line 1"):
        read_frozen(tmp_path, 1)
    model = replace(config.model, warm_start=replace(config.model.warm_start, frozen=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model\.warm_start\.frozen.*tokenizer\.json"):
        build_from_scratch([], model, seed=0)
