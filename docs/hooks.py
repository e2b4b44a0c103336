"""Fills generated parts of pages when mkdocs builds them: the table of settings, and links out of docs/."""

import re
from collections.abc import Iterator
from typing import Any

from epo_kernels.train.config.groups import TrainConfig
from epo_kernels.train.config.tree import yaml_value
from epo_kernels.train.setting import members


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "configuration.md":
        return markdown.replace("<!-- settings -->", "\n".join(settings_tables(TrainConfig, "")))
    return markdown


def settings_tables(settings: type, prefix: str) -> Iterator[str]:
    """A section with a table for each group: setting, default, meaning."""
    own = list(members(settings))
    if rows := [member for member in own if not member.is_group]:
        yield f"\n## {prefix.removesuffix('.') or 'the run'}\n\n{(settings.__doc__ or '').splitlines()[0]}\n"
        yield "| setting | default | meaning |\n| --- | --- | --- |"
        for member in rows:
            choices = " · ".join(f"`{choice}`" for choice in member.rule.choices) if member.rule else ""
            meaning = f"{member.help}{': ' if choices else ''}{choices}"
            yield f"| `{prefix}{member.name}` | `{yaml_value(member.default)}` | {_escaped(meaning)} |"
    for member in own:
        if member.is_group:
            yield from settings_tables(member.type, f"{prefix}{member.name}.")


def _escaped(text: str) -> str:
    return re.sub(r"([|<*_])", r"\\\1", text)
