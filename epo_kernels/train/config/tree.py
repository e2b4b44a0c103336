"""Settings as a tree and as flat names: {"a": {"b": value}}, {"a.b": value}, YAML."""

import math
from functools import cache
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf

from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.setting import Member, members


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: TrainConfig) -> dict[str, Any]:
    """{"a.b": value}; lists are leaves, and so are settings that are mappings themselves."""
    return flatten_tree(OmegaConf.to_container(OmegaConf.structured(config)))


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Like `flatten`, for settings as nested dicts, which may contain unknown names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        known = all_settings().get(f"{prefix}{name}")
        if isinstance(value, dict) and not (known and get_origin(known.type) is dict):
            flat |= flatten_tree(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def all_settings(schema: type = TrainConfig) -> dict[str, Member]:
    """{"a.b": its declaration} of every setting, without the groups."""
    return _all_settings(schema)


def yaml_value(value: Any) -> str:
    """A value as written in YAML and on the command line: true, null, [a, b]."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


@cache
def _all_settings(schema: type) -> dict[str, Member]:
    return dict(_walk(schema))


def _walk(settings: type, prefix: str = "") -> Any:
    for member in members(settings):
        if member.is_group:
            yield from _walk(member.type, f"{prefix}{member.name}.")
        else:
            yield f"{prefix}{member.name}", member
