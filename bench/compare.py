"""Compares two results.json and reports changes beyond their noise: `make bench-compare BASE=path`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import gate
from bench.records import RESULTS, Record, read
from bench.report import markdown_table

# Two runs of the same code can differ by this much even if the rounds of each agree, due to clocks and addresses.
SMALLEST_CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    case: str
    impl: str
    before_ms: float | None
    after_ms: float | None
    verdict: str  # faster | slower | same | new | gone | the gate's message if it changed

    @property
    def bad(self) -> bool:
        """Whether this library regressed."""
        return self.impl.startswith("ours") and self.verdict not in ("faster", "same", "new", "passes now")


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """One change per case and implementation, including ceilings, which show whether the machine itself changed."""
    old, new = {record.key: record for record in before}, {record.key: record for record in after}
    changes = []
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        medians = (was.median_ms if was else None, now.median_ms if now else None)
        changes.append(Change(*key, *medians, verdict(was, now)))
    return changes


def verdict(was: Record | None, now: Record | None) -> str:
    """Times differ if the quartile ranges do not overlap and the medians differ by more than 3 %."""
    if was is None:
        return "new"
    if now is None:
        return "gone"
    if was.gate != now.gate:
        return "passes now" if now.gate == gate.PASS else now.gate
    if was.median_ms is None or now.median_ms is None or was.spread_ms is None or now.spread_ms is None:
        return "same"
    if abs(now.median_ms / was.median_ms - 1.0) <= SMALLEST_CHANGE:
        return "same"
    if now.spread_ms[0] > was.spread_ms[1]:
        return "slower"
    return "faster" if now.spread_ms[1] < was.spread_ms[0] else "same"


def table(changes: Sequence[Change]) -> str:
    rows = []
    for change in changes:
        ratio = None
        if change.before_ms and change.after_ms:
            ratio = f"{change.after_ms / change.before_ms - 1.0:+.1%}"
        rows.append([change.case, change.impl, change.before_ms, change.after_ms, ratio, change.verdict])
    return markdown_table(["case", "implementation", "before ms", "after ms", "change", "verdict"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if this library became slower, fails its gate or is gone."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", type=Path, help="older results.json, or its folder")
    parser.add_argument("new", type=Path, nargs="?", help="newer one (default: the same machine's in bench/results)")
    options = parser.parse_args(arguments)
    machine, before = read(_file(options.base))
    other, after = read(_file(options.new or RESULTS / machine.folder))
    if not machine.comparable(other):
        print(f"The machine or the versions differ, so differences may not be the code's:\n  {machine}\n  {other}\n")
    changes = compare(before, after)
    changed = [change for change in changes if change.verdict != "same"]
    print(f"{len(changes) - len(changed)} of {len(changes)} figures are the same within their noise.")
    if changed:
        print(table(changed))
    return int(any(change.bad for change in changed))


def _file(path: Path) -> Path:
    return path / "results.json" if path.is_dir() else path


if __name__ == "__main__":
    sys.exit(main())
