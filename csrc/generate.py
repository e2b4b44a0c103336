"""Generates declaration.h from epo_kernels/declaration.py: `python generate.py declaration.py declaration.h`.

CMake runs it at every configuration, and again when the declaration changes. The header is rewritten only if its text
changes, to avoid unnecessary recompilation.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HEAD = """\
// Generated from epo_kernels/declaration.py by csrc/generate.py: change those, not this file.
#pragma once

namespace epo {
"""


def enum(name: str, choices: tuple[str, ...]) -> str:
    values = ", ".join(choice.replace("-", "_") for choice in choices)
    return f"enum class {name} : int {{ {values} }};\n"


def coefficients(names: tuple[str, ...]) -> str:
    """The struct of the runtime coefficients, and how it is read from an array."""
    values = ",\n            ".join(f"values[{i}]" for i in range(len(names)))
    members = "".join(f"    float {name};\n" for name in names)
    return (
        f"constexpr int kNumCoefficients = {len(names)};\n\nstruct Coefficients {{\n{members}}};\n\n"
        f"EPO_FN Coefficients read_coefficients(const float* values) {{\n    return {{{values}}};\n}}\n"
    )


def sums(names: tuple[str, ...]) -> str:
    """The index of each sum of a launch."""
    places = "".join(f"        {name},\n" for name in names)
    return f"constexpr int kNumSums = {len(names)};\n\nstruct RowSums {{\n    enum : int {{\n{places}    }};\n}};\n"


def names_of(declared: dict[str, tuple[str, ...]]) -> str:
    """Every name as a string: k<Key>Names, and a macro that applies another to each key."""
    lists = []
    for key, names in declared.items():
        lines = "".join(f'    "{name}",\n' for name in names)
        lists.append(f"constexpr const char* k{key}Names[] = {{\n{lines}}};\n")
    each = " ".join(f"DO({key})" for key in declared)
    return "\n".join((*lists, f"#define EPO_FOR_EACH_DECLARED(DO) {each}\n"))


def header(path: Path) -> str:
    declared = runpy.run_path(str(path))
    enums = (enum(name, choices) for name, choices in declared["CHOICES"].items())
    parts = (*enums, coefficients(declared["COEFFICIENTS"]), sums(declared["ROW_SUMS"]))
    return "\n".join((HEAD, *parts, names_of(declared["NATIVE_NAMES"]), "}  // namespace epo\n"))


def main(declaration: Path, out: Path) -> None:
    text = header(declaration)
    if not out.is_file() or out.read_text() != text:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
