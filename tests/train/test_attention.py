"""model.attn_implementation: which one is used, and which are rejected before anything is loaded."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from epo_kernels.train.config import ConfigError, ModelConfig, load_config
from epo_kernels.train.models import attention
from epo_kernels.train.models.attention import require_attention
from epo_kernels.train.models.check import check_policy
from epo_kernels.train.models.loading import load_causal_lm
from epo_kernels.train.models.policy import build_from_scratch, load_policy
from tests.train.conftest import train

FLASH = ModelConfig(attn_implementation="flash_attention_2", dtype="bfloat16")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_it_reaches_a_new_model_and_a_loaded_one(tmp_path, name):
    config = ModelConfig(attn_implementation=name)
    built = build_from_scratch([], config, seed=0)
    assert built.model.config._attn_implementation == name
    built.save(tmp_path)
    other = "sdpa" if name == "eager" else "eager"
    config = ModelConfig(name_or_path=str(tmp_path), attn_implementation=other)
    loaded = load_policy(str(tmp_path), config)
    assert loaded.model.config._attn_implementation == other
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded.model(ids).logits, built.model(ids).logits)


def test_without_the_setting_transformers_chooses(tmp_path):
    policy = build_from_scratch([], ModelConfig(), seed=0)
    policy.save(tmp_path)
    default = load_causal_lm(str(tmp_path)).config._attn_implementation
    assert policy.model.config._attn_implementation == default == "sdpa"


def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2 .* CUDA .* sdpa or null"):
        require_attention(FLASH, torch.device("cpu"))
    monkeypatch.setitem(attention._FLASH, "flash_attention_2", ("flash-attn", lambda: False))
    with pytest.raises(ConfigError, match=r"requires the package flash-attn; install it"):
        require_attention(FLASH, CUDA)
    monkeypatch.setitem(attention._FLASH, "flash_attention_2", ("flash-attn", lambda: True))
    require_attention(FLASH, CUDA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.attn_implementation=sdp"], "model.attn_implementation must be one of eager, sdpa"),
        (["model.attn_implementation=some/kernel"], "model.attn_implementation must be one of eager, sdpa"),
        (["model.attn_implementation=flash_attention_2"], "model.dtype must be bfloat16"),
    ],
)
def test_what_can_be_told_from_the_settings_is(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_config("practice", settings)


def test_the_command_line_refuses_it_before_anything_starts(tmp_path, capsys):
    settings = ("model.attn_implementation=flash_attention_2", "model.dtype=bfloat16", "model.device=cpu")
    assert train(f"run_dir={tmp_path / 'run'}", *settings) == 2
    assert "model.attn_implementation to sdpa or null" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_architecture_without_it_names_the_setting(tmp_path, monkeypatch):
    policy = build_from_scratch([], ModelConfig(), seed=0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    policy.model = GPT2LMHeadModel(GPT2Config(vocab_size=len(policy.tokenizer), **shape))
    policy.save(tmp_path)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "_supports_sdpa", False)
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=sdpa .*set it to eager or null"):
        load_policy(str(tmp_path), ModelConfig(name_or_path=str(tmp_path), attn_implementation="sdpa"))


def test_a_model_with_flash_attention_is_checked_in_16_bits():
    seen = set()

    def flash_on_cpu(module, query, *args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))  # what flash attention casts to
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("flash_on_cpu", flash_on_cpu)
    AttentionMaskInterface.register("flash_on_cpu", sdpa_mask)
    policy = build_from_scratch([], ModelConfig(), seed=0)
    policy.model.config._attn_implementation = "flash_on_cpu"
    check_policy(policy, load_config("practice", ["model.dtype=bfloat16"]))
    assert seen == {torch.bfloat16}
