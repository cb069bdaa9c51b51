"""Curves are XML that stands by itself, whatever they are called, and show every measured point in its place."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from opd.report.curves import HEIGHT, WIDTH, Series, draw, label, ticks

SVG = "{http://www.w3.org/2000/svg}"


def picture(*series: Series) -> ElementTree.Element:
    return ElementTree.fromstring(draw(series, "reward", "step", "share"))


def lines(root: ElementTree.Element) -> list[list[tuple[float, ...]]]:
    return [[tuple(map(float, place.split(","))) for place in line.attrib["points"].split()] for line in root.iter(f"{SVG}polyline")]


def test_points_lie_where_their_values_say() -> None:
    [[first, second, third]] = lines(picture(Series("a", [(0, 0.2), (10, 0.4), (20, 0.8)])))
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert first[1] - second[1] == pytest.approx((second[1] - third[1]) / 2, abs=0.2)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in (first, second, third))


def test_a_line_has_a_gap_where_nothing_was_measured() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, 4.0), (5, math.nan), (6, 5.0)]
    root = picture(Series("a", points))
    assert [len(line) for line in lines(root)] == [2, 2]
    assert len(list(root.iter(f"{SVG}circle"))) == 5, "the last one stands alone and is still seen"


@pytest.mark.parametrize(
    "series", [[], [Series("a", [])], [Series("a", [(1, None)])], [Series("a", [(3, 0.7)])], [Series("a", [(0, 0.0)])]]
)
def test_few_points_are_no_reason_to_fail(series: list[Series]) -> None:
    shown = "".join(picture(*series).itertext())
    assert ("nothing was measured" in shown) == (not any(y is not None for line in series for _, y in line.points))


def test_any_name_is_shown_and_none_is_markup() -> None:
    names = ["</text><script>alert(1)</script>", 'a"b&c', "x\x00\x1b[31m", "long " * 100]
    root = picture(*(Series(name, [(0, 1.0), (1, 2.0)]) for name in names))
    assert not list(root.iter(f"{SVG}script"))
    shown = [element.text for element in root.iter(f"{SVG}title")]
    assert names[0] in shown and names[1] in shown and names[3] in shown


def test_lines_can_be_told_apart_in_both_schemes() -> None:
    root = picture(*(Series(f"optim.lr={number}e-5", [(0, 1.0), (1, float(number))]) for number in range(20)))
    looks = [(group.attrib["class"], group.get("stroke-dasharray")) for group in root.iter(f"{SVG}g")]
    assert len(set(looks)) == 20 and len(looks) == 40, "each once as a line and once in the legend"
    style = next(root.iter(f"{SVG}style")).text or ""
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for group in {name for name, _ in looks}:
        assert f".{group}{{" in light and f".{group}{{" in dark
    assert float(root.attrib["viewBox"].split()[3]) > HEIGHT, "the legend of many lines makes the picture longer"


@pytest.mark.parametrize(
    "values", [[0.518, 0.98], [0, 400], [1e-5, 3e-5], [-0.04, 0.03], [7], [0], [-3, -3], [1e12, 3e12], [5e-324, 1e-323]]
)
def test_ticks_are_round_even_and_around_all_values(values: list[float]) -> None:
    found = ticks(values)
    step = found[1] - found[0]
    assert found[0] <= min(values) + 1e-9 * step and found[-1] >= max(values) - 1e-9 * step
    assert 2 <= len(found) <= 9
    assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(round(step / 10 ** math.floor(math.log10(step) + 1e-9)))
    assert all(after - before == pytest.approx(step) for before, after in pairwise(found))


def test_the_number_of_a_tick_that_is_alone():
    assert [label(value, [value]) for value in (1.0, 0.0, 20.0)] == ["1", "0", "20"]
