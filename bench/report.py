"""From results.json to Markdown, plots, docs/performance.md and the README: `python -m bench.report --help`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.cases import POLICIES, SUITES
from bench.implementations import COMPILED, EAGER
from bench.records import RESULTS, Machine, Record, merged, read, write

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- performance: begin (python -m bench.report --pages) -->", "<!-- performance: end -->"

_NOTHING_YET = (
    "No figures are committed yet. `make bench` (CPU) and `make bench-gpu` measure and write "
    "`bench/results/<machine>/results.json`; `python -m bench.report --pages` inserts them here."
)
_HOW_TO_RERUN = (
    "`make bench` and `make bench-gpu` repeat the measurements; `make bench-compare BASE=an/older/results.json` "
    "reports changes beyond the noise."
)
_HOW_TO_READ = (
    "Forward and backward of the whole loss (score cases: log-prob and entropy without gradients). Each figure is the "
    "median of interleaved rounds with cold caches, measured only after the results passed the gate against float64. "
    "The floor is the time of a copy and of the bare matrix products, measured in the same run, for the case's minimum "
    "bytes and operations. Most peers compute less than the whole loss; the full tables list each one's outputs, "
    "spread, memory and launches."
)
_HOW_TO_READ_POLICIES = (
    "Time of each policy loss relative to `ppo`, measured in the same interleaved rounds: medians, with quartiles in "
    "parentheses (`ppo`: of its own rounds, which shows the noise). Losses of a token alone take one pass. `gspo`, "
    "`vespo` and `gmpo` need a statistic of the sequence before the first gradient: two passes over logits, and from "
    "hidden states 8·N·D·V operations where the others take 6·N·D·V, a ratio of 1.33."
)
Cell = str | float | int | None


def cases_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.case, []).append(record)
    return grouped


def fastest(records: Iterable[Record]) -> Record | None:
    timed = [record for record in records if record.median_ms is not None]
    return min(timed, key=lambda record: record.median_ms or math.inf, default=None)


def without_policies(records: Iterable[Record]) -> list[Record]:
    """All but the cases in which policy losses are compared with each other."""
    return [record for record in records if not record.case.endswith(f"/{POLICIES}")]


def is_peer(record: Record) -> bool:
    return not (record.ours or record.ceiling or record.impl in (EAGER, COMPILED))


def number(value: float | None, digits: int = 3) -> str:
    """Rounded to significant digits, without exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    def line(cells: Iterable[Cell]) -> str:
        shown = (number(cell) if isinstance(cell, float) or cell is None else str(cell) for cell in cells)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in shown) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def provenance(machine: Machine, records: Sequence[Record]) -> str:
    """Machine, versions, dates and commits in one sentence."""
    dates = sorted({record.date[:10] for record in records})
    commits = sorted({record.commit for record in records})
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    threads = f", {machine.threads} threads" if machine.device_type == "cpu" else f", driver {machine.driver}"
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{machine.machine} ({machine.system}{threads}; {versions}), {when}, commit {', '.join(commits)}."


