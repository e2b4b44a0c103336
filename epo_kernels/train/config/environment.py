"""How the settings depend on the environment, which declares `env.options` and the panels of `evaluate.panels`."""

from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from epo_kernels.train.config.groups import EvaluateConfig, TrainConfig
from epo_kernels.train.config.tree import all_settings
from epo_kernels.train.config.yaml_file import Layer
from epo_kernels.train.envs import EnvConfig, Suite
from epo_kernels.train.envs.registry import BUILT_IN, suite_class
from epo_kernels.train.setting import group, members, one_of, setting


@cache
def schema_of(suite: type[Suite]) -> type[TrainConfig]:
    """TrainConfig with the options and panels of a suite."""
    panels = next(member for member in members(EvaluateConfig) if member.name == "panels")
    declared = setting([suite.panels[0]], panels.help, one_of(*suite.panels), resume=panels.resume)
    env = _derived(EnvConfig, options=(suite.Options, group(suite.Options)))
    evaluate = _derived(EvaluateConfig, panels=(panels.type, declared))
    return _derived(TrainConfig, env=(env, group(env)), evaluate=(evaluate, group(evaluate, resume="free")))


def _derived(settings: type, **replaced: Any) -> type:
    """The settings dataclass with some fields, (type, field), replaced."""
    members = [(name, *declared) for name, declared in replaced.items()]
    return make_dataclass(settings.__name__, members, bases=(settings,), namespace={"__doc__": settings.__doc__})


def choose_environment(layers: Sequence[Layer]) -> str:
    """The value of `env.name`; drops options that a preset or file sets for another environment.

    Raises:
        OmegaConfBaseException: the name is an interpolation that cannot be resolved.
    """
    names = [_name_in(layer) for layer in layers]
    chosen = next((name for name in reversed(names) if name is not None), EnvConfig.name)
    named = None
    for layer, name in zip(layers, names, strict=True):
        named = name or named
        if layer.name and named not in (None, chosen) and "options" in layer.settings.get("env", {}):
            del layer.settings.env["options"]
    return chosen


def _name_in(layer: Layer) -> str | None:
    """None if the layer has no text there; any other value is rejected when its settings are checked."""
    env = layer.settings.get("env")
    name = OmegaConf.select(env, "name") if OmegaConf.is_dict(env) else None
    return name if isinstance(name, str) else None


def known_settings() -> list[str]:
    """ "a.b" of every setting, with the options of all built-in environments."""
    schemas = [schema_of(suite_class(name)) for name in sorted(BUILT_IN)]
    return list(dict.fromkeys(name for schema in schemas for name in all_settings(schema)))
