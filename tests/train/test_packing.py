"""Packed rows: the same hidden states, scores and gradients as one row per sample."""

import copy
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from epo_kernels.train.config import load_config
from epo_kernels.train.data import MiniBatch, Sample, micro_batches
from epo_kernels.train.models.check import row_width_of
from epo_kernels.train.models.policy import response_hidden
from epo_kernels.train.packing import lay_out, pack, visibility
from tests.train.conftest import SMALL

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CPU = torch.device("cpu")


def drawn_samples(seed, count=40):
    """Groups with shared prompts of many lengths."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, 97) for _ in range(draw.randint(1, 20))] for _ in range(count // 4)]
    return [
        Sample.of_turn(draw.choice(prompts), [draw.randrange(1, 97) for _ in range(draw.randint(1, 9))], 0)
        for _ in range(count)
    ]


def sequences_of(samples):
    return [(sample.prompt_ids, sample.response_ids) for sample in samples]


def test_a_row_as_drawn_in_the_page():
    p, q = [10, 11, 12], [20, 21]
    (row,) = lay_out([(p, [1, 2, 0]), (p, [3, 0]), (q, [4, 5, 0])], 10)
    assert row.ids == [10, 11, 12, 1, 2, 3, 20, 21, 4, 5]
    assert row.positions == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert row.blocks == [0] * 6 + [1] * 4
    assert row.branches == [0, 0, 0, 1, 1, 2, 0, 0, 1, 1]
    assert row.places == [[2, 3, 4], [2, 5], [7, 8, 9]]
    seen = visibility([row], 11)[0, 0]
    assert seen[5].nonzero().flatten().tolist() == [0, 1, 2, 5]  # the second response: its prompt and itself
    assert seen[9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert seen[10].nonzero().flatten().tolist() == [10]  # padding, which a softmax over nothing would make NaN


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_all_keep_to_the_width_and_are_laid_out_as_planned(seed):
    samples = drawn_samples(seed)
    sequences, width = sequences_of(samples), 30
    rows = pack(sequences, width)
    order = [index for row in rows for index in row]
    assert sorted(order) == list(range(len(samples)))
    laid = lay_out([sequences[i] for i in order], width)
    assert len(laid) <= len(rows)
    assert all(len(row.ids) <= width for row in laid)
    for tokens in (30, 95, 10_000):
        for batch in micro_batches(samples, tokens, width):
            assert MiniBatch.of([samples[i] for i in batch], 0, CPU, width).input_ids.numel() <= tokens


def test_packing_pays():
    samples = [sample for sample in drawn_samples(0) for _ in range(4)]
    packed, padded = (
        sum(MiniBatch.of([samples[i] for i in batch], 0, CPU, width).input_ids.numel() for batch in batches)
        for width, batches in ((w, micro_batches(samples, 500, w)) for w in (60, None))
    )
    assert packed < 0.6 * padded


def test_a_sample_longer_than_a_row_has_one_of_its_own():
    samples = [Sample.of_turn([1] * 50, [2, 3], 0), Sample.of_turn([4], [5, 6], 0)]
    assert list(micro_batches(samples, 20, 20)) == [[0], [1]]
    assert MiniBatch.of(samples, 0, CPU, 20).input_ids.shape == (2, 51)


def model_of(config, attention):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config, LlamaConfig, GemmaConfig])
def test_hidden_states_and_gradients_are_those_of_single_rows(family, attention):
    model = model_of(family(**SIZES), attention)
    decoder = model.get_decoder()
    samples = drawn_samples(1, 12)
    found, gradients = [], []
    for width in (None, 40):
        model.zero_grad()
        order = [i for batch in micro_batches(samples, 10_000, width) for i in batch]
        batch = MiniBatch.of([samples[i] for i in order], 0, CPU, width)
        hidden = torch.zeros(len(samples), batch.tokens.shape[1], 32)
        states = response_hidden(decoder, batch) * batch.mask[..., None]
        states.square().sum().backward()
        hidden[order] = states.detach()
        found.append(hidden)
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def policy_with(policy, model):
    other = copy.copy(policy)
    other.model = model
    return other


def test_models_that_cannot_be_packed_get_a_row_for_each_sample(policy):
    config = load_config("practice", SMALL)
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert row_width_of(policy, config) == width
    assert row_width_of(policy, load_config("practice", [*SMALL, "optim.packing=false"])) is None
    for window, expected in ((width - 1, None), (width, width)):
        model = model_of(MistralConfig(**SIZES, sliding_window=window), "sdpa")
        assert row_width_of(policy_with(policy, model), config) == expected


def test_a_model_that_takes_no_mask_is_found_out(policy):
    """Bloom makes its positions from the mask (ALiBi)."""
    from transformers import BloomConfig

    model = model_of(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "eager")
    assert row_width_of(policy_with(policy, model), load_config("practice", SMALL)) is None
