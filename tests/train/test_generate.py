import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from epo_kernels.train.models.policy import casts_kept, precision
from epo_kernels.train.rollout.engine import Request, StopRule, _choose
from tests.train.conftest import engine_of


def requests_of(policy, count=6):
    texts = [f"Follow the signs. Sign: {'moon ' * (i + 1)}" for i in range(count)]
    prompts = [policy.tokenizer(text)["input_ids"] for text in texts]
    return [Request(ids, seed=(3, 1, 1, i, 0)) for i, ids in enumerate(prompts)]


def test_draws_do_not_depend_on_the_batch(cloned):
    engine, requests = engine_of(cloned, temperature=2.0, max_tokens=12), requests_of(cloned)
    together = engine.generate(requests)
    assert len({len(c.token_ids) for c in together}) > 1  # some end early, so rows leave the batch on the way
    for alone, others in [([0], []), ([5], [0, 1]), ([3, 2], [5, 4])]:
        again = engine.generate([requests[i] for i in alone + others])
        for i, completion in zip(alone, again, strict=False):
            assert completion.token_ids == together[i].token_ids
            assert completion.log_probs == pytest.approx(together[i].log_probs, abs=1e-5)


def test_a_completion_says_why_it_ended(cloned):
    requests = requests_of(cloned)
    whole = engine_of(cloned, temperature=2.0, max_tokens=12).generate(requests)
    assert [c.finish for c in whole] == ["stop"] * len(requests)
    limit = min(len(c.token_ids) for c in whole)
    cut = engine_of(cloned, temperature=2.0, max_tokens=limit).generate(requests)
    assert {c.finish for c in cut} == {"stop", "length"}
    for one, other in zip(whole, cut, strict=True):
        assert other.finish == ("stop" if len(one.token_ids) == limit else "length")


def test_equal_prompts_are_read_once_and_drawn_from_apart(cloned, monkeypatch):
    engine, (first, second, *_) = engine_of(cloned, temperature=2.0, max_tokens=12), requests_of(cloned)
    requests = [
        Request(prompt.prompt_ids, (7, row)) for row, prompt in enumerate((first, second, first, first, second))
    ]
    alone = [engine.generate([request])[0] for request in requests]
    widths, forward = [], type(cloned.model).forward

    def counting(model, *, input_ids, **rest):
        widths.append(len(input_ids))
        return forward(model, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(cloned.model), "forward", counting)
    together = engine.generate(requests)
    assert widths[:2] == [2, 5]
    assert len({tuple(completion.token_ids) for completion in together}) > 2
    for one, other in zip(alone, together, strict=True):
        assert other.token_ids == one.token_ids
        assert other.log_probs == pytest.approx(one.log_probs, abs=1e-5)


def test_kept_casts_change_nothing_and_do_not_outlive_an_update(cloned):
    model = copy.deepcopy(cloned.model)
    ids = torch.arange(12)[None]

    def logits(kept):
        with torch.no_grad(), precision(model, "bfloat16"), casts_kept(model) if kept else nullcontext():
            return [model(ids).logits for _ in range(2)]

    plain = logits(kept=False)
    assert all(torch.equal(one, plain[0]) for one in logits(kept=True))
    with precision(model, "bfloat16"):
        with torch.no_grad(), casts_kept(model):
            model(ids)
        with casts_kept(model):  # casts without a graph would cut the weights off
            model(ids).logits.sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
            with casts_kept(model):
                updated = model(ids).logits
        assert torch.equal(updated, logits(kept=False)[0])
        assert not torch.equal(updated, plain[0])


def test_kept_casts_last_until_the_outermost_block_ends(cloned):
    model = copy.deepcopy(cloned.model)
    ids = torch.arange(12)[None]
    with torch.no_grad(), precision(model, "bfloat16"):
        with casts_kept(model):
            with casts_kept(model):
                first = model(ids).logits
            for module in model.get_decoder().modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.mul_(1.1)
            with casts_kept(model):
                assert torch.equal(model(ids).logits, first)  # no weight was cast again
        with casts_kept(model):
            assert not torch.equal(model(ids).logits, first)


def test_log_probs_are_those_of_a_plain_forward_pass(cloned):
    for temperature in (1.0, 0.7):
        for request, completion in zip(
            requests_of(cloned), engine_of(cloned, temperature).generate(requests_of(cloned)), strict=True
        ):
            ids = torch.tensor([request.prompt_ids + completion.token_ids])
            with torch.no_grad():
                logits = cloned.model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / temperature
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert completion.log_probs == pytest.approx(wanted.tolist(), abs=1e-5)


def test_seed_and_greedy_decide(cloned):
    engine, (request, *_) = engine_of(cloned, temperature=3.0), requests_of(cloned)
    drawn = {tuple(engine.generate([Request(request.prompt_ids, (n,))])[0].token_ids) for n in range(8)}
    assert len(drawn) > 1
    greedy = {tuple(engine.generate([Request(request.prompt_ids, (n,), True)])[0].token_ids) for n in range(3)}
    assert len(greedy) == 1


def test_choice_follows_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    log_probs = probabilities.log().expand(len(draws), -1)
    shares = torch.bincount(_choose(log_probs, draws, torch.zeros(len(draws), dtype=torch.bool)), minlength=6) / 20_000
    assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=0.015)
    assert shares[probabilities == 0].sum() == 0
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert _choose(log_probs[:2], ends, torch.zeros(2, dtype=torch.bool)).tolist() == [1, 4]


def test_responses_end_where_their_format_says(cloned):
    tokenizer = cloned.tokenizer
    end = tokenizer.eos_token_id

    def first_end(text, response_format):
        rule = StopRule(tokenizer, {end}, response_format)
        ids = tokenizer(text)["input_ids"]
        return next((tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1) if rule.ends(ids[:n])), None)

    assert first_end("go left\ngo right", "plain").strip() == "go left"
    assert first_end("go left<|endoftext|>go right", "plain") == "go left<|endoftext|>"
    assert first_end("go left", "plain") is None
    whole = "<think>left > right\n</think><action>go left</action>"
    assert first_end(f"{whole} and more", "think_action").startswith(whole)
    assert first_end("<think>left > right\n</think>", "think_action") is None
