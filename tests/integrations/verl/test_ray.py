"""verl's own `main_ppo` with EPO on a live Ray cluster, without a GPU.

Two raylets on loopback addresses are two nodes with a logical GPU each. On each a worker of verl trains half of every
batch with FSDP2 over gloo, and a server samples episodes of verl's tool agent with the current weights. The first run
loses a worker inside its third step; the second resumes from the checkpoint of step 2.

Not tested, because it needs GPUs: NCCL, vLLM or SGLang as the rollout with their weight transfer, Megatron, and flash
attention.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from ray.cluster_utils import Cluster
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import epo_kernels as ek

HERE = Path(__file__).parent
PACKAGE = "tests.integrations.verl"
EPO = "actor_rollout_ref.actor.policy_loss.epo"
ALPHA, LOW, HIGH, TURNS = 2.0, 0.95, 1.05, 4
MODULES = ",".join(
    [f"{PACKAGE}.cpu_platform", "epo_kernels.integrations.verl", f"{PACKAGE}.ray_rollout", f"{PACKAGE}.ray_probe"]
)
NODE = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
ADDRESSES = ("127.0.0.2", "127.0.0.3")  # Ray takes 127.0.0.1 for the machine's own address in its network
VERL = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_USE_EXTERNAL_MODULES": MODULES,
}
ENVIRONMENT = {
    "PYTHONPATH": str(HERE.parents[2]),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle workers for every logical CPU would take longer than the steps
}
OF_THE_HARNESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *VERL)
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
    words = ["sun", "moon", "star", "tree", "leaf", "bird", "fish", "wind", "rain", "snow", "fire", "sand"]
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
        f"+{EPO}.penalty_alpha={ALPHA}",
        f"+{EPO}.band_scope=token",
        f"+{EPO}.band_low={LOW}",
        f"+{EPO}.band_high={HIGH}",
        f"+{EPO}.num_turns={TURNS}",
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


@dataclass
class Run:
    """What a run of `main_ppo` left: its exit status, its output, and verl's metrics by step."""

    status: int
    output: str
    metrics: dict[int, dict[str, Any]]


@dataclass
class Runs:
    """The run that loses a worker, the one that resumes it, and the files of the workers (`ray_probe`) by rank."""

    killed: Run
    resumed: Run
    folder: Path

    def steps(self, rank):
        return [torch.load(self.folder / f"rank{rank}_step{step}.pt") for step in (1, 2, 3)]


