"""A small policy on the practice environment, built once: barely trained, but with the shapes of real runs."""

import copy
import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import TrainConfig, load_config
from epo_kernels.train.envs import Suite, make_suite
from epo_kernels.train.models.policy import Policy, build_from_scratch
from epo_kernels.train.rl.warm_start import clone, cloning_samples, demonstrate
from epo_kernels.train.rollout.engine import StopRule, TransformersEngine
from epo_kernels.train.rollout.prompts import PromptBuilder

SMALL = [
    "steps=2",
    "env.options.length=4",
    "env.options.spare_turns=2",
    "env.options.signs=3",
    "model.warm_start.demonstrations=4",
    "model.warm_start.epochs=30",
    "model.warm_start.batch_size=8",
    "rollout.environments=4",
    "algorithm.groups=2",
    "algorithm.group_size=4",
    "evaluate.episodes=4",
    "checkpoint.every=1",
]


WHOLE = ["steps=4", "checkpoint.keep=9", "evaluate.every=2", "loss.kl_coeff=0.01"]  # of the run `whole_run`
TIMING = ("timing_s/", "perf/throughput", "perf/loss_share")


def command(*arguments):
    return ["practice", *SMALL, "optim.lr=3e-4", *map(str, arguments)]


def train(*arguments):
    return main(command(*arguments))


def lines_of(run_dir):
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMING)} for line in lines]


def weights_of(run_dir, step):
    from safetensors.torch import load_file

    return load_file(Path(run_dir) / "checkpoints" / f"global_step_{step}" / "actor" / "model.safetensors")


@contextmanager
def files_at_most(size):
    """Inside the context, a file that grows beyond `size` bytes fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Four uninterrupted steps with the settings WHOLE."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(f"run_dir={run_dir}", *WHOLE) == 0
    return run_dir


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return load_config("practice", [*SMALL, f"run_dir={tmp_path_factory.mktemp('run')}"])


@pytest.fixture(scope="session")
def suite(config: TrainConfig) -> Suite:
    return make_suite(config.env)


@pytest.fixture
def policy(cloned: Policy) -> Policy:
    """A separate policy that the test may train."""
    return Policy(copy.deepcopy(cloned.model), cloned.tokenizer)


@pytest.fixture(scope="session")
def cloned(config: TrainConfig, suite: Suite) -> Policy:
    demonstrations = demonstrate(suite, 4)
    policy = build_from_scratch(demonstrations, config.model, seed=0)
    longer = replace(config.model.warm_start, epochs=40, batch_size=8)
    clone(policy, cloning_samples(demonstrations, policy, prompts_of(policy), 6), longer, 0, int)
    return policy


def prompts_of(policy: Policy, history: int = 2, max_tokens: int = 128) -> PromptBuilder:
    return PromptBuilder(policy.chat, history, 1, max_tokens, "plain")


def engine_of(policy: Policy, temperature: float = 1.0, max_tokens: int = 6) -> TransformersEngine:
    stop = StopRule(policy.tokenizer, policy.end_ids, "plain")
    return TransformersEngine(policy.model, policy.pad_id, stop, temperature, max_tokens)
