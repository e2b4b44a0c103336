"""The policy: a causal LM with its tokenizer, loaded from a folder or the hub, or built from scratch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from epo_kernels.train.config import FROM_SCRATCH, ConfigError, ModelConfig
from epo_kernels.train.data import MiniBatch
from epo_kernels.train.envs import Demonstration
from epo_kernels.train.policies.lora import require_peft, train_adapters_alone

USER, ACT = "<|user|>", "<|act|>"
VOCABULARY = 1000
CHAT_TEMPLATE = (
    f"{{% for message in messages %}}"
    f"{{% if message['role'] == 'assistant' %}}{ACT}{{{{ message['content'] + eos_token }}}}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{ACT}{{% endif %}}"
)


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def end_ids(self) -> set[int]:
        """Token ids that end a response."""
        generation = self.model.generation_config
        declared = generation.eos_token_id if generation is not None else None
        ids = set(declared) if isinstance(declared, list) else {declared}
        return {int(i) for i in ids | {self.tokenizer.eos_token_id} if i is not None}

    @property
    def pad_id(self) -> int:
        """Fills batches up; always masked, so any id will do where the tokenizer names none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """As `load_policy` reads it. `weights` stand in for the model's own."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError where the device isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_policy(source: str, config: ModelConfig) -> Policy:
    """A policy saved with `save_pretrained`, or from the hub.

    Raises:
        ConfigError: nothing to load there, a tokenizer without a chat template, or adapters without PEFT.
    """
    require_peft(config)
    device = resolve_device(config.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Safetensors alone: other formats are pickles, which can hold programs.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name_or_path={source!r} is not to be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"model.name_or_path={source!r}: its tokenizer has no chat template; use a chat model")
    if getattr(model, "_hf_peft_config_loaded", False):
        train_adapters_alone(model)
    return Policy(_placed(model, device), tokenizer)


def build_from_scratch(demonstrations: Sequence[Demonstration], config: ModelConfig, seed: int) -> Policy:
    """A Qwen2 of `FROM_SCRATCH` with a tokenizer trained on the demonstrations' text. Knows nothing yet."""
    tokenizer = _train_tokenizer(demonstrations)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            **FROM_SCRATCH[config.name_or_path],
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return Policy(_placed(model, resolve_device(config.device)), tokenizer)


def precision(model: PreTrainedModel, dtype: str) -> torch.autocast:
    """Inside, matrix products run in `dtype`; the weights stay float32.

    A weight in bfloat16 has 8 bits: an update below 1/512 of it would be rounded away, and those of RL are. Casts are
    not cached, since a cached one would outlive an update of the weights.
    """
    wanted = getattr(torch, dtype)
    return torch.autocast(model.device.type, wanted, enabled=wanted != torch.float32, cache_enabled=False)


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Ready for sampling and training: without dropout, for good, since both must see one distribution."""
    torch.nn.Module.to(model, device)
    for parameter in model.parameters():
        # Loaded weights lie in the mapped file at odd addresses, and matrix products round by alignment: a resumed run
        # would differ in the last bit.
        parameter.data = parameter.data.clone()
    return model.eval()


def _train_tokenizer(demonstrations: Sequence[Demonstration]) -> PreTrainedTokenizerBase:
    """Byte-level BPE: any text can be encoded. Qwen2's class, since that is what loads a saved Qwen2 again."""
    texts = (
        text
        for demonstration in demonstrations
        for seen, action in zip(demonstration.observations, demonstration.actions, strict=True)
        for text in (seen.goal, seen.text, seen.scene, f"> {action}", action)
    )
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=[USER, ACT], show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def response_logits(model: PreTrainedModel, batch: MiniBatch) -> Tensor:
    """(B, R, V) logits that predict the batch's response tokens; those of the prompts are never computed."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.tokens.shape[1],
    ).logits


def response_hidden(decoder: PreTrainedModel, batch: MiniBatch) -> Tensor:
    """(B, R, D) last hidden states that predict the batch's response tokens; `decoder` is `model.get_decoder()`."""
    hidden = decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -batch.tokens.shape[1] :]


@contextmanager
def checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Inside, layers keep their inputs alone and compute the rest again in backward, where enabled.

    transformers asks a layer's `training` for that. It is set on the layers alone, not on what they hold, so that
    dropout stays off; and inside alone, since checkpointed layers drop the KV cache that generation needs.
    """
    layers = []
    if enabled:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
