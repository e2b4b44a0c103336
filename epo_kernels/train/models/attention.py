"""Checks that the requested attention implementation can run here."""

from collections.abc import Callable

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from epo_kernels.train.config import ConfigError, ModelConfig

_FLASH: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}


def require_attention(config: ModelConfig, device: torch.device) -> None:
    """Check `model.attn_implementation` before a model is loaded.

    Without the package, transformers would download a kernel from the Hub and run it.

    Raises:
        ConfigError: the device or a package is missing.
    """
    name = config.attn_implementation
    if name not in _FLASH:
        return
    package, is_available = _FLASH[name]
    if device.type != "cuda":
        raise ConfigError(
            f"model.attn_implementation={name} requires a CUDA device, but model.device={config.device} is "
            f"{device.type} here; set model.attn_implementation to sdpa or null"
        )
    if not is_available():
        raise ConfigError(
            f"model.attn_implementation={name} requires the package {package}; install it, or set "
            "model.attn_implementation to sdpa or null"
        )