def full_report(machine: Machine, records: Sequence[Record]) -> str:
    """Every record, one table per case."""
    parts = ["# Performance", provenance(machine, records), _HOW_TO_READ]
    for case, own in cases_of(records).items():
        parts += [f"## {case}", _work(own), _case_table(own)]
    if missing := _not_measured(machine, records):
        parts += ["## Not measured", "\n".join(f"- {case}" for case in missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _work(records: Sequence[Record]) -> str:
    first = next((record for record in records if not record.ceiling), records[0])
    if first.bytes is None or first.floor_ms is None:
        return ""
    flops = f", {first.flops / 1e12:.3g} TFLOP" if first.flops else ""
    return f"Floor {number(first.floor_ms)} ms: {first.bytes / 1e9:.3g} GB{flops}. Commit {first.commit}."


def _case_table(records: Sequence[Record]) -> str:
    header = ["", "median ms", "quartiles", "× floor", "× ours", "peak MB", "launches", "host ms", "gate", "computes"]
    rows = []
    for record in records:
        spread = "–" if record.spread_ms is None else " – ".join(number(value) for value in record.spread_ms)
        phases = ", ".join(f"{name} {number(value)}" for name, value in (record.phases_ms or {}).items())
        computes = f"{record.computes}: {phases} ms" if phases else record.computes
        computes += f" ({record.kernels})" if record.kernels else ""
        figures = (record.median_ms, spread, record.ratio_to_floor, record.ratio_to_ours, record.peak_mb)
        rows.append([record.impl, *figures, record.launches, record.host_ms, record.gate, computes])
    return markdown_table(header, rows)


def _not_measured(machine: Machine, records: Sequence[Record]) -> list[str]:
    suite = SUITES["gpu" if machine.device_type == "cuda" else "cpu"]
    measured = {record.case for record in records}
    return [case.name for case in suite if case.name not in measured]


def summary_table(records: Sequence[Record]) -> str:
    """One line per case: ours against floor, eager, torch.compile and the fastest peer that passed its gate."""
    header = ["case", "ours ms", "× floor", "eager ms", "torch.compile ms", "fastest peer", "peak MB, ours / eager"]
    header.append("commit")
    rows: list[list[Cell]] = []
    for case, own in cases_of(without_policies(records)).items():
        ours = fastest(record for record in own if record.ours)
        named = {record.impl: record for record in own}
        peer = fastest(record for record in own if is_peer(record))
        if ours is None:
            failing = next((record.gate for record in own if record.ours), "not measured")
            others = (_median(named, EAGER), _median(named, COMPILED))
            rows.append([case, failing, None, *others, None, None, own[0].commit])
            continue
        peaks = f"{number(ours.peak_mb)} / {number(named[EAGER].peak_mb if EAGER in named else None)}"
        shown_peer = "–" if peer is None else f"{number(peer.median_ms)} ({peer.impl})"
        backend = ours.impl.partition(":")[2]
        shown = f"{number(ours.median_ms)} ({backend})" if backend else number(ours.median_ms)
        figures = (_median(named, EAGER), _median(named, COMPILED))
        rows.append([case, shown, ours.ratio_to_floor, *figures, shown_peer, peaks, ours.commit])
    return markdown_table(header, rows)


def policy_table(records: Sequence[Record]) -> str:
    """A line per policy loss, a column per case and backend: its time over that of ppo. Empty without such cases."""
    columns: dict[str, dict[str, Record]] = {}
    for case, own in cases_of(record for record in records if record.case.endswith(f"/{POLICIES}")).items():
        for record in own:
            if record.ours:
                backend, _, policy = record.impl.removeprefix("ours:").partition(" ")
                columns.setdefault(f"{case.removesuffix(f'/{POLICIES}')} ({backend})", {})[policy] = record
    policies = dict.fromkeys(policy for column in columns.values() for policy in column)
    rows = [[policy, *(_relative(column, policy) for column in columns.values())] for policy in policies]
    return markdown_table(["policy loss", *columns], rows) if rows else ""


def _relative(column: dict[str, Record], policy: str) -> str:
    """Time over that of ppo, with quartiles, or why there is none."""
    record, ppo = column.get(policy), column.get("ppo")
    if record is None or ppo is None:
        return "–"
    if record.median_ms is None or record.spread_ms is None or not ppo.median_ms:
        return record.gate.partition(":")[0]
    low, high = (f"{bound / ppo.median_ms:.2f}" for bound in record.spread_ms)
    return f"{record.median_ms / ppo.median_ms:.2f} ({low} – {high})"


def _median(named: dict[str, Record], impl: str) -> str:
    record = named.get(impl)
    if record is None:
        return "–"
    return number(record.median_ms) if record.median_ms is not None else record.gate.partition(":")[0]


def performance_page(results: Path = RESULTS) -> str:
    """The section of docs/performance.md between its markers."""
    files = sorted(results.glob("*/results.json"))
    if not files:
        return _NOTHING_YET
    parts = [_HOW_TO_READ]
    for path in files:
        machine, records = read(path)
        where = f"The full tables are in `bench/results/{path.parent.name}/report.md`."
        parts += [f"## {machine.machine}", f"{provenance(machine, records)} {where}"]
        if without_policies(records):
            parts.append(summary_table(records))
        if table := policy_table(records):
            parts += ["### Policy losses", _HOW_TO_READ_POLICIES, table]
    return "\n\n".join([*parts, _HOW_TO_RERUN])


HEADLINES = {  # cases shown in the README, with their description
    "loss/qwen2.5-3b/128/fp32/100%": "whole loss from logits, 128 tokens × 151,936",
    "linear-loss/d512-v32000/1024/fp32/100%": "from hidden states, 1,024 tokens × 512 × 32,000",
    "linear-loss/d512-v32000/1024/fp32/15%": "the same, 15 % of tokens unmasked",
    "linear-loss/d64-v151936/4096/fp32/100%/512MB": "from hidden states, 4,096 tokens × 64 × 151,936",
    "loss/qwen2.5-3b/8192/bf16/100%": "whole loss from logits, 8,192 tokens × 151,936, bf16",
    "linear-loss/d4096-v131072/8192/bf16/100%": "from hidden states, 8,192 tokens × 4,096 × 131,072, bf16",
}


def headline_table(results: Path = RESULTS) -> str:
    """The section of the README between its markers: ratios of a few cases, by machine."""
    rows: list[list[Cell]] = []
    for path in sorted(results.glob("*/results.json")):
        machine, records = read(path)
        for case, named in cases_of(records).items():
            ours = fastest(record for record in named if record.ours)
            if case not in HEADLINES or ours is None:
                continue
            by_name = {record.impl: record for record in named}
            eager, compiled = by_name.get(EAGER), by_name.get(COMPILED)
            rows.append(
                [
                    HEADLINES[case],
                    machine.machine,
                    _times(ours.ratio_to_floor),
                    _times(_ratio(eager and eager.median_ms, ours.median_ms)),
                    _times(_ratio(compiled and compiled.median_ms, ours.median_ms)),
                    _times(_ratio(eager and eager.peak_mb, ours.peak_mb)),
                ]
            )
    header = (
        "forward + backward",
        "machine",
        "time / floor",
        "eager / ours",
        "torch.compile / ours",
        "eager memory / ours",
    )
    return markdown_table(header, rows) if rows else _NOTHING_YET


def _ratio(other: float | None, ours: float | None) -> float | None:
    return None if other is None or not ours else other / ours


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{number(ratio, 2)} ×"


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "performance.md": performance_page,
    ROOT / "README.md": headline_table,
}


def with_section(page: str, section: str) -> str:
    """The page with the text between its markers replaced.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must contain the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


# plots ----------------------------------------------------------------------------------------------------------------

_STYLES = ("o-", "s-", "^-", "d-", "v-", "x-", "*-", "P-")


def plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Roofline, time against V, memory against N; omits plots without points, and all plots without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    records = without_policies(records)
    points = {
        "roofline": _roofline(records),
        "time_against_vocabulary": _against(records, "loss", _vocabulary, lambda record: record.median_ms),
        "memory_against_tokens": _against(records, "linear-loss", _tokens, lambda record: record.peak_mb),
    }
    labels = {
        "roofline": ("FLOP per byte at least moved", "TFLOP/s"),
        "time_against_vocabulary": ("vocabulary", "ms per million tokens"),
        "memory_against_tokens": ("tokens", "peak MB beyond inputs"),
    }
    return [_plot(folder / f"{name}.png", *labels[name], series) for name, series in points.items() if any(series)]


Series = dict[str, list[tuple[float, float]]]


def _case(name: str):
    return next((case for suite in SUITES.values() for case in suite if case.name == name), None)


def _vocabulary(case) -> float:
    return case.vocab_size


def _tokens(case) -> float:
    return case.tokens


def _against(records: Sequence[Record], task: str, x: Callable, y: Callable) -> Series:
    """Points of a task's cases in which every token counts, in token scope."""
    series: Series = {}
    for record in records:
        case, value = _case(record.case), y(record)
        if case is None or value is None or (case.task, case.unmasked, case.band_scope) != (task, 1.0, "token"):
            continue
        per_token = 1e6 / case.tokens if task == "loss" else 1.0
        series.setdefault(f"{record.impl}, {case.dtype}", []).append((x(case), value * per_token))
    return {name: sorted(points) for name, points in series.items() if len(points) > 1}


def _roofline(records: Sequence[Record]) -> Series:
    series: Series = {}
    for record in records:
        if record.flops and record.bytes and record.median_ms and not record.ceiling:
            rate = record.flops / record.median_ms / 1e9
            series.setdefault(record.impl, []).append((record.flops / record.bytes, rate))
        if record.flops and record.median_ms and record.impl.startswith("ceiling: ") and not record.bytes:
            series.setdefault(record.impl, []).append((1e3, record.flops / record.median_ms / 1e9))
    return series


def _plot(path: Path, x_label: str, y_label: str, series: Series) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for index, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), _STYLES[index % len(_STYLES)], label=name)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def write_report(results: Path, folder: Path) -> None:
    """Write report.md and the available plots next to the results."""
    machine, records = read(results)
    drawn = plots(records, folder)
    images = "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in drawn)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(full_report(machine, records) + images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, help="one results.json (default: all in bench/results)")
    parser.add_argument("--out", type=Path, help="folder for report.md and plots (default: that of results.json)")
    parser.add_argument("--pages", action="store_true", help="also update README.md and docs/performance.md")
    parser.add_argument("--keep", action="store_true", help="copy --results into bench/results and update the pages")
    parser.add_argument("--print", action="store_true", help="print the summary without writing anything")
    options = parser.parse_args(arguments)
    if options.print:
        print(summary_table(read(options.results)[1]))
        return
    if options.keep:
        machine, found = read(options.results)
        kept = RESULTS / machine.folder / "results.json"
        write(kept, *merged(kept, machine, found))
        options.results, options.pages = kept, True
    for path in [options.results] if options.results else sorted(RESULTS.glob("*/results.json")):
        write_report(path, options.out or path.parent)
    if options.pages:
        for page, section in PAGES.items():
            page.write_text(with_section(page.read_text(), section()))


if __name__ == "__main__":
    main()
