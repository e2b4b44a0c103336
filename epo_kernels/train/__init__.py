"""The driver: `python -m epo_kernels.train`."""

from importlib.util import find_spec

# What the extra `train` installs, by the names they are imported under.
REQUIRED = ("transformers", "tokenizers", "safetensors", "omegaconf", "rich", "tensorboard", "jinja2")


def missing_packages() -> list[str]:
    """Those of REQUIRED that are not installed."""
    return [name for name in REQUIRED if find_spec(name) is None]
