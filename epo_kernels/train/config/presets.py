"""The presets shipped with the package."""

from importlib.resources import files
from pathlib import Path


def preset_names() -> list[str]:
    folder = files("epo_kernels.train") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The preset's YAML; the first line is a comment with its title."""
    return (files("epo_kernels.train") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
