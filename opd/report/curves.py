"""Curves as a picture: SVG text that stands by itself, readable on light and dark, in a file or inside a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 56  # pixels around the plot
LEGEND_LINE = 18
LETTER = 6.4  # pixels, on average, at 12 a line
LONGEST_NAME = 90  # letters of a name that the legend shows; hovering shows all
DASHES = ("", "6 4", "2 3", "9 3 2 3")
LIGHT = ("#0b62b8", "#c2491a", "#0d7f4f", "#8a3fa8", "#a8780a", "#c2256b", "#0f8299", "#5b6770")
DARK = ("#6cb4ff", "#ff9a66", "#4fd39b", "#d39bf0", "#e8c14a", "#ff8ab8", "#5fd3e8", "#b7c2cc")


@dataclass(frozen=True, slots=True)
class Series:
    """One line. points: (x, y) in order of x; y is None, or not finite, where nothing was measured: the line has a gap there."""

    name: str
    points: Sequence[tuple[float, float | None]]


def draw(series: Sequence[Series], title: str, x_label: str, y_label: str) -> str:
    """An SVG of 640 × 320, longer where the legend needs more than its place; without any point it says so."""
    curves = [(line, parts(line)) for line in series]
    points = [point for _, pieces in curves for piece in pieces for point in piece]
    x_ticks, y_ticks = ticks([x for x, _ in points], whole=all(float(x).is_integer() for x, _ in points)), ticks([y for _, y in points])
    legend, rows = legend_places([line.name for line in series])
    bottom = HEIGHT - BOTTOM - LEGEND_LINE * min(rows, 4)
    height = bottom + BOTTOM + LEGEND_LINE * rows

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), bottom - up * (bottom - TOP)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="opd-curves" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" color="#24292f">',
        f"<title>{text(title)}</title>",
        f"<style>{style()}</style>",
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600" fill="currentColor">{text(title)}</text>',
    ]
    for y in y_ticks:
        _, down = place(x_ticks[0], y)
        lines.append(f'<path d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="0.18"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end" fill="currentColor">{label(y, y_ticks)}</text>')
    for x in x_ticks:
        across, _ = place(x, y_ticks[0])
        lines.append(f'<path d="M{across:.1f} {bottom}v4" stroke="currentColor"/>')
        lines.append(f'<text x="{across:.1f}" y="{bottom + 17}" text-anchor="middle" fill="currentColor">{label(x, x_ticks)}</text>')
    lines.append(f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="currentColor"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle:.0f}" y="{bottom + 34}" text-anchor="middle" fill="currentColor">{text(x_label)}</text>')
    half = (TOP + bottom) / 2
    lines.append(f'<text transform="translate(14 {half:.0f}) rotate(-90)" text-anchor="middle" fill="currentColor">{text(y_label)}</text>')
    if not points:
        lines.append(f'<text x="{middle:.0f}" y="{half:.0f}" text-anchor="middle" fill="currentColor">nothing was measured</text>')
    for number, (line, pieces) in enumerate(curves):
        lines.append(f'<g class="{colour(number)}"{dash(number)}><title>{text(line.name)}</title>')
        for piece in pieces:
            places = [place(x, y) for x, y in piece]
            if len(piece) > 1:
                path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
                lines.append(f'<polyline points="{path}" fill="none" stroke-width="2" stroke-linejoin="round"/>')
            radius = 3 if len(piece) == 1 else 2 if len(points) <= 200 else 0
            lines.extend(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{radius}"><title>{text(line.name)}: {x:.6g}, {y:.6g}</title></circle>'
                for (x, y), (across, down) in zip(piece, places, strict=True)
                if radius
            )
        lines.append("</g>")
    for number, (line, (across, row)) in enumerate(zip(series, legend, strict=True)):
        down = bottom + BOTTOM + LEGEND_LINE * row
        lines.append(f'<g class="{colour(number)}"{dash(number)}><path d="M{across} {down - 4}h22" stroke-width="2"/></g>')
        lines.append(f'<text x="{across + 28}" y="{down}" fill="currentColor">{text(shortened(line.name))}')
        lines.append(f"<title>{text(line.name)}</title></text>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def parts(series: Series) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in series.points:
        if y is not None and math.isfinite(y) and math.isfinite(x):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Four to eight round numbers, evenly spaced, around all `values`. whole: no step below 1."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):  # one point: it stands in the middle
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
    """A tick's number, with as many digits as the distance between ticks needs."""
    step = others[1] - others[0] if len(others) > 1 else abs(value) or 1.0
    largest = max(abs(others[0]), abs(others[-1]))
    if largest >= 1e6 or largest < 1e-3:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value if abs(value) > step / 2 else 0:,.{digits}f}"


def legend_places(names: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Where each name's sample begins (pixels from the left, row), as many names a row as fit, and the number of rows."""
    found: list[tuple[int, int]] = []
    across, row = LEFT, 0
    for name in names:
        width = int(28 + LETTER * len(shortened(name)) + 18)
        if across > LEFT and across + width > WIDTH - RIGHT:
            across, row = LEFT, row + 1
        found.append((across, row))
        across += width
    return found, row + 1 if names else 0


def shortened(name: str) -> str:
    """`name` as the legend can hold it: what tells members apart is often at its end, so the middle goes."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def colour(number: int) -> str:
    return f"c{number % len(LIGHT)}"


def dash(number: int) -> str:
    """Another dash once the colours begin again."""
    pattern = DASHES[number // len(LIGHT) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def style() -> str:
    """Colours for both schemes. A page that sets a colour of its own for text around the picture keeps it: the rules name this SVG."""

    def rules(colours: Sequence[str]) -> str:
        return "".join(f".opd-curves .c{number}{{stroke:{value};fill:{value}}}" for number, value in enumerate(colours))

    plain = ".opd-curves text{stroke:none}.opd-curves polyline{fill:none}"
    return f"{rules(LIGHT)}{plain}@media (prefers-color-scheme: dark){{.opd-curves{{color:#e6edf3}}{rules(DARK)}}}"


def text(value: str) -> str:
    """Any text as XML can hold it: control characters, which it cannot, become spaces."""
    return escape("".join(letter if letter.isprintable() else " " for letter in value))
