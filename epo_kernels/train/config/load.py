"""Reads and merges settings from the defaults, a preset, YAML files and the command line."""

import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epo_kernels.train.config.environment import choose_environment, known_settings, schema_of
from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.presets import preset_names, preset_text
from epo_kernels.train.config.tree import all_settings, flatten_tree, yaml_value
from epo_kernels.train.config.yaml_file import Layer, parse_settings, read_settings_file
from epo_kernels.train.envs.registry import suite_class
from epo_kernels.train.setting import (
    ConfigError,
    Member,
    check_settings,
    check_value,
    closest,
    members,
    one_of,
    suggest,
)


def load_config(source: str | Sequence[str] | None, overrides: Sequence[str]) -> TrainConfig:
    """Merge the defaults, the preset and YAML files in `source`, then `overrides`, and check the result.

    A leading ~ in a text setting is expanded to the home folder.

    Args:
        source: preset names and files; at most one preset, which a file may name too (`preset: quickstart`).
        overrides: "a.b=c" each.

    Raises:
        ConfigError: an unknown setting or preset, a wrong type, a value out of range, or conflicting settings.
    """
    sources = [source] if isinstance(source, str) else list(source or ())
    layers = [*_read_sources(sources), *map(_read_override, overrides)]
    config = _merge(layers)
    _expand_home(config)
    try:
        check_settings(config)
    except ConfigError as error:
        named = [word.strip(".") for word in re.findall(r"[\w.]+", str(error))]
        given = next((name for name in named if any(name in layer.lines for layer in layers)), "")
        raise ConfigError(f"{_place_of(given, layers)}{error}") from error
    return config


def _merge(layers: Sequence[Layer]) -> TrainConfig:
    schema = _schema_for(layers)
    known = list(all_settings(schema))
    merged: Any = OmegaConf.structured(schema)
    for layer in layers:
        _check_names(OmegaConf.to_container(layer.settings), schema, layer, known)
        try:
            merged = OmegaConf.merge(merged, layer.settings)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise _setting_error(error, [layer]) from error
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _setting_error(error, layers) from error
    return config


def _schema_for(layers: Sequence[Layer]) -> type[TrainConfig]:
    """The settings of the environment named in the layers."""
    try:
        return schema_of(suite_class(choose_environment(layers)))
    except OmegaConfBaseException as error:
        raise _setting_error(error, layers) from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{_place_of('env.name', layers)}{error}") from error


def _read_sources(sources: list[str]) -> list[Layer]:
    """The preset, then the files."""
    layers, asked = [], {}  # {preset: where it is named}
    for source in sources:
        if source.endswith((".yaml", ".yml")):
            layers.append(layer := read_settings_file(source))
            if (preset := _preset_of(layer)) is not None:
                asked[preset] = source
        elif source in preset_names():
            asked[source] = "the command line"
        else:
            raise ConfigError(_unknown_source(source))
    if len(asked) > 1:
        named = " and ".join(f"{preset} ({by})" for preset, by in asked.items())
        raise ConfigError(f"a run starts from one preset, got {named}; remove all but one")
    return [*(parse_settings(preset_text(preset), preset) for preset in asked), *layers]


def _preset_of(layer: Layer) -> str | None:
    """The preset that a file names; removed from its settings."""
    try:
        preset = layer.settings.pop("preset", None)
    except OmegaConfBaseException as error:
        raise _setting_error(error, [layer]) from error
    if preset is None:
        return None
    check_value(f"{layer.where('preset')}preset", str(preset), one_of(*preset_names()))
    return str(preset)


def _unknown_source(word: str) -> str:
    if word in known_settings():
        return f"{word} is a setting; write {word}=VALUE, without spaces"
    names = preset_names()
    return (
        f"no preset {word!r}{suggest(word, names)}; the presets are {', '.join(names)}. Name one of them, a FILE.yaml, "
        "or settings as GROUP.KEY=VALUE"
    )


