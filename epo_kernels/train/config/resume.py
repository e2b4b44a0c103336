"""What differs between the settings of a saved run and those it is resumed with, and what may."""

from typing import Any

from omegaconf import OmegaConf

from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.tree import flatten, flatten_tree
from epo_kernels.train.setting import Resume, members


def read_settings(saved: str, schema: type[TrainConfig] = TrainConfig) -> dict[str, Any]:
    """{"a.b": value} of a saved config.yaml; a setting that it lacks has its default, if `schema` declares one."""
    return flatten(schema()) | flatten_tree(OmegaConf.to_container(OmegaConf.create(saved)))


def differences(saved: str, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a saved config.yaml, {"a.b": (saved, now)}, except those declared resume="free".

    A setting that is newer than the file had its default. `schedule_steps` is compared by its effective value.
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
    """By its own declaration or the innermost group's that has one; a name that is unknown now follows its group."""
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
