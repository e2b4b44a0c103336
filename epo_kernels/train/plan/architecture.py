"""A model's architecture without its weights, and the parameters that each GPU has of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config

from epo_kernels.train.config import FROM_SCRATCH, ConfigError, ModelConfig
from epo_kernels.train.models.files import check_config
from epo_kernels.train.models.lora import add_adapters
from epo_kernels.train.models.policy import VOCABULARY

# From the config.json of each model on the Hub: hidden_size, intermediate_size, num_hidden_layers,
# num_attention_heads, num_key_value_heads, vocab_size, tie_word_embeddings.
_QWEN2_5 = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
KNOWN: dict[str, dict[str, Any]] = {
    f"Qwen/Qwen2.5-{size}{suffix}": dict(zip(_NAMES, values, strict=True))
    for size, values in _QWEN2_5.items()
    for suffix in ("", "-Instruct")
}


def architecture_of(model: ModelConfig) -> PreTrainedConfig:
    """The configuration of `model.name_or_path`, from its folder, the Hub's cache, or the table of known models.

    Raises:
        ConfigError: it is none of these, or it can't be trained.
    """
    source = model.name_or_path
    settings: dict[str, Any]
    if source in FROM_SCRATCH:
        settings = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "tie_word_embeddings": True}
        found: PreTrainedConfig = Qwen2Config(**FROM_SCRATCH[source], **settings)
    else:
        try:
            settings, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
            check_config(settings)
            found = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except ConfigError:
            raise  # found, and it cannot be trained
        except (OSError, ValueError) as error:
            if source not in KNOWN:
                raise ConfigError(
                    f"model.name_or_path={source}: --plan needs the model's config.json, and there is neither such a "
                    f"folder nor a copy in the Hub's cache; give a folder with config.json, or one of {_known_names()}"
                ) from error
            found = Qwen2Config(**KNOWN[source], max_position_embeddings=32_768)
    found._attn_implementation = "eager" if model.attn_implementation == "eager" else "sdpa"
    return found


def build(architecture: PreTrainedConfig, model: ModelConfig) -> PreTrainedModel:
    """The policy with its adapters, on whatever device or under whatever mode is current.

    Raises:
        ConfigError: transformers has no causal LM of this kind, or its layers aren't found.
    """
    try:
        policy: PreTrainedModel = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False).eval()
    except ValueError as error:
        raise ConfigError(f"model.name_or_path={model.name_or_path}: it is not a causal LM ({error})") from error
    if not isinstance(getattr(policy.get_decoder(), "layers", None), nn.ModuleList):
        raise ConfigError(
            f"model.name_or_path={model.name_or_path}: --plan needs a decoder that keeps its layers in `layers`, got "
            f"{type(policy.get_decoder()).__name__}"
        )
    if model.lora_rank:
        add_adapters(policy, model)
    return policy


@dataclass(frozen=True)
class Count:
    """Parameters: of the layers, which FSDP splits over the GPUs, and all others, which stay whole on each."""

    split: int = 0
    whole: int = 0

    def on_each(self, shards: int) -> float:
        return self.split / shards + self.whole

    @property
    def total(self) -> int:
        return self.split + self.whole


@dataclass(frozen=True)
class Parameters:
    """What a policy consists of.

    Attributes:
        all, trained: of the policy. Adapters stay whole.
        linear: in linear layers that aren't tied to the embedding: what a frozen copy has in 16 bits (`load_frozen`).
    """

    all: Count
    trained: Count
    linear: Count
    head: tuple[int, int]  # rows and columns of the output layer
    outside_decoder: int  # of the output layer that the critic's backbone lacks; 0 where it is tied
    layers: int  # how many layers there are
    layer: int  # of the largest layer
    largest: int  # of the largest tensor in a layer
    kv_per_token: int  # numbers that a token's keys and values are, in all layers
    attention_width: int  # numbers that a token's queries are, in all layers

    @classmethod
    def of(cls, architecture: PreTrainedConfig, model: ModelConfig) -> Parameters:
        """Counted on the meta device, so it costs no memory; once for each model."""
        key = architecture.to_json_string(), repr(model)
        if key not in _counted:
            _counted[key] = cls._count(architecture, model)
        return _counted[key]

    @classmethod
    def _count(cls, architecture: PreTrainedConfig, model: ModelConfig) -> Parameters:
        with torch.device("meta"):
            policy = build(architecture, model)
        layers: Any = policy.get_decoder().layers
        in_layers = {id(parameter) for parameter in layers.parameters()}
        head = policy.get_output_embeddings().weight
        embedding = policy.get_input_embeddings().weight
        linear = [module.weight for module in policy.modules() if isinstance(module, nn.Linear)]
        adapters = {id(parameter) for name, parameter in policy.named_parameters() if "lora_" in name}

        def count(parameters: Any) -> Count:
            chosen = list(parameters)
            split = sum(p.numel() for p in chosen if id(p) in in_layers - adapters)
            return Count(split, sum(p.numel() for p in chosen) - split)

        text = architecture.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            all=count(policy.parameters()),
            trained=count(p for p in policy.parameters() if p.requires_grad),
            linear=count(w for w in linear if w is not embedding and id(w) not in adapters),
            head=(head.shape[0], head.shape[1]),
            outside_decoder=0 if head is embedding else head.numel(),
            layers=len(layers),
            layer=max(sum(p.numel() for p in layer.parameters() if id(p) not in adapters) for layer in layers),
            largest=max(p.numel() for p in layers.parameters()),
            kv_per_token=2 * len(layers) * heads * head_dim,
            attention_width=len(layers) * text.num_attention_heads * head_dim,
        )


_counted: dict[tuple[str, str], Parameters] = {}


def _known_names() -> str:
    return f"Qwen/Qwen2.5-{{{', '.join(_QWEN2_5)}}}[-Instruct]"