def train(folder, address, name, **variables):
    """A run of `main_ppo`. Ray was started without verl's variables, so the job's runtime environment has them."""
    variables |= VERL | {"RAY_PROBE_FOLDER": str(folder), "VERL_FILE_LOGGER_PATH": str(folder / f"{name}.jsonl")}
    of_workers = [f"+ray_kwargs.ray_init.runtime_env.env_vars.{key}='{value}'" for key, value in variables.items()]
    log, metrics = folder / f"{name}.log", folder / f"{name}.jsonl"
    with log.open("w") as output:
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *overrides(folder), *of_workers],
            cwd=folder,
            env=os.environ | VERL | {"RAY_ADDRESS": address},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=240,
            check=False,
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return Run(process.returncode, log.read_text(), {line["step"]: line["data"] for line in lines})


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes. Their sockets need a short path; Ray's reaper stops them even if this process dies."""
    folder = tempfile.mkdtemp(prefix="ray_", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        for name in OF_THE_HARNESS:
            patch.delenv(name, raising=False)
        for name, value in (ENVIRONMENT | {"RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        nodes = Cluster()
        try:
            for address in ADDRESSES:
                nodes.add_node(**NODE, node_ip_address=address)
            yield nodes.address
        finally:
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    save_model_and_tokenizer(folder / "model")
    save_prompts(folder / "prompts.parquet")
    killed = train(folder, cluster, "killed", RAY_PROBE_KILL="rank1_step3")
    return Runs(killed, train(folder, cluster, "resumed"), folder)


def test_a_killed_worker_ends_the_run_with_an_error(runs):
    assert runs.killed.status != 0
    assert "Saving checkpoint to" in runs.killed.output, runs.killed.output[-8000:]
    assert re.search("ActorDiedError|Connection (closed|reset) by peer", runs.killed.output), runs.killed.output[-8000:]
    assert list(runs.killed.metrics) == [1, 2]


def test_the_resumed_run_continues(runs):
    assert runs.resumed.status == 0, runs.resumed.output[-8000:]
    assert list(runs.resumed.metrics) == [3]
    for step, record in enumerate(runs.steps(rank=0), start=1):
        saved = torch.load(runs.folder / f"checkpoints/global_step_{step}/actor/epo_entropy_history.pt")
        assert saved["num_steps"] == step
        assert_close(saved["total"], record["history"]["total"], rtol=0, atol=0)


def test_the_workers_share_one_history_of_all_their_tokens(runs):
    history = ek.EntropyHistory(TURNS, weighting="step")
    nodes = set()
    for first, second in zip(runs.steps(rank=0), runs.steps(rank=1), strict=True):
        assert_close(first["history"]["total"], second["history"]["total"], rtol=0, atol=0)
        for record in (first, second):
            nodes.add(record["node"])
            assert record["micro_batches"]
            for batch in record["micro_batches"]:
                history.update(batch["turns"], batch["entropy"], batch["mask"])
        history.commit()
        assert_close(first["history"]["total"], history.state_dict()["total"], rtol=0, atol=0)
    assert len(nodes) == 2
    assert (~history.means().isnan()).sum() > 1  # episodes had several turns


def test_the_band_of_the_steps_before_is_in_the_loss(runs):
    metrics = runs.killed.metrics | runs.resumed.metrics
    history = ek.EntropyHistory(TURNS, weighting="step")
    for step, records in enumerate(zip(runs.steps(rank=0), runs.steps(rank=1), strict=True), start=1):
        below, above, penalty = shares_and_penalty([record["micro_batches"] for record in records], history)
        weight = ek.phase_weight(step - 1, 3, "paper")
        logged = metrics[step]
        assert logged["actor/epo/penalty_weight"] == pytest.approx(weight)
        assert logged["actor/epo/band_low_share"] == pytest.approx(below)
        assert logged["actor/epo/band_high_share"] == pytest.approx(above)
        assert logged["actor/epo/penalty"] == pytest.approx(penalty, rel=1e-5)
        history.load_state_dict(records[0]["history"])
        assert (logged["actor/epo/penalty"] > 0) == (step > 1)


def shares_and_penalty(ranks, history):
    """What verl logs of a step: the shares of tokens below and above the band, by micro-batch, and the hinge."""
    below, above, hinges, tokens = [], [], [0.0, 0.0], [0, 0]
    for micro_batches in ranks:
        for place, batch in enumerate(micro_batches):
            mask = batch["mask"]
            entropy = batch["entropy"][mask]
            low, high = (bound[mask] for bound in history.bounds(batch["turns"], LOW, HIGH))
            below.append((entropy < low).float().mean().item())
            above.append((entropy > high).float().mean().item())
            mini_batch = place * 2 // len(micro_batches)
            hinges[mini_batch] += ((low - entropy).clamp(min=0) + (entropy - high).clamp(min=0)).sum().item()
            tokens[mini_batch] += int(mask.sum())
    count = len(below)
    penalty = ALPHA * sum(hinge / number for hinge, number in zip(hinges, tokens, strict=True)) / 2
    return sum(below) / count, sum(above) / count, penalty


def test_episodes_are_sampled_with_the_current_weights(runs):
    for step, metrics in (runs.killed.metrics | runs.resumed.metrics).items():
        assert metrics["training/rollout_probs_diff_max"] < 1e-4, step
        assert metrics["actor/grad_norm"] > 0
    entropies = [metrics["actor/entropy"] for metrics in runs.killed.metrics.values()]
    assert entropies[0] != pytest.approx(entropies[1])
