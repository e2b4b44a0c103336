"""A GRPO script of TRL, with EPO by two names: EPOTrainer for GRPOTrainer, EPOTrainerConfig for GRPOConfig.

    python examples/trl_epo.py Qwen/Qwen2.5-0.5B-Instruct    # or the folder of any causal model
    python examples/trl_epo.py                               # a tiny model made on the spot, no downloads, on the CPU

Needs `pip install "epo-kernels[trl]"`.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from epo_kernels.integrations.trl import EPOTrainer, EPOTrainerConfig


def vowels(completions, **kwargs):
    """The reward: the share of vowels among the letters written."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def main(model: str | None = None) -> EPOTrainer:
    args = EPOTrainerConfig(
        output_dir="trl-epo",
        max_steps=20,
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=16,
        learning_rate=1e-6 if model else 2e-2,
        lr_scheduler_type="constant",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=model is not None,
        use_cpu=model is None,
        # What EPO adds; all of it has defaults, the paper's.
        entropy_coef=0.03,
        penalty="hinge",
        penalty_alpha=2.0,
        band_scope="segment",
        band_low=0.8,
        band_high=1.2,
    )
    trainer = EPOTrainer(
        model or tiny_model(),
        reward_funcs=vowels,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["Once upon a time", "It was a dark night", "She said"] * 20}),
    )
    trainer.train()
    return trainer


def tiny_model() -> str:
    """The folder of a model of 19,000 parameters over the bytes of text."""
    folder = tempfile.mkdtemp(prefix="tiny-qwen2-")
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, **heads, **ends)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:2])
