"""Compares the settings of a saved run with those of its resumption, and says which may differ."""

from typing import Any

from omegaconf import OmegaConf

from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.tree import flatten, flatten_tree
from epo_kernels.train.setting import Resume, members


def read_settings(saved: str, schema: type[TrainConfig] = TrainConfig) -> dict[str, Any]:
    """{"a.b": value} of a saved config.yaml; missing settings get the default declared in `schema`, if any."""
    return flatten(schema()) | flatten_tree(OmegaConf.to_container(OmegaConf.create(saved)))


def differences(saved: str, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a saved config.yaml, {"a.b": (saved, now)}, except those declared resume="free".

    Settings newer than the file count as having their default. `schedule_steps` is compared by its effective value.
    """
    before, now = read_settings(saved, type(config)), flatten(config)
    for settings in (before, now):
        settings["schedule_steps"] = settings["schedule_steps"] or settings["steps"]
    return {
        name: (before[name], now.get(name))
        for name in before
        if _resume_of(name, type(config)) != "free" and before[name] != now.get(name)
    }


def only_rounding(changed: dict[str, tuple[Any, Any]], schema: type[TrainConfig] = TrainConfig) -> bool:
    """Whether all of these are declared resume="rounding" in `schema`."""
    return all(_resume_of(name, schema) == "rounding" for name in changed)


def is_among(name: str, listed: tuple[str, ...]) -> bool:
    """Whether the setting, or a group that contains it, is listed."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in listed)


def _resume_of(name: str, schema: type[TrainConfig]) -> Resume:
    """The setting's own `resume`, or that of the innermost group that has one; unknown names follow their group."""
    settings: Any = schema
    resume: Resume = "fixed"
    for part in name.split("."):
        member = next((one for one in members(settings) if one.name == part), None)
        if member is None:
            break
        resume = member.resume or resume
        if not member.is_group:
            break
        settings = member.type
    return resume
