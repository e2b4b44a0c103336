"""Charts as inline SVG, coloured by the page's style sheet: lines with intervals, and heat maps."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26  # margins for the axis labels
MOST_COLUMNS = 160  # per heat map; with more steps, neighbouring steps share a column
_SEQUENTIAL = ("#1d1147", "#51127c", "#822681", "#b63679", "#e65164", "#fb8861", "#fec287", "#fcfdbf")


@dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[tuple[float, float]]  # (step or turn, value)
    interval: Sequence[tuple[float, float]] = ()  # (low, high) of each point


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)


def number(value: float) -> str:
    """Short and readable: 0.00012, 0.35, 12, 1,234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`; `whole`: integers only."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str, series: Sequence[Series], show: Callable[[float], str] = number, over: str = "step"
) -> Markup:
    """All series on one pair of axes, starting at 0; a percentage axis ends at 100 % if values come close."""
    values = [value for line in series for _, value in line.points]
    values += [value for line in series for pair in line.interval for value in pair]
    low, high = min(0.0, *values), max(values)
    if show is percent and high > 0.5:
        high = max(high, 1.0)
    elif high == low:
        high = low + 1.0
    elif high > 0:
        high *= 1.05
    steps = [step for line in series for step, _ in line.points]
    x = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, show)
    for index, line in enumerate(series, 1):
        points = [(x(step), y(value)) for step, value in line.points]
        if line.interval:
            upper = [(px, y(top)) for (px, _), (_, top) in zip(points, line.interval, strict=True)]
            lower = [(px, y(bottom)) for (px, _), (bottom, _) in zip(points, line.interval, strict=True)]
            parts.append(f'<polygon class="f{index} ribbon" points="{_path(upper + lower[::-1])}"/>')
        parts.append(f'<polyline class="s{index}" points="{_path(points)}"/>')
        if len(points) <= 40:
            parts += [
                f'<circle class="f{index}" cx="{px}" cy="{py}" r="2.5"><title>{over} {step:g}: {show(v)}</title>'
                "</circle>"
                for (px, py), (step, v) in zip(points, line.points, strict=True)
            ]
    legend = "".join(
        f'<span class="key"><i class="f{index}"></i>{escape(line.label)} <b>{show(line.points[-1][1])}</b></span>'
        for index, line in enumerate(series, 1)
    )
    return _figure(title, parts, legend, over)


Grid = Sequence[Sequence[float | None]]  # a row per step, a value per turn; None: no episode got that far


def heat_map(title: str, steps: Sequence[float], grid: Grid) -> Markup:
    """Steps to the right, turns upwards, values coloured from minimum to maximum."""
    steps, grid = _condensed(steps, grid)
    values = [value for row in grid for value in row if value is not None]
    low, high = min(values), max(values)
    scale = Scale(low, high, 0.0, 1.0)

    def cell(value: float) -> tuple[str, str]:
        return f'fill="{_colour(scale(value) if high > low else 0.5)}"', f"{number(value)} nats"

    stops = "".join(f'<i style="background:{colour}"></i>' for colour in _SEQUENTIAL)
    key = f'<span class="ramp">{number(low)}{stops}{number(high)} nats per token</span>'
    return _cells(title, steps, grid, cell, key)


def band_map(
    title: str, steps: Sequence[float], grid: Grid, bounds: Sequence[Sequence[tuple[float, float] | None]]
) -> Markup:
    """Whether each value of `grid` is below, inside or above its (lower, upper) band."""
    sides = [
        [
            None if value is None or bound is None else -1.0 if value < bound[0] else 1.0 if value > bound[1] else 0.0
            for value, bound in zip(row, limits, strict=True)
        ]
        for row, limits in zip(grid, bounds, strict=True)
    ]
    steps, sides = _condensed(steps, sides)

    names = ("inside", "above", "below")  # 0, 1, -1

    def cell(value: float) -> tuple[str, str]:
        name = names[round(value)]
        return f'class="{name}"', name

    key = "".join(f'<span class="key"><i class="{name}"></i>{name}</span>' for name in ("below", "inside", "above"))
    return _cells(title, steps, sides, cell, key)


def _axes(x: Scale, y: Scale, show: Callable[[float], str], whole: bool = False) -> list[str]:
    rows = [(value, y(value)) for value in ticks(y.low, y.high, 4, whole)]
    return [
        *(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
            f'<text class="y" x="{LEFT - 6}" y="{at + 3.5}">{show(value)}</text>'
            for value, at in rows
        ),
        *(
            f'<text class="x" x="{x(value)}" y="{HEIGHT - 8}">{value:g}</text>'
            for value in ticks(x.low, x.high, 6, whole=True)
        ),
    ]


def _cells(
    title: str, steps: Sequence[float], grid: Grid, cell: Callable[[float], tuple[str, str]], key: str
) -> Markup:
    turns = max(map(len, grid))
    width = (WIDTH - LEFT - RIGHT) / len(grid)
    height = (HEIGHT - TOP - BOTTOM) / turns
    parts = []
    for column, (step, row) in enumerate(zip(steps, grid, strict=True)):
        for turn, value in enumerate(row, 1):
            if value is None:
                continue
            look, told = cell(value)
            parts.append(
                f'<rect {look} x="{LEFT + column * width:.1f}" y="{HEIGHT - BOTTOM - turn * height:.1f}" '
                f'width="{width + 0.2:.1f}" height="{height + 0.2:.1f}">'
                f"<title>step {step:g}, turn {turn}: {told}</title></rect>"
            )
    half = width / 2
    x = Scale(steps[0], steps[-1], LEFT + half, WIDTH - RIGHT - half)
    y = Scale(1, turns, HEIGHT - BOTTOM - height / 2, TOP + height / 2)
    return _figure(title, [*_axes(x, y, number, whole=True), *parts], key, "step")


def _condensed(steps: Sequence[float], grid: Grid) -> tuple[list[float], list[list[float | None]]]:
    """At most MOST_COLUMNS rows; neighbouring steps are averaged."""
    share = math.ceil(len(steps) / MOST_COLUMNS)
    turns = range(max(map(len, grid)))
    groups = [grid[start : start + share] for start in range(0, len(steps), share)]
    return list(steps[::share]), [
        [_mean(row[turn] for row in group if turn < len(row)) for turn in turns] for group in groups
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _colour(share: float) -> str:
    """The colour at `share`, 0 to 1, of the sequential ramp."""
    position = min(max(share, 0.0), 1.0) * (len(_SEQUENTIAL) - 1)
    left = min(int(position), len(_SEQUENTIAL) - 2)
    mixed = [
        round(int(a, 16) + (position - left) * (int(b, 16) - int(a, 16)))
        for a, b in ((_SEQUENTIAL[left][i : i + 2], _SEQUENTIAL[left + 1][i : i + 2]) for i in (1, 3, 5))
    ]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _figure(title: str, parts: Sequence[str], legend: str, over: str) -> Markup:
    return Markup(
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 8}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT + 6}">{over}</text></svg>'
    )
