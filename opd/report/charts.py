"""Small charts as SVG, several of which fit side by side and on a phone. Their colours come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from opd.runs.text import one_line

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 166  # edges of the plot
MAX_POINTS = 300
MAX_DOTS = 25  # points of a line that are marked
SMOOTHING_WINDOWS = 40  # a smoothed line is a mean over a fortieth of the run
LIGHT = ("#0b62b8", "#c2491a", "#0d7f4f", "#8a3fa8", "#a8780a", "#c2256b", "#0f8299", "#5b6770")
DARK = ("#6cb4ff", "#ff9a66", "#4fd39b", "#d39bf0", "#e8c14a", "#ff8ab8", "#5fd3e8", "#b7c2cc")

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, slots=True)
class Line:
    """A series of points in order of x; a y that is None or not finite leaves a gap.

    Attributes:
        colour: index of the style sheet's colour class.
        kind: `main`, `faint` (behind the others) or `level` (a dashed reference).
    """

    name: str
    points: Points
    colour: int = 0
    kind: str = "main"

    def pieces(self) -> list[list[tuple[float, float]]]:
        """Return the points between gaps."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in self.points:
            if y is not None and math.isfinite(y):
                pieces[-1].append((x, y))
            elif pieces[-1]:
                pieces.append([])
        return [piece for piece in pieces if piece]


@dataclass(frozen=True, slots=True)
class Band:
    """An interval at each x: (x, low, high); one that is not finite is left out."""

    points: Sequence[tuple[float, float, float]]
    colour: int = 0

    def finite(self) -> list[tuple[float, float, float]]:
        return [point for point in self.points if all(map(math.isfinite, point))]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: int
    end: int

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    x: str = "step",
    percent: bool = False,
    floor: float | None = None,
    bands: Sequence[Band] = (),
    bars: bool = False,
) -> str:
    """Return a figure with its caption.

    Args:
        title: plain text, followed by `unit`.
        lines: drawn in this order.
        x: label of the x axis.
        percent: y values are shares.
        floor: a value that the y axis reaches down to.
        bands: drawn behind the lines.
        bars: draw columns, those of the first line filled and those of others in outline.
    """
    caption = f'<figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
    points = [point for line in lines for piece in line.pieces() for point in piece]
    if not points:
        return f'<figure class="chart">{caption}<p class="none">nothing was measured</p></figure>'
    xs = [point[0] for point in points]
    ys = [point[1] for point in points] + [y for band in bands for _, low, high in band.finite() for y in (low, high)]
    y_ticks = _y_ticks(ys, percent, floor)
    across = Scale(min(xs) - 0.5, max(xs) + 0.5, LEFT, RIGHT) if bars else Scale(min(xs), max(max(xs), min(xs) + 1), LEFT, RIGHT)
    down = Scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    body = _grid(y_ticks, down, percent) + _x_axis(across, x)
    for band in bands:
        outline = [(x, high) for x, _, high in band.finite()] + [(x, low) for x, low, _ in reversed(band.finite())]
        body.append(f'<polygon class="band c{band.colour}" points="{_path(outline, across, down)}"/>')
    for number, line in enumerate(lines):
        body.append(f'<g class="{line.kind} c{line.colour}"><title>{escape(one_line(line.name))}</title>')
        for piece in line.pieces():
            if bars:
                body += _bars(piece, across, down, filled=number == 0)
                continue
            if len(piece) > 1:
                body.append(f'<polyline points="{_path(piece, across, down)}"/>')
            if line.kind == "main" and len(piece) <= MAX_DOTS:
                body += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.4"/>' for x, y in piece]
        body.append("</g>")
    return (
        f'<figure class="chart">{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg></figure>"
    )


def _y_ticks(values: Sequence[float], percent: bool, floor: float | None) -> list[float]:
    marks = ticks(values if floor is None else [*values, floor])
    if floor is not None and len(marks) > 2 and marks[0] < floor and min(values) > floor - 0.03 * (max(values) - floor):
        marks = marks[1:]  # values just below the floor, as noise is, do not need another tick
    if percent and max(values) <= 1:
        marks = [mark for mark in marks if mark <= 1 + 1e-9]
    return marks


def _grid(marks: Sequence[float], down: Scale, percent: bool) -> list[str]:
    shown = [100 * mark for mark in marks] if percent else list(marks)
    sign = "%" if percent else ""
    return [
        f'<path class="grid" d="M{LEFT} {down(mark):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{down(mark) + 3.5:.1f}" text-anchor="end">{label(value, shown)}{sign}</text>'
        for mark, value in zip(marks, shown, strict=True)
    ]


def _x_axis(across: Scale, name: str) -> list[str]:
    marks = [mark for mark in ticks([across.low, across.high], whole=True) if across.low - 1e-9 <= mark <= across.high + 1e-9]
    return [
        f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>',
        *(
            f'<text x="{across(mark):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label(mark, marks)}</text>'
            for mark in marks
            if across(mark) < RIGHT - 50  # leaves room for the name
        ),
        f'<text x="{RIGHT}" y="{HEIGHT - 8}" text-anchor="end" class="name">{escape(name)}</text>',
    ]


def _bars(points: Sequence[tuple[float, float]], across: Scale, down: Scale, filled: bool) -> list[str]:
    half = (across(1) - across(0)) * (0.42 if filled else 0.3)
    kind = "filled" if filled else "outline"
    return [
        f'<rect class="{kind}" x="{across(x) - half:.1f}" y="{down(y):.1f}" width="{2 * half:.1f}" height="{BOTTOM - down(y):.1f}"/>'
        for x, y in points
    ]


def _path(points: Sequence[tuple[float, float]], across: Scale, down: Scale) -> str:
    return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)


def ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Return four to eight round, evenly spaced numbers around all `values`; `whole`: whole numbers, from 0 on."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):  # a single value gets the middle
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    if whole and low >= 0:
        low = 0.0
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def label(value: float, others: Sequence[float]) -> str:
    """Return a tick's number, with as many digits as the distance between ticks needs."""
    step = others[1] - others[0] if len(others) > 1 else abs(value) or 1.0
    largest = max(abs(others[0]), abs(others[-1]))
    if largest >= 1e6 or largest < 1e-3:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value if abs(value) > step / 2 else 0:,.{digits}f}"


def smoothed(points: Points) -> Points:
    """Return a moving average over a fortieth of the points, thinned."""
    known = [(x, y) for x, y in points if y is not None]
    half = len(known) // (2 * SMOOTHING_WINDOWS)
    return thinned([(x, fmean(y for _, y in known[max(0, index - half) : index + half + 1])) for index, (x, _) in enumerate(known)])


def thinned(points: Points) -> Points:
    """Return as many evenly spaced points as a chart can show, the last one among them."""
    every = max(1, -(-len(points) // MAX_POINTS))
    return [*points[:-1:every], *points[-1:]]
