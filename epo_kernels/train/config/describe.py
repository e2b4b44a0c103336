"""Settings and presets as shown by `--help`, and the error for an option that does not exist."""

from collections.abc import Iterator, Sequence
from typing import Any

from epo_kernels.train.config.environment import known_settings, schema_of
from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.presets import preset_names, preset_text
from epo_kernels.train.config.tree import yaml_value
from epo_kernels.train.envs.registry import BUILT_IN, suite_class
from epo_kernels.train.setting import closest, members

_COLUMN = 46


def describe_settings(environment: str | None = None) -> str:
    """Every setting with its default and help text, by group.

    Args:
        environment: the environment whose options and panels to show; None: all built-in ones.

    Raises:
        ValueError, ImportError: there is no such environment, or it cannot be imported.
    """
    if environment is not None:
        return "\n".join(_describe(schema_of(suite_class(environment))))
    lines = list(_describe(TrainConfig))
    for name in sorted(BUILT_IN):
        options = suite_class(name).Options
        title = f"env.options: with env.name={name}. {(options.__doc__ or '').splitlines()[0]}"
        lines += ["", title, *_describe(options, "env.options.")]
    return "\n".join(lines)


def preset_titles() -> dict[str, str]:
    """{name: title}; the title is the preset's first comment."""
    return {name: preset_text(name).splitlines()[0].removeprefix("# ") for name in preset_names()}


def option_as_setting(option: str, following: Sequence[str]) -> str:
    """The error for an option that does not exist, such as --steps 5, with the setting that was probably meant."""
    given, equals, value = option.lstrip("-").partition("=")
    given, known = given.replace("-", "_"), known_settings()
    if group := [name for name in known if name.startswith(f"{given}.")]:
        return f"unknown option {option}; {given} is a group of settings, written GROUP.KEY=VALUE: {', '.join(group)}"
    name = given if given in known else closest(given, known)
    if name is None:
        return (
            f"unknown option {option}; the options are --print-config, --dry-run, --plan and --help, and settings are "
            "written GROUP.KEY=VALUE"
        )
    if not equals:
        value = following[0] if following and "=" not in following[0] and following[0][:2] != "--" else "VALUE"
    return f"unknown option {option}; settings are written without dashes and spaces: {name}={value}"


def _describe(settings: type, prefix: str = "") -> Iterator[str]:
    for member in members(settings):
        name = f"{prefix}{member.name}"
        if member.is_group:
            yield ""
            yield f"{name}: {member.help}"
            yield from _describe(member.type, f"{name}.")
            continue
        if member.type is Any:  # env.options without a chosen environment
            continue
        choices = f" ({' | '.join(member.rule.choices)})" if member.rule and member.rule.choices else ""
        yield f"  {name}={yaml_value(member.default)} ".ljust(_COLUMN) + member.help + choices
