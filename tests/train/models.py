"""Miniature versions of users' model folders: a Qwen3-style, a Llama-3-style and a base model."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT = [
    "Follow the signs through 4 rooms to the vault.\nYou enter. Sign: moon, by day. Gold glints left.\n> go left\n"
    "You walk on. A dead end, you come back. user assistant system [INST] im_start im_end think"
]

QWEN3 = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last_query_index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last_query_index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Requires alternating roles, as Llama 2's, Mistral's and Gemma's do.
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""

DEEPSEEK = """\
{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- else %}{{ '<｜Assistant｜>' + message.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


def byte_level(special: list[str], added: list[str], eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """Special tokens outside the model's vocabulary, as Qwen, Llama 3 and DeepSeek have them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=eos)
    wrapped.chat_template = template
    return wrapped


def sentencepiece() -> PreTrainedTokenizerFast:
    """Special tokens within the vocabulary, a space before the first word, as Llama 2 and Mistral have them."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = MISTRAL
    return wrapped


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(special, ["<think>", "</think>", "<tool_response>", "    "], "<|im_end|>", QWEN3)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(special, [], "<|eot_id|>", LLAMA3)


def base_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(["<|begin_of_text|>", "<|end_of_text|>"], [], "<|end_of_text|>", None)


def deepseek_tokenizer() -> PreTrainedTokenizerFast:
    """Its role tokens aren't special ones."""
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    return byte_level(special, ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"], special[1], DEEPSEEK)


TOKENIZERS = {
    "qwen3": qwen3_tokenizer,
    "llama3": llama3_tokenizer,
    "mistral": sentencepiece,
    "deepseek": deepseek_tokenizer,
}


def save_model(folder: Path, kind: str) -> Path:
    """A folder as save_pretrained writes it: qwen3 | llama3 | base."""
    tokenizer = {"qwen3": qwen3_tokenizer, "llama3": llama3_tokenizer, "base": base_tokenizer}[kind]()
    settings = {
        "vocab_size": len(tokenizer) + 8,  # padded, as many are
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**settings, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
