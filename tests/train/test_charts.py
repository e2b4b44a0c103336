import re

import pytest

from epo_kernels.train.io.charts import (
    MOST_COLUMNS,
    Series,
    heat_map,
    line_chart,
    number,
    percent,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 12, [5, 10]),
        (0, 0.03, [0, 0.01, 0.02, 0.03]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_numbers_are_short():
    shown = [number(value) for value in (0, 0.00001234, 0.0123456, 12.3456, 123456.7)]
    assert shown == ["0", "1.2e-05", "0.0123", "12.3", "123,457"]
    assert percent(0.12345) == "12.3 %"


def points_of(svg, element):
    return [
        tuple(map(float, pair.split(","))) for pair in re.search(f'<{element}[^>]* points="([^"]*)"', svg)[1].split()
    ]


def test_a_line_goes_where_its_values_are():
    svg = line_chart("t", [Series("a", [(1, 0.0), (2, 1.0), (3, 0.5)], [(0.0, 0.1), (0.9, 1.0), (0.4, 0.6)])], percent)
    (x1, y1), (x2, y2), (x3, y3) = points_of(svg, "polyline")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 > y3 > y2, "up is less in SVG"
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.2)
    ribbon = points_of(svg, "polygon")
    assert ribbon[1][1] == pytest.approx(y2, abs=0.1)
    assert len(ribbon) == 6


def test_one_step_and_equal_values_are_drawn_too():
    for chart in (
        line_chart("t", [Series("a", [(1, 0.0)])]),
        line_chart("t", [Series("a", [(1, -2.0), (2, -2.0)])]),
        heat_map("t", [1], [[0.5]]),
    ):
        assert "nan" not in chart
        assert "inf" not in chart


def test_a_long_run_shares_columns():
    steps = list(range(1, 1001))
    svg = heat_map("t", steps, [[float(step)] for step in steps])
    assert svg.count("<rect") <= MOST_COLUMNS
    assert "step 1, turn 1: 4 nats" in svg, "the mean of the first seven"


def test_labels_are_escaped():
    assert "<b>x" not in line_chart("<b>x", [Series("<b>x", [(1, 1.0)])])
