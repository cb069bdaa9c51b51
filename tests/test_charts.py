"""Charts of the report: every measured point is drawn where its value says, whatever the lines are called."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from opd.report.charts import BOTTOM, DARK, LEFT, LIGHT, MAX_POINTS, RIGHT, TOP, Band, Line, chart, label, smoothed, thinned, ticks
from opd.report.page import document


def draw(*lines: Line, **options) -> ElementTree.Element:
    return ElementTree.fromstring(chart("reward", "share", lines, **options))


def polylines(root: ElementTree.Element) -> list[list[tuple[float, ...]]]:
    return [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in root.iter("polyline")]


def texts(root: ElementTree.Element) -> list[str | None]:
    return [element.text for element in root.iter("text")]


def test_points_are_drawn_where_their_values_say():
    [[first, second, third]] = polylines(draw(Line("a", [(0, 0.2), (10, 0.4), (20, 0.8)])))
    assert (first[0], third[0]) == (LEFT, RIGHT) and second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert first[1] - second[1] == pytest.approx((second[1] - third[1]) / 2, abs=0.2)
    assert all(TOP <= y <= BOTTOM for _, y in (first, second, third))


def test_missing_values_leave_a_gap():
    root = draw(Line("a", [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, 4.0), (5, math.nan), (6, 5.0)]))
    assert [len(line) for line in polylines(root)] == [2, 2]
    assert len(list(root.iter("circle"))) == 5, "the last point has no neighbour and is still drawn"


@pytest.mark.parametrize("lines", [[], [Line("a", [])], [Line("a", [(1, None)])], [Line("a", [(3, 0.7)])], [Line("a", [(0, 0.0)])]])
@pytest.mark.parametrize("options", [{}, {"floor": 0.0}, {"percent": True}, {"bars": True}])
def test_few_points_do_not_fail(lines, options):
    shown = "".join(draw(*lines, **options).itertext())
    assert ("nothing was measured" in shown) == (not any(y is not None for line in lines for _, y in line.points))


def test_names_of_lines_are_never_markup():
    names = ["</text><script>alert(1)</script>", 'a"b&c', "x\x00\u202ey"]
    root = draw(*(Line(name, [(0, 1.0), (1, 2.0)]) for name in names))
    assert not list(root.iter("script"))
    assert [element.text for element in root.iter("title")] == [*names[:2], "x␀⟨U+202E⟩y"]


def test_every_colour_of_a_line_has_a_rule_in_both_schemes():
    light, dark = document("title", "").split("@media screen and (prefers-color-scheme:dark){.c0")
    for number in range(len(LIGHT)):
        assert f".c{number}{{--line:{LIGHT[number]}}}" in light and f"{{--line:{DARK[number]}}}" in dark


def test_percent_labels_are_percentages_that_end_at_100():
    assert texts(draw(Line("a", [(0, 0.5), (1, 0.98)]), percent=True))[:6] == ["50%", "60%", "70%", "80%", "90%", "100%"]


def test_the_floor_is_on_the_axis_and_noise_below_it_gets_no_tick():
    assert texts(draw(Line("a", [(0, 3.0), (1, 5.0)]), floor=0.0))[0] == "0"
    assert texts(draw(Line("a", [(0, -0.01), (1, 5.0)]), floor=0.0))[0] == "0"
    assert texts(draw(Line("a", [(0, -3.0), (1, 5.0)]), floor=0.0))[0] == "-4"


def test_a_band_goes_along_its_upper_and_back_along_its_lower_ends():
    root = draw(Line("a", [(0, 0.5), (10, 0.5)]), bands=[Band([(0, 0.4, 0.6), (10, 0.3, 0.7)])])
    [band] = root.iter("polygon")
    points = [tuple(map(float, point.split(","))) for point in band.attrib["points"].split()]
    assert [x for x, _ in points] == [LEFT, RIGHT, RIGHT, LEFT]
    assert points[1][1] < points[0][1] < points[3][1] < points[2][1]


def test_bars_are_as_high_as_their_values_and_only_the_first_line_is_filled():
    root = draw(Line("a", [(1, 0.2), (2, 0.4)]), Line("b", [(1, 0.4), (2, 0.2)]), floor=0.0, bars=True)
    kinds = [(bar.attrib["class"], float(bar.attrib["height"])) for bar in root.iter("rect")]
    assert [kind for kind, _ in kinds] == ["filled", "filled", "outline", "outline"]
    assert kinds[1][1] == pytest.approx(2 * kinds[0][1], abs=0.2) == pytest.approx(kinds[2][1], abs=0.2)


@pytest.mark.parametrize(
    "values", [[0.518, 0.98], [0, 400], [1e-5, 3e-5], [-0.04, 0.03], [7], [0], [-3, -3], [1e12, 3e12], [5e-324, 1e-323]]
)
def test_ticks_are_round_even_and_around_all_values(values):
    found = ticks(values)
    step = found[1] - found[0]
    assert found[0] <= min(values) + 1e-9 * step and found[-1] >= max(values) - 1e-9 * step
    assert 2 <= len(found) <= 9
    assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(round(step / 10 ** math.floor(math.log10(step) + 1e-9)))
    assert all(after - before == pytest.approx(step) for before, after in pairwise(found))


def test_the_label_of_a_single_tick():
    assert [label(value, [value]) for value in (1.0, 0.0, 20.0)] == ["1", "0", "20"]


def test_long_series_are_thinned_to_what_fits_and_keep_their_last_point():
    points = [(step, float(step % 2)) for step in range(1, 10_001)]
    assert len(thinned(points)) <= MAX_POINTS + 1 and thinned(points)[-1] == points[-1]
    assert len(re.findall(",", chart("a", "", [Line("a", smoothed(points))]).split("<polyline")[1].split("/>")[0])) <= MAX_POINTS + 1
    assert all(abs(y - 0.5) < 0.01 for _, y in smoothed(points)[1:-1]), "the mean of zeros and ones"
