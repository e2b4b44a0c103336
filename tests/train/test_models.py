"""User models: faults in a folder are reported in one line, before anything is played."""

import json

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, load_config
from epo_kernels.train.models import files as model_files
from epo_kernels.train.models.check import check_policy
from epo_kernels.train.models.policy import Policy, load_policy
from tests.train.conftest import SMALL
from tests.train.models import LLAMA3, save_model

OWN = ["model.warm_start.demonstrations=0", "evaluate.episodes=2", "algorithm.group_size=2", "steps=1"]


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", "llama3")


def check(folder, *settings, said=None):
    config = load_config("practice", [f"model.name_or_path={folder}", "model.warm_start.demonstrations=0", *settings])
    say = [].append if said is None else said.append
    policy = load_policy(str(folder), config.model, say=say)
    for warning in check_policy(policy, config):
        say(warning)
    return policy


def refusal(folder, *settings):
    with pytest.raises(ConfigError) as caught:
        check(folder, *settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, **changes):
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", ["model.chat_template_kwargs.enable_thinking=false", "rollout.admissible_actions=true"]),
        ("llama3", ["rollout.layout=episode", "rollout.instruction=Find the vault."]),
        ("base", ["model.chat_template=plain"]),
    ],
)
def test_from_a_dry_run_to_the_report(tmp_path, capsys, kind, settings):
    run_dir = tmp_path / "run"
    folder = save_model(tmp_path / kind, kind)
    if kind == "qwen3":  # as Qwen ships it
        edit(folder / "generation_config.json", temperature=0.6, top_p=0.95, top_k=20)
    own = [f"model.name_or_path={folder}", f"run_dir={run_dir}", "watch.valid_actions=0"]
    command = ["practice", *SMALL, *OWN, *own, *settings]
    assert main([*command, "--dry-run"]) == 0
    assert not run_dir.exists()
    assert main(command) == 0
    assert (run_dir / "report.html").is_file()
    assert "warning" not in capsys.readouterr().out
    again = check(run_dir / "checkpoints" / "global_step_1" / "actor")
    assert again.tokenizer.chat_template is not None, "a template of model.chat_template goes into checkpoints"


def owned(folder, trace, tokenizer_class=None, **changes):
    """A folder whose JSON files ask to run its own code."""
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(
        folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, **changes
    )
    if tokenizer_class:
        tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Model", "evil.Model"]}, "tokenizer_class": tokenizer_class}
        edit(folder / "tokenizer_config.json", **tokenizer)


def test_code_in_a_model_folder_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    trace = tmp_path / "trace"
    owned(folder, trace)  # transformers has this architecture
    policy = check(folder)
    assert type(policy.model).__module__.startswith("transformers.")
    policy.save(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    owned(folder, trace, tokenizer_class="Evil")
    assert "custom code (auto_map in its JSON files), which is never run; use" in refusal(folder)
    edit(folder / "tokenizer_config.json", auto_map=None, tokenizer_class="PreTrainedTokenizerFast")
    owned(folder, trace, model_type="evil")
    assert "custom code (auto_map in its JSON files), which is never run; use" in refusal(folder)
    assert not trace.exists()


def drop_head(weights):
    del weights["lm_head.weight"]


def spoil(weights):
    weights["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_head, ["lm_head.weight", "randomly", "tie_word_embeddings=true"]),
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), ["layers.1.mlp.up_proj", "randomly"]),
        (spoil, ["model.norm.weight", "finite"]),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(16)}),
            ["model.norm.weight", "(16,)", "(32,)"],
        ),
    ],
)
def test_weights_are_complete_and_finite(folder, change, words):
    edit_weights(folder, change)
    message = refusal(folder)
    for word in words:
        assert word in message


