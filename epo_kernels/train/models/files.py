"""Finds the source of a model, and checks that its files are present, intact and complete."""

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from epo_kernels.train.config import ConfigError
from epo_kernels.train.io.text import one_line

HUB_TIMEOUT = 5.0  # seconds
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_on_hub(source: str, say: Callable[[str], None]) -> bool:
    """Whether the model's files come from the Hub. False: a folder, which is checked here, or the cache while offline.

    Asks the Hub once, with a short timeout. The loaders would ask for every file and retry each.

    Raises:
        ConfigError: no such folder or model, missing or damaged files, or an unreachable Hub.
    """
    folder = Path(source)
    if folder.is_dir():
        check_files(folder)
        base = _base_of_adapters(folder)
        return is_on_hub(base, say) if base else False
    if folder.exists():
        raise ConfigError(f"{source} is a file; give the folder that contains it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        raise ConfigError(f"there is no folder {source}; give a model's folder, or a hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    is_cached = isinstance(try_to_load_from_cache(source, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        if not is_cached:
            raise ConfigError(
                f"there is no folder {source}, HF_HUB_OFFLINE is set, and the Hub's cache does not have it"
            )
        return False
    say(f"model: asking {constants.ENDPOINT} for {source}")
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no folder {source}, and no model of that name on {constants.ENDPOINT} (or it is private: "
            "`hf auth login`)"
        ) from error
    except Exception as error:  # whatever the HTTP library raises
        reason = one_line(error, 200)
        if not is_cached:
            raise ConfigError(
                f"there is no folder {source}, and {constants.ENDPOINT} cannot be reached ({reason}); download the "
                "model on a machine with a connection (`hf download`), and give its folder"
            ) from error
        say(f"model: {constants.ENDPOINT} cannot be reached ({reason}); loading {source} from the cache")
        return False
    say(f"model: downloading files of {source} that are not cached")
    return True


def check_files(folder: Path) -> None:
    """Raise ConfigError if a model's folder lacks a file, or has a damaged one."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(
            f"{folder} has no config.json; give the folder that save_pretrained wrote (of a run: "
            "RUN_DIR/checkpoints/global_step_N/actor)"
        )
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS_POINTER):
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
        rest = (
            f", only {pickles[0].name}, a pickle, which can execute code: convert it in an environment where you trust "
            "it (load it with transformers and call save_pretrained)"
            if pickles
            else ": the weights are missing, copy them too"
        )
        raise ConfigError(f"{folder} has no .safetensors file{rest}")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_shards(index)
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is truncated or damaged ({error}); copy or download it again") from error


def check_config(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a model's config.json requires unsupported features or third-party code."""
    if method := settings.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ConfigError(
            f"its weights are quantized ({name}), and quantized weights cannot be trained; choose the unquantized model"
        )
    attention = settings.get("attn_implementation") or settings.get("_attn_implementation")
    if not isinstance(attention, str):
        return
    if "/" in attention:
        raise ConfigError(
            f"its config.json requests attention from the Hub ({attention}), which is third-party code and never run; "
            "remove attn_implementation from config.json"
        )
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    if package and find_spec(package) is None:
        raise ConfigError(
            f"its config.json requests attn_implementation={attention}, but the package {package} is not installed; "
            "install it, or remove attn_implementation from config.json"
        )


def _base_of_adapters(folder: Path) -> str | None:
    """The base model of the adapters in a folder without a model."""
    if (folder / "config.json").is_file():
        return None
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'adapter_config.json'} names no base model ({error!r}); correct it") from error


def _check_shards(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{index} is damaged ({error!r}); copy or download it again") from error
    if missing := sorted(shard for shard in shards if not (index.parent / shard).is_file()):
        raise ConfigError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:3])}"
        )


def check_weights(model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Check a loaded model against its files.

    Args:
        loading: the report of `from_pretrained` with `output_loading_info`.

    Raises:
        ConfigError: weights are missing from the files or not finite.
    """
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise ConfigError(
            f"its weight {name} has the shape {tuple(found)}, but config.json implies {tuple(expected)}; use the "
            "config.json that belongs to the weights"
        )
    if missing := sorted(loading["missing_keys"]):
        head = any("lm_head" in name or "embed_out" in name for name in missing)
        raise ConfigError(
            f"its files lack {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}), which would "
            "be initialised randomly; export the whole model (AutoModelForCausalLM, save_pretrained)"
            + (", or set tie_word_embeddings=true in config.json if its head is its embedding" if head else "")
        )
    for name, weight in model.named_parameters():
        # The sum costs no memory; elements are examined only if it is not finite.
        if not _whole(weight.detach().sum()).isfinite() and _whole((~weight.detach().isfinite()).sum()) > 0:
            raise ConfigError(f"its weight {name} has non-finite values; export or download the model again")


def _whole(value: Tensor) -> Tensor:
    """For a sharded weight, the result over all ranks, so that they reach the same conclusion."""
    return value.full_tensor() if isinstance(value, DTensor) else value
