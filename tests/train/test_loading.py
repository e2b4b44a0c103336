"""Models modified before their weights are read. For sharded models see test_distributed.py."""

import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.core_model_loading import Concatenate, WeightConverter

from epo_kernels.train.config import ConfigError, ModelConfig, load_config
from epo_kernels.train.data import Sample
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.models import loading
from epo_kernels.train.models.loading import hold_products_in, load_causal_lm
from epo_kernels.train.models.policy import Policy, build_from_scratch, load_policy, precision
from epo_kernels.train.rl.learner import Learner
from tests.train.conftest import SMALL


@pytest.fixture(scope="module", params=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A saved policy and its folder."""
    torch.manual_seed(0)
    tokenizer = build_from_scratch([], ModelConfig(), seed=0).tokenizer
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=len(tokenizer), **shape, num_key_value_heads=2, tie_word_embeddings=request.param == "tied"
    )
    policy = Policy(Qwen2ForCausalLM(config).eval(), tokenizer)
    folder = tmp_path_factory.mktemp(request.param)
    policy.save(folder)
    return policy, folder


def test_a_frozen_model_in_the_dtype_of_its_products_scores_the_same_to_the_last_bit(saved):
    policy, folder = saved
    config = load_config("practice", [*SMALL, "model.dtype=bfloat16", "loss.kl_coeff=0.01"])
    found = []
    for prepare in (None, lambda model: hold_products_in(model, torch.bfloat16)):
        reference = load_causal_lm(str(folder), prepare).requires_grad_(False).eval()
        samples = [Sample([1, 2, 3], [4, 5, 6, 7], [0] * 4), Sample([8, 9], [10, 11], [1] * 2)]
        with precision(reference, "bfloat16"):
            Learner(policy, reference, config).score(samples)
        found.append(torch.cat([sample.ref_log_probs for sample in samples]))
    assert found[0].shape == (6,)
    assert torch.equal(*found)
    dtypes = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {name for name in dtypes if "_proj.weight" in name or name == "lm_head.weight"}


def test_a_model_is_prepared_on_the_meta_device_and_keeps_its_class(saved):
    policy, folder = saved
    seen = []
    model = load_causal_lm(str(folder), lambda model: seen.append([p.is_meta for p in model.parameters()]))
    assert len(seen) == 1
    assert all(seen[0])
    assert type(model) is Qwen2ForCausalLM
    expected = policy.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_one_whose_weights_are_joined_along_what_is_split_is_prepared_after_loading(saved, monkeypatch):
    joined = WeightConverter(["a.weight", "b.weight"], "ab.weight", [Concatenate(dim=0)])
    monkeypatch.setattr(loading, "get_model_conversion_mapping", lambda model: [joined])
    seen = []
    load_causal_lm(str(saved[1]), lambda model: seen.append([p.is_meta for p in model.parameters()]))
    assert len(seen) == 1
    assert not any(seen[0])


def test_one_that_cannot_be_split_is_refused_by_name(saved):
    ranks = Ranks(0, 2, fsdp=True)

    def prepare(model, device):
        decoder = copy.deepcopy(model.get_decoder())
        del decoder.layers
        ranks.shard(decoder, device)

    with pytest.raises(ConfigError, match=r"model\.fsdp: Qwen2Model"):
        load_policy(str(saved[1]), ModelConfig(), prepare)