def test_layers_that_are_not_used_are_a_warning(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    check(folder, said=(said := []))
    assert "9 weights in its files are not used" in said[0]
    assert "num_hidden_layers" in said[0]


def shards(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = dict(list(weights.items())[:3])
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    parts = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538\n"
FILES = {
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "truncat",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or damaged"),
    "LFS pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "LFS tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "shard": (shards, "lacks 1 of 2 weight files: model-00002-of-00002.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "copy them too"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; give the folder"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load it"),
    "GPTQ": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "quantized (gptq)"),
    "attention": (
        lambda f: edit(f / "config.json", attn_implementation="flash_attention_2"),
        "flash_attn is not installed; install it, or remove attn_implementation",
    ),
    "hub's attention": (lambda f: edit(f / "config.json", attn_implementation="them/kernel"), "never run; remove"),
    "positions": (lambda f: edit(f / "config.json", max_position_embeddings=64), "lower rollout.max_prompt_tokens"),
    "end token": (lambda f: edit(f / "generation_config.json", eos_token_id=9999), "correct eos_token_id"),
    "template": (lambda f: (f / "chat_template.jinja").unlink(), "set model.chat_template=plain"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_wrong_with_a_folder(folder, case, monkeypatch):
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    change, words = FILES[case]
    change(folder)
    message = refusal(folder)
    assert words in message
    assert str(folder) in message or case in ("positions", "end token")


def test_a_truncated_checkpoint_names_the_way_on(cloned, tmp_path):
    cloned.save(tmp_path / "actor")
    path = tmp_path / "actor" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated.*resume=FOLDER"):
        load_policy(str(tmp_path / "actor"), load_config("practice", []).model)


@pytest.mark.parametrize("sampling", [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "top_k": 7}])
def test_sampling_settings_that_contradict_each_other_do_not_break_checkpoints(folder, tmp_path, sampling):
    edit(folder / "generation_config.json", **sampling)
    policy = check(folder, said=(said := []))
    policy.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["do_sample"] is True
    assert kept["eos_token_id"] == policy.tokenizer.eos_token_id
    assert "do_sample=true" in said[0]


def test_an_embedding_smaller_than_the_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{n}" for n in range(9)])
    tokenizer.save_pretrained(folder)
    assert "resize_token_embeddings(len(tokenizer))" in refusal(folder)


def test_special_tokens_without_a_row_that_never_occur(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{n}>" for n in range(9)]})  # as Gemma 3 has
    tokenizer.save_pretrained(folder)
    policy = check(folder)
    rows = policy.model.get_input_embeddings().weight.shape[0]
    (ids,) = policy.chat.prompts(["".join(f"<image{n}>" for n in range(9))])
    assert max(ids) < rows
    (folder / "chat_template.jinja").write_text(LLAMA3 + "{{ '<image8>' }}")
    assert "<image8>" in refusal(folder)


def test_without_any_end_token(tmp_path):
    folder = save_model(tmp_path / "model", "base")
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert "set eos_token in tokenizer_config.json" in refusal(folder, "model.chat_template=plain")


def test_a_thought_needs_room(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    check(folder, said=(said := []))
    assert "model.chat_template_kwargs.enable_thinking=false" in said[0]
    check(folder, "model.chat_template_kwargs.enable_thinking=false", said=(said := []))
    check(folder, "rollout.max_response_tokens=200", said=said)
    assert said == []


def test_a_template_that_writes_the_date(folder):
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    (folder / "chat_template.jinja").write_text(dated + LLAMA3.replace("December 2023", "' + date_string + '"))
    check(folder, said=(said := []))
    assert "set model.chat_template_kwargs.date_string" in said[0]
    policy = check(folder, "model.chat_template_kwargs.date_string=a day", said=(said := []))
    assert said == []
    assert "Date: a day" in policy.tokenizer.decode(policy.chat.prompts(["x"])[0])


def test_the_template_of_a_file_and_of_a_name(folder, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(LLAMA3.replace("December 2023", "a day"))
    policy = check(folder, f"model.chat_template={own}")
    assert "Date: a day" in policy.tokenizer.decode(policy.chat.prompts(["x"])[0])
    named = folder / "additional_chat_templates"
    named.mkdir()
    (folder / "chat_template.jinja").rename(named / "rag.jinja")
    assert "name one of them in model.chat_template" in refusal(folder)
    check(folder, "model.chat_template=rag")
    assert "model.chat_template must be plain or a file" in refusal(folder, "model.chat_template=nowhere.jinja")


CACHELESS = {
    "Qwen3Next": {"num_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4, "linear_num_key_heads": 2},
    "Lfm2": {"full_attn_idxs": [1]},
    "Mamba": {"state_size": 8, "time_step_rank": 4},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


@pytest.mark.parametrize("architecture", CACHELESS)
def test_architectures_whose_cache_cannot_be_batched(folder, architecture):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": None,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = getattr(transformers, f"{architecture}Config")
    model = getattr(transformers, f"{architecture}ForCausalLM")(
        config(vocab_size=len(tokenizer), **settings | CACHELESS[architecture])
    )
    policy = Policy(model.eval(), tokenizer)
    config = load_config("practice", ["rollout.max_prompt_tokens=100"])
    with pytest.raises(ConfigError, match=rf"{architecture}ForCausalLM .* set rollout\.engine=vllm"):
        check_policy(policy, config)
    config.rollout.engine = "vllm"
    check_policy(policy, config)


def test_a_model_that_sees_what_comes_later(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=len(tokenizer), **size))
    with pytest.raises(ConfigError, match="attend to later ones"):
        check_policy(Policy(model.eval(), tokenizer), load_config("practice", []))


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "~/model", "a/b/c", ".."])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", pytest.fail)
    message = refusal(source)
    assert "there is no folder" in message or "has no config.json" in message


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def unreachable(self, name, timeout):
        asked.append(timeout)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    said = []
    with pytest.raises(ConfigError, match=r"cannot be reached \(no route\).*give its folder"):
        check("nobody/nothing", said=said)
    assert asked == [model_files.HUB_TIMEOUT]
    assert said[0].startswith("model: asking ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("nobody/nothing")
    assert len(asked) == 1


def test_a_cached_model_is_taken_where_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "/cache/config.json")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0)
    said = []
    assert not model_files.is_on_hub("nobody/nothing", said.append)
    assert "from the cache" in said[-1]


def test_settings_of_chat_templates_are_told_apart(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("model: {name_or_path: x, chat_template_kwargs: {enable_thinking: false}}\n")
    config = load_config(str(file), ["model.chat_template_kwargs.date_string=today"])
    assert config.model.chat_template_kwargs == {"enable_thinking": False, "date_string": "today"}
    with pytest.raises(ConfigError, match=r"model\.chat_template .* Remove them"):
        load_config("practice", ["model.chat_template=plain"])
    with pytest.raises(ConfigError, match=r"rollout\.admissible_actions must be false .* set it to false"):
        load_config("quickstart", ["rollout.admissible_actions=true"])
