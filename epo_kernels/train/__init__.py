"""The driver: `python -m epo_kernels.train`."""

from importlib.util import find_spec

# Import names of the packages that the extra `train` installs.
REQUIRED = ("transformers", "tokenizers", "safetensors", "omegaconf", "rich", "tensorboard", "jinja2")


def missing_packages() -> list[str]:
    """The packages of REQUIRED that are not installed."""
    return [name for name in REQUIRED if find_spec(name) is None]
