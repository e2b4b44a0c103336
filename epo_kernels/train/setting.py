"""Declares settings: a dataclass field with its help text, the accepted values, and whether a resume may change it.

A group of settings is a dataclass whose fields are created with `setting` and `group`. It may define `check()` for
conditions between its own settings, which raises ConfigError with the full name of a setting ("loss.band_low") first.
Everything else (`--help`, unknown names, ranges) follows from the declaration.
"""

import copy
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal

# Whether a resumed run may change the setting. "fixed": no. "rounding": yes, with a warning; it changes batching or
# summation order, so the same draws are rounded differently. "free": yes; it does not affect any result.
Resume = Literal["fixed", "rounding", "free"]


class ConfigError(ValueError):
    """The configuration is invalid. The message is one line: where, what was expected, what was given."""


@dataclass(frozen=True)
class Rule:
    """The values that a setting accepts.

    Attributes:
        allows: whether it accepts a value; called with each element of a list. Never called with None.
    """

    text: str  # what the value must be, completes "must be ..."
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()  # all accepted values, if they can be listed


def at_least(minimum: float) -> Rule:
    return Rule(f"at least {minimum:g}", lambda value: value >= minimum)


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


FINITE = Rule("finite", math.isfinite)
NOT_NEGATIVE = Rule("finite and at least 0", lambda value: 0 <= value < math.inf)
POSITIVE = Rule("positive and finite", lambda value: 0 < value < math.inf)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_ONE = Rule("in [0, 1)", lambda value: 0 <= value < 1)


def setting(default: Any, text: str, rule: Rule | None = None, *, resume: Resume | None = None) -> Any:
    """A field of a settings dataclass.

    Args:
        default: lists and dicts are copied for every instance.
        text: one line for `--help`, without the choices of `rule`, which are appended.
        rule: accepted values beyond the type.
        resume: whether a resumed run may change it; None: as declared by the group ("fixed" by default).
    """
    metadata = {"help": text, "rule": rule, "resume": resume}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(settings: type, *, resume: Resume | None = None) -> Any:
    """A field that contains a group of settings; `resume` applies to its settings without their own `resume`."""
    return field(default_factory=settings, metadata={"resume": resume})


@dataclass(frozen=True)
class Member:
    """A field of a settings dataclass: a setting, or a group of them."""

    name: str  # without the names of the groups around it
    type: Any  # resolved; a dataclass for a group
    default: Any  # its value in a new instance
    help: str  # the text of a setting, the first line of a group's docstring
    rule: Rule | None  # see `setting`
    resume: Resume | None  # None: decided by the group around it

    @property
    def is_group(self) -> bool:
        return is_dataclass(self.type)


def members(settings: type) -> Iterator[Member]:
    """The fields of a settings dataclass, in order."""
    types = typing.get_type_hints(settings)
    for one in fields(settings):
        kind = types[one.name]
        text = (kind.__doc__ or "").splitlines()[0] if is_dataclass(kind) else one.metadata.get("help", "")
        default = one.default if one.default_factory is MISSING else one.default_factory()
        yield Member(one.name, kind, default, text, one.metadata.get("rule"), one.metadata.get("resume"))


def check_settings(settings: Any, prefix: str = "") -> None:
    """Check every setting against its rule, then every group by its own `check`, inner groups first.

    Args:
        settings: an instance of a settings dataclass.
        prefix: the names of the groups around it, such as "env.options.".

    Raises:
        ConfigError: the message begins with the name of the setting.
    """
    for member in members(type(settings)):
        name, value = f"{prefix}{member.name}", getattr(settings, member.name)
        if member.is_group:
            check_settings(value, f"{name}.")
        elif member.rule is not None and value is not None:
            for part in value if isinstance(value, list) else [value]:
                check_value(name, part, member.rule, is_optional=type(None) in typing.get_args(member.type))
    if hasattr(settings, "check"):
        settings.check()


def check_value(name: str, value: Any, rule: Rule, is_optional: bool = False) -> None:
    """Raise ConfigError if the rule does not allow the value of the setting `name`."""
    if not rule.allows(value):
        hint = suggest(value, rule.choices) if rule.choices else ""
        raise ConfigError(f"{name} must be {rule.text}{' or null' if is_optional else ''}, got {value!r}{hint}")


def require(condition: bool, otherwise: str) -> None:
    """Raise ConfigError with the message `otherwise` unless the condition holds."""
    if not condition:
        raise ConfigError(otherwise)


def suggest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" with the most similar known name, or "" if there is none."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def closest(name: str, known: Sequence[str]) -> str | None:
    """The most similar known name, if necessary by its last word: the right setting in the wrong group."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [ends[end] for end in get_close_matches(name.rsplit(".", 1)[-1], list(ends), n=1, cutoff=0.7)]
    return close[0] if close else None