def _read_override(override: str) -> Layer:
    name, equals, _ = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"{override!r} is not a setting; settings are written GROUP.KEY=VALUE, such as steps=10, without spaces"
        )
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        return Layer(OmegaConf.create(settings), "", dict.fromkeys(flatten_tree(settings), 1))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{override!r} cannot be parsed: {_first_line(error)}") from error


def _check_names(given: Any, settings: type, layer: Layer, known: list[str], prefix: str = "") -> None:
    """Check the names in a layer against a settings dataclass, and reject values that OmegaConf converts silently.

    `known` are the full names of all settings, used for suggestions.
    """
    declared = {member.name: member for member in members(settings)}
    for name, value in given.items():
        full = f"{prefix}{name}"
        member = declared.get(name)
        if member is None:
            raise ConfigError(layer.where(full) + _unknown_name(full, known, in_file=bool(layer.name)))
        if member.is_group and isinstance(value, dict):
            _check_names(value, member.type, layer, known, f"{full}.")
        elif member.is_group:
            parts = ", ".join(part.name for part in members(member.type))
            got = "nothing: indent them under it" if value is None else f"the value {yaml_value(value)}"
            raise ConfigError(f"{layer.where(full)}{full} is a group of settings ({parts}), got {got}")
        elif get_origin(member.type) is not dict:
            _check_type(full, value, member, layer)


def _unknown_name(full: str, known: list[str], in_file: bool) -> str:
    if any(f"{name}.".startswith(f"{full}.") for name in known):  # the dots are part of the key
        return f"{full} is a single key here, but YAML nests groups: write {_nested(full)}"
    close = closest(full, known)
    written = f" In a file: {_nested(close)}" if in_file and close and close.count(".") > full.count(".") else ""
    return f"unknown setting {full!r}{suggest(full, known)}{written}"


def _nested(full: str) -> str:
    """a.b in YAML: a: {b: ...}."""
    *groups, last = full.split(".")
    return "".join(f"{group}: {{" for group in groups) + f"{last}: ..." + "}" * len(groups)


def _check_type(full: str, value: Any, member: Member, layer: Layer) -> None:
    """Reject values that OmegaConf would convert to text, or whose error would use OmegaConf's own terms."""
    if isinstance(value, dict):
        raise ConfigError(
            f"{layer.where(full)}{full} is a setting, not a group: it has no {', '.join(map(repr, value))}"
        )
    parts = value if isinstance(value, list) else [value]
    if str in (member.type, *get_args(member.type)) and any(isinstance(part, bool) for part in parts):
        wanted = member.rule.text if member.rule else "text, quoted if necessary"
        raise ConfigError(
            f"{layer.where(full)}{full} must be {wanted}, got {yaml_value(value)} (YAML reads on, off, yes and no as "
            "true and false)"
        )


def _setting_error(error: Exception, layers: Sequence[Layer]) -> ConfigError:
    """OmegaConf's error about one setting, prefixed with the place where the setting was last given."""
    name = getattr(error, "full_key", None) or ""
    reason = _first_line(error)
    if unset := re.search("Environment variable '(.+?)' not found", reason):
        variable = unset.group(1)
        reason = f"the environment variable {variable} is not set; set it, or write ${{oc.env:{variable},DEFAULT}}"
    elif "Incompatible value 'None'" in reason:
        reason = "must have a value, got null (as YAML reads ~ and an empty value)"
    return ConfigError(f"{_place_of(name, layers)}{name}: {reason}" if name else reason)


def _place_of(name: str, layers: Sequence[Layer]) -> str:
    """The place where the setting was last given."""
    return next((layer.where(name) for layer in reversed(layers) if name in layer.lines), "")


def _expand_home(settings: Any, prefix: str = "") -> None:
    """Replace a leading ~ in every text setting, in place."""
    for name, value in ((one.name, getattr(settings, one.name)) for one in fields(settings)):
        if is_dataclass(value):
            _expand_home(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith("~"):
            expanded = os.path.expanduser(value)
            if "/" in value and expanded == value:
                user = value.split("/")[0]
                raise ConfigError(f"{prefix}{name}={value}: {user} has no home folder; write the whole path")
            setattr(settings, name, expanded)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
