"""Settings and presets as `--help` shows them, and the answer to an option that does not exist."""

from collections.abc import Iterator, Sequence

from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.presets import preset_names, preset_text
from epo_kernels.train.config.tree import all_settings, yaml_value
from epo_kernels.train.setting import closest, members

_COLUMN = 46


def describe_settings() -> str:
    """Every setting with its default and help text, by group."""
    return "\n".join(_describe(TrainConfig))


def preset_titles() -> dict[str, str]:
    """{name: title}, the title being the preset's first comment."""
    return {name: preset_text(name).splitlines()[0].removeprefix("# ") for name in preset_names()}


def option_as_setting(option: str, following: Sequence[str]) -> str:
    """The error for an option that does not exist, such as --steps 5: how to write the setting that is meant.

    Args:
        option: with its dashes.
        following: the next word of the command line, if there is one.
    """
    given, equals, value = option.lstrip("-").partition("=")
    given, known = given.replace("-", "_"), list(all_settings())
    if group := [name for name in known if name.startswith(f"{given}.")]:
        return f"unknown option {option}; {given} is a group of settings, written GROUP.KEY=VALUE: {', '.join(group)}"
    name = given if given in known else closest(given, known)
    if name is None:
        return (
            f"unknown option {option}; the options are --print-config, --dry-run and --help, and settings are written "
            "GROUP.KEY=VALUE"
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
        choices = f" ({' | '.join(member.rule.choices)})" if member.rule and member.rule.choices else ""
        yield f"  {name}={yaml_value(member.default)} ".ljust(_COLUMN) + member.help + choices
