"""verl's own `main_ppo` with EPO on a live Ray cluster of two nodes, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
PACKAGE = "tests.integrations.verl"
EPO = "actor_rollout_ref.actor.policy_loss.epo"
NODE = {
    "num_cpus": 8, "num_gpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False,
}
ADDRESSES = ("127.0.0.2", "127.0.0.3")  # loopback; Ray takes 127.0.0.1 for the machine's own address
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # the FSDP engine is registered for it; it asks the platform for the device
    "VERL_USE_EXTERNAL_MODULES": ",".join(
        [f"{PACKAGE}.cpu_platform", "epo_kernels.integrations.verl", f"{PACKAGE}.ray_rollout", f"{PACKAGE}.ray_probe"]
    ),
    "PYTHONPATH": str(HERE.parents[2]),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model_and_tokenizer(folder):
    """A tiny Qwen2 and a tokenizer of single characters with Qwen's marks of a turn."""
    characters = ["\u0120", "\u010a", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def save_prompts(path):
    words = "sun moon star tree leaf bird fish wind rain snow fire sand".split()
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": word}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index, word in enumerate(words)
    ]
    pandas.DataFrame(rows).to_parquet(path)


def overrides(folder):
    """The launch line of docs/verl.md with the sizes of a test, the CPU, and the rollout and the game of a test."""
    actor, rollout, model = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model"))
    return [
        f"{model}.path={folder / 'model'}",
        f"data.train_files={folder / 'prompts.parquet'}",
        f"data.val_files={folder / 'prompts.parquet'}",
        "data.train_batch_size=4",
        "data.max_prompt_length=32",
        "data.max_response_length=64",
        "data.dataloader_num_workers=0",
        "algorithm.adv_estimator=grpo",
        f"{rollout}.name=transformers",
        f"{rollout}.n=2",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=4",
        f"{rollout}.multi_turn.enable=true",
        f"{rollout}.multi_turn.max_assistant_turns=4",
        f"{rollout}.multi_turn.format=first_letter",
        f"{rollout}.multi_turn.function_tool_path={HERE / 'ray_game.py'}",
        f"{rollout}.agent.default_agent_loop=tool_agent",
        f"{rollout}.agent.num_workers=1",
        f"reward.custom_reward_function.path={HERE / 'ray_game.py'}",
        "reward.num_workers=1",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size=2",
        f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"{actor}.use_torch_compile=false",
        f"{actor}.fsdp_config.use_torch_compile=false",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{actor}.optim.lr=0.003",
        f"{actor}.entropy_coeff=0.001",
        f"{actor}.policy_loss.loss_mode=epo",
        f"+{EPO}.penalty=hinge",
        f"+{EPO}.penalty_alpha=2.0",
        f"+{EPO}.band_scope=token",
        f"+{EPO}.band_low=0.95",
        f"+{EPO}.band_high=1.05",
        f"+{EPO}.num_turns=4",
        f"{model}.use_fused_kernels=true",
        f"{model}.fused_kernel_options.impl_backend=epo",
        f"{model}.enable_gradient_checkpointing=false",
        f"+{model}.override_config.attn_implementation=eager",
        "trainer.device=cpu",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=1",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
        "trainer.total_epochs=1",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"hydra.run.dir={folder / 'hydra'}",
        f"+ray_kwargs.ray_init._node_ip_address={ADDRESSES[0]}",
    ]
