"""The settings passed to an engine: response format, adapters, lengths; and the ones it rejects."""

import pytest
import torch

from epo_kernels.train.config import ConfigError
from epo_kernels.train.models.lora import add_adapters, merged_weights
from epo_kernels.train.rollout import vllm_engine
from epo_kernels.train.rollout.engine import StopRule
from tests.integrations.vllm.conftest import (
    config_of,
    engine_of,
    learner_log_probs,
    policy_of,
    requests_of,
    told,
    write,
)


def test_responses_end_with_the_closing_tag():
    policy = policy_of(config_of())
    config = config_of(
        "model.name_or_path=any",
        "model.warm_start.demonstrations=0",
        "rollout.response_format=think_action",
        "rollout.max_response_tokens=96",
    )
    text = "<think>left > right\n</think><action>go left</action>"
    requests = requests_of(policy, 4, greedy=(0,))
    learn_by_heart(policy, requests[0].prompt_ids, policy.tokenizer(f"{text} and more")["input_ids"])
    engine = engine_of(policy, config)
    try:
        completions = write(engine, requests)
    finally:
        engine.close()
    rule = StopRule(policy.tokenizer, policy.end_ids, "think_action")
    assert policy.tokenizer.decode(completions[0].token_ids).startswith(text)
    assert rule.ends(completions[0].token_ids)
    for completion in completions:
        assert rule.length(completion.token_ids) == len(completion.token_ids) == len(completion.log_probs)
        assert rule.ends(completion.token_ids) or len(completion.token_ids) == 96
    scores = learner_log_probs(policy, config, requests, completions)
    torch.testing.assert_close(told(completions), scores, rtol=0, atol=1e-5)


def learn_by_heart(policy, prompt, response):
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-3)
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    for _ in range(100):
        optimizer.zero_grad()
        loss = policy.model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_adapters_are_merged():
    config = config_of("model.lora_rank=4", "rollout.max_response_tokens=8")
    policy = policy_of(config)
    add_adapters(policy.model, config.model)
    adapters = [parameter for name, parameter in policy.model.named_parameters() if "lora_B" in name]
    for adapter in adapters:
        torch.nn.init.normal_(adapter, std=0.1)
    requests = requests_of(policy)
    engine = engine_of(policy, config)
    try:
        completions = write(engine, requests)
    finally:
        engine.close()
    scores = learner_log_probs(policy, config, requests, completions)
    torch.testing.assert_close(told(completions), scores, rtol=0, atol=1e-5)
    for adapter in adapters:
        torch.nn.init.zeros_(adapter)
    assert (learner_log_probs(policy, config, requests, completions) - scores).abs().max() > 0.01


def test_a_model_that_cannot_be_served():
    config = config_of()
    policy = policy_of(config)
    policy.model.config.max_position_embeddings = 64
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm: .*use rollout\.engine=transformers"):
        engine_of(policy, config)


@pytest.mark.parametrize("change", ["left out", "renamed"])
def test_a_weight_that_vllm_does_not_take(monkeypatch, change):
    """Like an architecture whose weights have other names in training: it would sample from missing weights."""
    config = config_of()
    policy = policy_of(config)
    odd = "model.layers.1.mlp.down_proj.weight"

    def others(model):
        for name, weight in merged_weights(model):
            if name != odd:
                yield name, weight
            elif change == "renamed":
                yield f"{name}.anew", weight

    monkeypatch.setattr(vllm_engine, "merged_weights", others)
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm: .*layers\.1\.mlp\.down_proj\.weight"):
        engine_of(policy, config)
    monkeypatch.undo()
    engine = engine_of(policy, config)  # the rejected one left nothing behind
    try:
        assert len(write(engine, requests_of(policy))) == 16
    finally:
        engine.close()
