"""Translates CUDA sources into C++: `python translate.py csrc out` writes every .cu and .cuh of csrc into out.

Three constructs are not C++ and become calls of the emulator; its headers in include/ do the rest:

    kernel<<<grid, block, shared, stream>>>(argument)    emulator::launch(kernel, grid, block, shared, stream)(argument)
    __shared__ float a[8], b;                            references into the running block's memory
    asm volatile("text" : outputs : inputs : clobbers)   emulator::ptx(site, operands, count), and a row of kSites

Lines keep their numbers, and #line names the original, so faults point into csrc.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]+>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
SHARED = re.compile(r"(extern\s+)?__shared__\s+(?:__align__\(\d+\)\s+)?(\w+)\s+([^;]+);")
ASM = re.compile(r"\basm\s+volatile\s*\(|\basm\s*\(")
OPERAND = re.compile(r'"([=+]?)([rlfn])"\s*\((.*)\)$', re.DOTALL)


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one before start; those in string literals don't count."""
    depth, i = 1, start
    while depth:
        if text[i] == '"':
            i = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, i).end()
            continue
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
    return i - 1


def split(text: str, separator: str) -> list[str]:
    """Parts between separators outside parentheses, brackets, braces and string literals."""
    parts, depth, last = [], 0, 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()\[\]{}:,]', text):
        token = match[0]
        depth += (token in "([{") - (token in ")]}")
        if token == separator and depth == 0:
            parts.append(text[last : match.start()])
            last = match.end()
    return [part.strip() for part in (*parts, text[last:])]


def replace_calls(text: str, opening: re.Pattern, make: Callable[[re.Match, str], str]) -> str:
    """Replaces what each match of `opening` begins and its parenthesis ends; make(match, inside the parentheses)."""
    out, at = [], 0
    for match in opening.finditer(text):
        if "//" in text[text.rfind("\n", 0, match.start()) + 1 : match.start()]:
            continue
        end = closing(text, match.end())
        lines = text.count("\n", match.start(), end)
        out += [text[at : match.start()], make(match, text[match.end() : end]).replace("\n", " "), "\n" * lines]
        at = end + 1
    return "".join((*out, text[at:]))


class Translator:
    def __init__(self) -> None:
        self.sites: list[str] = []
        self.variables = 0

    def file(self, path: Path) -> str:
        text = path.read_text()
        text = replace_calls(text, ASM, lambda match, inside: self._asm(path, text, match, inside))
        text = replace_calls(
            text, LAUNCH, lambda match, inside: f"::emulator::launch({match[1]}, {match[2]})({inside})"
        )
        return f'#line 1 "{path}"\n' + SHARED.sub(self._shared, text)

    def _asm(self, path: Path, text: str, match: re.Match, inside: str) -> str:
        template, outputs, inputs, clobbers = (*split(inside, ":"), "", "", "")[:4]
        operands = []
        for part in filter(None, (*split(outputs, ","), *split(inputs, ","))):
            direction, kind, value = OPERAND.match(part).groups()
            if direction == "+":
                raise ValueError(f"{path}: operands both read and written are not modelled: {part}")
            operands.append(f"::emulator::{'result' if direction else 'value'}_{kind}({value})")
        line = text.count("\n", 0, match.start()) + 1
        self.sites.append(f'{{{template}, {int("memory" in clobbers)}, "{path}", {line}}}')
        array = f"::emulator::Operand operands_[] = {{{', '.join(operands)}}}; " if operands else ""
        call = f"::emulator::ptx({len(self.sites) - 1}, {'operands_' if operands else 'nullptr'}, {len(operands)});"
        return f"do {{ {array}{call} }} while (0)"

    def _shared(self, match: re.Match) -> str:
        extern, kind, names = match.groups()
        return " ".join(self._variables(extern, kind, names))

    def _variables(self, extern: str | None, kind: str, names: str) -> Iterator[str]:
        for name, dimension in re.findall(r"(\w+)((?:\[[^\]]*\])?)(?:,|$)", re.sub(r"\s*,\s*", ",", names)):
            if extern:
                yield f"{kind}* const {name} = static_cast<{kind}*>(::emulator::dynamic_shared());"
                continue
            self.variables += 1
            declared = f"{kind} (&{name}){dimension}" if dimension else f"{kind}& {name}"
            yield f"{declared} = ::emulator::shared_variable<{kind}{dimension}>({self.variables});"


def main(source: Path, out: Path) -> None:
    translator = Translator()
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((*source.glob("*.cu"), *source.glob("*.cuh"), *source.glob("*.h"))):
        if path.suffix == ".h" and not ASM.search(path.read_text()):
            continue  # found in csrc itself
        name = path.name.replace(".cu", ".cpp") if path.suffix == ".cu" else path.name
        (out / name).write_text(translator.file(path))
    rows = ",\n    ".join(translator.sites)
    (out / "ptx_sites.cpp").write_text(
        f'#include "ptx.h"\nnamespace emulator {{\nconst Site kSites[] = {{\n    {rows}}};\n'
        f"const int kSiteCount = {len(translator.sites)};\n}}  // namespace emulator\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
