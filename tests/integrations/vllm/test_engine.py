"""The real vLLM against the learner: equal log-probs, draws determined by seeds, correctly ended responses."""

import copy

import pytest
import torch

from epo_kernels.train.rollout.engine import Request, StopRule
from tests.integrations.vllm.conftest import finish, learner_log_probs, requests_of, told, write
from tests.train.test_rollout import play_beside_a_slow_one


def test_log_probs_are_the_learners_before_and_after_an_update(engine, policy, config):
    requests = requests_of(policy, greedy=(0, 5))
    first = write(engine, requests)
    before = learner_log_probs(policy, config, requests, first)
    torch.testing.assert_close(told(first), before, rtol=0, atol=1e-5)

    kept = copy.deepcopy(policy.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    second = write(engine, requests)  # equal prompts, whose cache entries are stale
    after = learner_log_probs(policy, config, requests, second)
    torch.testing.assert_close(told(second), after, rtol=0, atol=1e-5)
    # Old weights would have shown.
    forgotten = learner_log_probs(policy, config, requests, first)
    assert (forgotten - before).abs().max() > 0.1
    policy.model.load_state_dict(kept)
    torch.testing.assert_close(told(write(engine, requests)), before, rtol=0, atol=1e-5)


def test_greedy_takes_the_likeliest(engine, policy):
    requests = requests_of(policy, count=2, greedy=(0, 1))
    for request, completion in zip(requests, write(engine, requests), strict=True):
        ids = torch.tensor([request.prompt_ids + completion.token_ids])
        with torch.no_grad():
            likeliest = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == completion.token_ids


def test_seeds_decide_whatever_the_company(engine, policy):
    requests = requests_of(policy)
    together = [completion.token_ids for completion in write(engine, requests)]
    assert [completion.token_ids for completion in write(engine, requests)] == together
    assert [completion.token_ids for completion in write(engine, requests[5:6])] == together[5:6]
    assert len({tuple(ids) for ids in together[:4]}) == 4  # of one prompt
    others = [completion.token_ids for completion in write(engine, requests_of(policy, seed=4))]
    assert all(one != other for one, other in zip(together, others, strict=True))


def test_draws_follow_the_distribution(engine, policy, config):
    (prompt,) = policy.tokenizer(["Follow the signs."])["input_ids"]
    firsts = [
        completion.token_ids[0]
        for batch in range(25)
        for completion in write(engine, [Request(prompt, (9, batch, i)) for i in range(16)])
    ]
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[0, -1] / config.rollout.temperature
    wanted = logits.softmax(-1)
    order = wanted.argsort(descending=True)
    upper = set(order[: int((wanted[order].cumsum(0) < 0.5).sum())].tolist())  # half of the mass
    share = sum(token in upper for token in firsts) / len(firsts)
    assert share == pytest.approx(float(wanted[list(upper)].sum()), abs=0.1)  # four standard errors


def test_plain_responses_end_at_a_line_break_or_an_end_token(engine, policy, config):
    rule = StopRule(policy.tokenizer, policy.end_ids, "plain")
    requests = requests_of(policy, count=64)
    completions = [c for start in range(0, 64, 16) for c in write(engine, requests[start : start + 16])]
    ended = [completion.token_ids for completion in completions if rule.ends(completion.token_ids)]
    assert ended
    assert all(rule.length(completion.token_ids) == len(completion.token_ids) for completion in completions)
    assert all(len(c.token_ids) == config.rollout.max_response_tokens for c in completions if c.token_ids not in ended)
    assert [c.finish for c in completions] == ["stop" if rule.ends(c.token_ids) else "length" for c in completions]
    assert all(len(completion.log_probs) == len(completion.token_ids) for completion in completions)


def test_what_is_unfinished_is_dropped(engine, policy):
    requests = requests_of(policy)
    wanted = [completion.token_ids for completion in write(engine, requests)]
    with engine.awake():
        engine.submit(dict(enumerate(requests)))
        engine.advance()
    assert [completion.token_ids for completion in write(engine, requests)] == wanted


def test_more_requests_join_while_others_are_written(engine, policy):
    requests = requests_of(policy)
    wanted = [completion.token_ids for completion in write(engine, requests)]
    with engine.awake():
        engine.submit(dict(enumerate(requests[:6])))
        early = [done for _ in range(3) for done in engine.advance()]
        assert len(early) < 6, "some are still being written when the others join"
        engine.submit({number: requests[number] for number in range(6, 16)})
        completions = finish(engine, 16, early)
    assert [completion.token_ids for completion in completions] == wanted


def test_a_slow_environment_holds_nobody_up(engine, policy):
    play_beside_a_slow_one(engine, policy)
