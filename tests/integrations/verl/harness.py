"""A tiny model, a batch of agents' episodes, and verl's real training worker over them, on the CPU (cpu_platform)."""

from __future__ import annotations

import os

os.environ.update(  # before verl's first import
    VERL_PLATFORM="cpu",
    VERL_ENGINE_DEVICE="cuda",
    VERL_USE_EXTERNAL_MODULES="tests.integrations.verl.cpu_platform,epo_kernels.integrations.verl",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="0",
)
os.environ.setdefault("RANK", "0")
os.environ.setdefault("WORLD_SIZE", "1")
os.environ.setdefault("LOCAL_RANK", "0")

from contextlib import contextmanager
from functools import partial
from types import MethodType

import numpy as np
import torch
import verl  # noqa: F401 (brings the plug-ins in, before anything of verl asks for its platform)
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.protocol import DataProto
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers import config as verl_config
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

VOCAB = 61
TIME = 8  # padded length of responses
PROMPT = 5


def init_process_group(store, rank, world_size):
    """gloo alone: verl's own call asks for one backend of the CPU and one of the accelerator, and here both are one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def save_tiny_model(path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # entropies that differ from token to token
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@contextmanager
def forward_of_its_own(worker, family=Qwen2ForCausalLM):
    """verl gives the model's class another forward; with this, only the model that the worker makes inside has it."""
    forward = family.forward
    try:
        yield
        model = getattr(worker, "actor", worker).engine.module
        model.forward = MethodType(family.forward, model)
    finally:
        family.forward = forward


def make_worker(model_path, remove_padding=False, fused=None, lr=0.0, family=Qwen2ForCausalLM):
    """The class of worker that verl gives the actor, over the FSDP2 engine in float32. fused: backend of the head."""
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(model_path),
            load_tokenizer=False,
            use_remove_padding=remove_padding,
            use_fused_kernels=fused is not None,
            fused_kernel_options={"impl_backend": fused},
            override_config={"attn_implementation": "eager"},
            enable_gradient_checkpointing=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision={"param_dtype": "fp32"},
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=2,
            infer_micro_batch_size_per_gpu=2,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=lr, weight_decay=0.0, total_training_steps=10, clip_grad=1e9),
        checkpoint_config=CheckpointConfig(),
    )
    worker = ActorRolloutRefWorker.actor_worker_cls(config)
    with forward_of_its_own(worker, family):
        worker.reset()
    worker.gradients = None
    step = worker.engine.optimizer_step

    def keep_gradients():
        worker.gradients = {
            name: parameter.grad.full_tensor().clone() for name, parameter in worker.engine.module.named_parameters()
        }
        return step()

    worker.engine.optimizer_step = keep_gradients
    return worker


def actor_config(loss_mode="epo", epo=None, **keys):
    """verl's config of an actor, as its hydra config makes it."""
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=verl_config.PolicyLossConfig(loss_mode=loss_mode, epo=epo),
        optim=FSDPOptimizerConfig(lr=0.0, total_training_steps=10),
        **keys,
    )


def episodes(seed=1, first=0, last=4):
    """(padded tensors by verl's names) of four episodes of one, two and three turns with gaps between, [first, last).

    The second micro-batch holds fewer tokens than the first.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = torch.tensor([5, 3, 4, 2]), torch.tensor([8, 6, 4, 3])
    attention = torch.zeros(4, PROMPT + TIME, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        attention[row, PROMPT - prompt : PROMPT + response] = 1
    ids = torch.randint(VOCAB, attention.shape, generator=generator) * attention
    mask = attention[:, PROMPT:].clone()
    for row, column in ((0, 2), (0, 5), (1, 3)):
        mask[row, column] = 0
    tensors = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": mask,
        "old_log_probs": -4.0 + torch.randn(4, TIME, generator=generator),
        "ref_log_prob": -4.0 + torch.randn(4, TIME, generator=generator),
        "rollout_is_weights": 0.5 + torch.rand(4, TIME, generator=generator),
        "advantages": torch.randn(4, TIME, generator=generator),
    }
    return {name: value[first:last] for name, value in tensors.items()}


def nested(tensors):
    """The same episodes without padding, as verl's TransferQueue trainer holds them."""
    attention = tensors["attention_mask"].bool()
    parts = {"prompts": attention[:, :PROMPT], "input_ids": attention, "position_ids": attention}
    data = {}
    for name, value in tensors.items():
        keep = parts.get(name, attention[:, PROMPT:])
        if name != "attention_mask":
            rows = [row[kept] for row, kept in zip(value, keep, strict=True)]
            data[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return data | {"loss_mask": data["response_mask"]}


def batch_of(tensors, *, turn=None, epochs=1, mini_batch_size=4, calculate_entropy=True, **engine):
    """What verl's trainer sends to `update_actor`. engine: keys of the engine, in place of the worker's."""
    fields = {} if turn is None else {"turn": np.array(turn, dtype=object)}
    if tensors["prompts"].is_nested:
        data = tensordict_utils.get_tensordict(dict(tensors))
    else:
        data = DataProto.from_dict(tensors={k: v.clone() for k, v in tensors.items()}, non_tensors=fields)
        data = left_right_2_no_padding(data.to_tensordict())
    tensordict_utils.assign_non_tensor(
        data,
        calculate_entropy=calculate_entropy,
        global_batch_size=mini_batch_size,
        mini_batch_size=mini_batch_size,
        epochs=epochs,
        seed=42,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
        temperature=0.7,
        **engine,
    )
    return data


def update(worker, actor, tensors, **batch):
    """verl's metrics of one update with this actor config: {name: number}. worker.gradients are those of its last."""
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return update_again(worker, tensors, **batch)


def update_again(worker, tensors, **batch):
    metrics = tensordict_utils.get(worker.train_mini_batch(batch_of(tensors, **batch)), "metrics")
    return {name: float(np.mean(values)) for name, values in metrics.items()}
