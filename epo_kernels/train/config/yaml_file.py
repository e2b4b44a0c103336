"""Parses a YAML settings file, and records the line of every setting for error messages."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from epo_kernels.train.setting import ConfigError


@dataclass(frozen=True)
class Layer:
    """Settings from one source; later layers override earlier ones."""

    settings: DictConfig  # nested groups
    name: str  # file name; "" for the command line
    lines: dict[str, int]  # {"a.b": line number} of every key

    def where(self, setting: str) -> str:
        """The prefix of an error about this setting: file and line, or "" for the command line."""
        if not self.name:
            return ""
        line = self.lines.get(setting)
        return f"{self.name}, line {line}: " if line else f"{self.name}: "


def read_settings_file(path: str) -> Layer:
    """Read a YAML file in UTF-8, or in another Unicode encoding with a byte-order mark.

    Raises:
        ConfigError: the file cannot be read or is not a YAML mapping; the message names the line.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return parse_settings(_decode(data, path), path)


def parse_settings(text: str, name: str) -> Layer:
    """Parse the text of the file `name`. Raises ConfigError as `read_settings_file` does."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{name} must contain settings (key: value), got a {root.id}")
        lines = dict(_lines_of(root, name)) if root is not None else {}
        return Layer(cast(DictConfig, OmegaConf.create(text if lines else "{}")), name, lines)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}{_explain(error, text)}") from error


def _decode(data: bytes, name: str) -> str:
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n")
        line = data.split(b"\n")[number].strip()[:80].decode("utf-8", "backslashreplace")
        raise ConfigError(f"{name}, line {number + 1}: not UTF-8; save the file as UTF-8: {line}") from error
    if "\0" in text:
        raise ConfigError(f"{name}, line 1: UTF-16 without a byte-order mark, or not text; save the file as UTF-8")
    return text


def _lines_of(root: yaml.MappingNode, name: str) -> Iterator[tuple[str, int]]:
    """("a.b", line number) of every key. Raises ConfigError for a repeated key, or a key that is not text."""
    waiting, known = [("", root)], {id(root)}  # an alias repeats a node, possibly inside itself
    while waiting:
        prefix, mapping = waiting.pop()
        own: dict[str, int] = {}
        for key, value in mapping.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ConfigError(f"{name}, line {line}: {shown!r} cannot be the name of a setting; quote it if it is")
            if key.value in own:
                raise ConfigError(
                    f"{name}, line {line}: {prefix}{key.value} is given twice, first in line {own[key.value]}"
                )
            own[key.value] = line
            yield f"{prefix}{key.value}", line
            if isinstance(value, yaml.MappingNode) and id(value) not in known:
                known.add(id(value))
                waiting.append((f"{prefix}{key.value}.", value))


def _explain(error: Exception, text: str) -> str:
    """One line, ", line N: problem: the text of that line", from a multi-line YAML error."""
    lines = text.splitlines()
    if isinstance(error, yaml.reader.ReaderError):
        number = text[: error.position].count("\n")
        return f", line {number + 1}: character {error.character!r} is not allowed in YAML"
    if isinstance(error, GrammarParseError):
        number = next((number for number, line in enumerate(lines, 1) if not _is_readable(line)), 1)
        return f", line {number}: {str(error).splitlines()[0]}: {lines[number - 1].strip()[:80]!r}"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f" is not valid YAML: {str(error).strip().splitlines()[0]}"
    # An unclosed bracket or quote is only detected at the end of the file, but the mistake is where it opens.
    began_there = error.context_mark and re.search("flow|scanning", error.context or "")
    mark = error.context_mark if began_there else error.problem_mark
    if mark.line >= len(lines) and error.context_mark:
        mark = error.context_mark
    line = lines[mark.line] if mark.line < len(lines) else ""
    problem = error.problem
    if re.match(r" *\t", line) or "'\\t'" in str(problem):
        problem = "a tab; indent YAML with spaces"
    elif str(problem).startswith("but "):
        problem = f"{error.context}, {problem}"
    return f", line {mark.line + 1}: {problem}: {line.strip()[:80]!r}"


def _is_readable(line: str) -> bool:
    """Whether its ${...} interpolations are complete."""
    try:
        OmegaConf.create([line])
    except GrammarParseError:
        return False
    return True
