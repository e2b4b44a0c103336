"""A small policy, and engines for it: the real vLLM, on the CPU."""

import pytest
import torch

from epo_kernels.train.config import load_config
from epo_kernels.train.data import Sample
from epo_kernels.train.envs import make_suite
from epo_kernels.train.models.policy import build_from_scratch
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rl.warm_start import demonstrate
from epo_kernels.train.rollout.engine import Request, StopRule
from epo_kernels.train.rollout.vllm_engine import VllmEngine
from tests.train.conftest import SMALL


def config_of(*settings):
    return load_config("practice", [*SMALL, "rollout.engine=vllm", "rollout.vllm.cpu_cache_gb=0.1", *settings])


def policy_of(config):
    """An untrained policy with its tokenizer."""
    return build_from_scratch(demonstrate(make_suite(config.env), 4), config.model, seed=0)


def engine_of(policy, config):
    return VllmEngine(policy, StopRule(policy.tokenizer, policy.end_ids, config.rollout.response_format), config)


def write(engine, requests):
    """The completions of requests, in order."""
    with engine.awake():
        engine.submit(dict(enumerate(requests)))
        return finish(engine, len(requests))


def finish(engine, count, found=()):
    """The completions of `count` requests in the order of their numbers; some may be `found` already."""
    found = dict(found)
    for _ in range(10_000):
        if len(found) == count:
            return [found[number] for number in sorted(found)]
        found |= dict(engine.advance())
    raise TimeoutError(f"{count - len(found)} of {count} requests never finished")


def requests_of(policy, count=16, seed=3, greedy=()):
    """Requests of unequal lengths; each four share a prompt."""
    texts = [f"Follow the signs. Sign: {'moon ' * (i // 4 + 1)}" for i in range(count)]
    prompts = policy.tokenizer(texts)["input_ids"]
    return [Request(ids, (seed, 1, i), greedy=i in greedy) for i, ids in enumerate(prompts)]


def learner_log_probs(policy, config, requests, completions):
    samples = [
        Sample.of_turn(request.prompt_ids, completion.token_ids, 0)
        for request, completion in zip(requests, completions, strict=True)
    ]
    Learner(policy, None, config).score(samples)
    return torch.cat([sample.old_log_probs for sample in samples])


def told(completions):
    return torch.tensor([value for completion in completions for value in completion.log_probs])


@pytest.fixture(scope="module")
def config():
    # With a temperature, so that undivided logits show; and long enough for some responses to end by themselves.
    return config_of("rollout.temperature=0.7", "rollout.max_response_tokens=48", "rollout.environments=16")


@pytest.fixture(scope="module")
def policy(config):
    return policy_of(config)


@pytest.fixture(scope="module")
def engine(policy, config):
    engine = engine_of(policy, config)
    yield engine
    engine.close()
