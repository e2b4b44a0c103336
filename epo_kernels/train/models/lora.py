"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT: trains a few million weights instead of all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from epo_kernels.train.config import ConfigError, ModelConfig

INSTALL = 'pip install --constraint constraints.txt "epo-kernels[lora]"'


def require_peft(config: ModelConfig) -> None:
    """Raise ConfigError if adapters are requested and PEFT is not installed."""
    if config.lora_rank:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"model.lora_rank={config.lora_rank} needs the package peft; {INSTALL}") from error


def add_adapters(model: PreTrainedModel, config: ModelConfig) -> None:
    """Add an adapter to each target, in place. The output is unchanged at first; only the adapters are trained.

    Raises:
        ConfigError: PEFT is missing, or the model has no such targets.
    """
    require_peft(config)
    from peft import LoraConfig

    names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    targets = "all-linear" if config.lora_targets == "all-linear" else names
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    try:
        model.add_adapter(adapters)
    except ValueError as error:
        raise ConfigError(f"model.lora_targets={config.lora_targets}: {error}") from error
    train_adapters_alone(model)


def train_adapters_alone(model: PreTrainedModel) -> None:
    """Freeze everything else, and unfreeze the adapters, which PEFT loads frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the context, the model's adapters are disabled."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights, unsharded, with adapters merged, under their names without adapters; one at a time.

    Sharded weights are gathered, so every rank must consume all of them.
    """
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if name.endswith(".base_layer.weight"):
            layer: Any = model.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield name.replace(".base_layer.", "."), weight
