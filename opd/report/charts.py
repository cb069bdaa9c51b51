"""Small charts as SVG, several of which fit side by side and on a phone. Colours come from the page's style sheet: light, dark, print."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from opd.report.curves import Series, label, parts, ticks

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 300
WINDOWS = 40  # a smoothed line is a mean over a fortieth of the run


@dataclass(frozen=True, slots=True)
class Line:
    """A series as it is drawn. colour: its number. kind: `main`, `faint` (behind it) or `level` (a dashed reference)."""

    series: Series
    colour: int = 0
    kind: str = "main"


@dataclass(frozen=True, slots=True)
class Band:
    """An interval at each x: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Axes:
    """x: label of the x axis. percent: y values are shares. floor: a value that the y axis reaches down to."""

    x: str = "step"
    percent: bool = False
    floor: float | None = None


def chart(title: str, unit: str, lines: Sequence[Line], axes: Axes = Axes(), bands: Sequence[Band] = (), bars: bool = False) -> str:
    """A figure with its caption. bars: columns in the place of lines, those of the first series filled, of others in outline."""
    drawn = [(line, [piece for piece in parts(line.series) if piece]) for line in lines]
    points = [point for _, pieces in drawn for piece in pieces for point in piece]
    heading = f'<figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
    if not points:
        return f'<figure class="chart">{heading}<p class="none">nothing was measured</p></figure>'
    ys = [y for _, y in points] + [y for band in bands for _, low, high in band.points for y in (low, high)]
    y_ticks = ticks(ys if axes.floor is None else [*ys, axes.floor])
    if axes.floor is not None and len(y_ticks) > 2 and y_ticks[0] < axes.floor and min(ys) > axes.floor - 0.03 * (max(ys) - axes.floor):
        y_ticks = y_ticks[1:]  # a little below it, as noise is, needs no axis of its own
    if axes.percent:
        y_ticks = [tick for tick in y_ticks if tick <= 1 + 1e-9] if max(ys) <= 1 else y_ticks
    xs = [x for x, _ in points]
    low_x, high_x = (min(xs) - 0.5, max(xs) + 0.5) if bars else (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)

    def across(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        bottom = HEIGHT - BOTTOM
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    body = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    body += grid(y_ticks, down, axes)
    body += x_axis(low_x, high_x, across, axes)
    for band in bands:
        upper = [(x, high) for x, _, high in band.points]
        lower = [(x, low) for x, low, _ in reversed(band.points)]
        outline = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in [*upper, *lower])
        body.append(f'<polygon class="band c{band.colour}" points="{outline}"/>')
    for number, (line, pieces) in enumerate(drawn):
        name = escape(line.series.name)
        body.append(f'<g class="{line.kind} c{line.colour}"><title>{name}</title>')
        for piece in pieces:
            places = [(across(x), down(y)) for x, y in piece]
            if bars:
                half = (WIDTH - LEFT - RIGHT) / (high_x - low_x) * (0.42 if number == 0 else 0.3)
                kind = "filled" if number == 0 else "outline"
                body += [
                    f'<rect class="{kind}" x="{x - half:.1f}" y="{y:.1f}" width="{2 * half:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"/>'
                    for x, y in places
                ]
            elif len(places) > 1:
                body.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
            if not bars and line.kind == "main" and len(places) <= 25:
                body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in places]
        body.append("</g>")
    return f'<figure class="chart">{heading}{"".join(body)}</svg></figure>'


def grid(y_ticks: Sequence[float], down, axes: Axes) -> list[str]:  # type: ignore[no-untyped-def]
    found = []
    scaled = [100 * tick for tick in y_ticks] if axes.percent else list(y_ticks)
    for tick, shown in zip(y_ticks, scaled, strict=True):
        found.append(f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
        sign = "%" if axes.percent else ""
        found.append(f'<text x="{LEFT - 6}" y="{down(tick) + 3.5:.1f}" text-anchor="end">{label(shown, scaled)}{sign}</text>')
    return found


def x_axis(low: float, high: float, across, axes: Axes) -> list[str]:  # type: ignore[no-untyped-def]
    marks = [mark for mark in ticks([low, high], whole=True) if low - 1e-9 <= mark <= high + 1e-9]
    found = [f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for mark in marks:
        if across(mark) < WIDTH - RIGHT - 50 or axes.x == "":
            found.append(f'<text x="{across(mark):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label(mark, marks)}</text>')
    return [*found, f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" class="name">{escape(axes.x)}</text>']


def smoothed(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """The mean over the points around each, as many as make a fortieth of all."""
    told = [(x, y) for x, y in points if y is not None]
    half = len(told) // (2 * WINDOWS)
    means: list[tuple[float, float | None]] = []
    for index, (x, _) in enumerate(told):
        around = told[max(0, index - half) : index + half + 1]
        means.append((x, fmean(y for _, y in around)))
    return thinned(means)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Every so many points, the last among them: no more than a picture of this size can show."""
    every = max(1, -(-len(points) // MOST_POINTS))
    return [*points[:-1:every], *points[-1:]]
