"""The sections of the page, each a piece of HTML made from runs. Missing numbers are dashes: a run may be read at any moment."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from opd.report.charts import Axes, Band, Line, chart, smoothed, thinned
from opd.report.curves import LIGHT, Series
from opd.runs.outcome import gap_closed, mean
from opd.runs.reader import Run, flatten, format_value
from opd.runs.text import visible

MOST_TEXT = 300  # letters of a name or a value
PHASES = (("time/sample", "sampling"), ("time/score", "teacher’s scores"), ("time/update", "update"))
FEW = 500  # a mean over fewer than one token in so many is left out: it would be the loudest and say the least
MEMORY = ("loading", "evaluation", "sampling", "scoring", "update")


@dataclass(frozen=True, slots=True)
class Told:
    """A run with its lines, read once."""

    name: str
    status: str
    reason: str
    config: dict[str, Any]
    overrides: list[str]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def told(run: Run) -> Told:
    return Told(run.name, run.status, run.reason, run.config, run.overrides, run.summary, run.metrics(), run.evaluations())


def text(value: object) -> str:
    """Any text as HTML, tamed, cut, and with its own direction kept to itself."""
    return escape(visible(str(value), MOST_TEXT).replace("↵\n", "↵"))


def section(title: str, body: str, name: str, about: str = "") -> str:
    lead = f'<p class="about">{about}</p>' if about else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def colour(number: int) -> int:
    return number % len(LIGHT)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def option(run: Told, name: str) -> Any:
    """The option by its dotted name; None where the run does not tell."""
    found: Any = run.config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def values(run: Told, name: str) -> list[tuple[float, float | None]]:
    """A metric by step."""
    return [(line["step"], line.get(name)) for line in run.metrics]


def students(run: Told) -> list[dict[str, Any]]:
    return [line for line in run.evaluations if line["model"] == "student"]


def teacher(run: Told) -> dict[str, Any] | None:
    return next((line for line in run.evaluations if line["model"] == "teacher"), None)


def reward(line: Mapping[str, Any] | None) -> dict[str, float] | None:
    return None if line is None else line.get("rewards")


def key(runs: Sequence[Told]) -> str:
    """Which colour is which run; nothing for one run."""
    if len(runs) == 1:
        return ""
    items = "".join(f'<li class="c{colour(i)}"><i></i><bdi>{text(run.name)}</bdi></li>' for i, run in enumerate(runs))
    return f'<ul class="key">{items}</ul>'


def heading(runs: Sequence[Told]) -> str:
    if len(runs) > 1:
        return f'<header><p class="kicker">opd · report</p><h1>{len(runs)} runs</h1>{key(runs)}{"".join(map(unfinished, runs))}</header>'
    run = runs[0]
    data = option(run, "data.path") or option(run, "data.source")
    named = [("student", option(run, "model.path")), ("teacher", option(run, "teacher.path")), ("data", data)]
    if run.metrics:
        tokens = sum(line.get("tokens") or 0 for line in run.metrics)
        named += [("steps", f"{run.metrics[-1]['step']:,}"), ("graded tokens", f"{tokens:,.0f}")]
    items = "".join(f"<div><dt>{label}</dt><dd><bdi>{text(value)}</bdi></dd></div>" for label, value in named if value is not None)
    return (
        f'<header><p class="kicker">opd · report</p><h1><bdi>{text(run.name)}</bdi></h1>'
        f'<dl class="who">{items}</dl>{unfinished(run)}</header>'
    )


def unfinished(run: Told) -> str:
    if run.status == "done":
        return ""
    reason = f": {text(run.reason)}" if run.reason else ""
    return f'<p class="notice"><bdi>{text(run.name)}</bdi> is not finished ({text(run.status)}{reason}).</p>'


def results(runs: Sequence[Told]) -> str:
    found = [outcome(run) for run in runs]
    body = single(found[0]) if len(found) == 1 else table(runs, found)
    about = "Rewards with 95 % intervals, under identical decoding; the KL is exact, over the vocabulary at temperature 1."
    return section("Result", body, "result", about)


def outcome(run: Told) -> dict[str, Any]:
    """Before, now and teacher as far as they were measured: evaluations tell also of a run that goes on."""
    own = students(run)
    first, last = (own[0], own[-1]) if own else (None, None)
    rewards = {"before": reward(first), "now": reward(last), "teacher": reward(teacher(run))}
    return {
        "rewards": rewards,
        "gap": gap_closed(mean(first), mean(last), mean(teacher(run))),
        "kl_before": None if first is None else first.get("kl"),
        "kl_now": None if last is None else last.get("kl"),
        "step": 0 if last is None else last["step"],
    }


def single(found: Mapping[str, Any]) -> str:
    rewards = found["rewards"]
    tiles = []
    if rewards["now"] is not None:
        before = "" if rewards["before"] is None else f"from {percent(rewards['before']['mean'])} before"
        tiles.append(tile("reward", percent(rewards["now"]["mean"]), before))
    if found["gap"] is not None:
        shown = max(0.0, min(1.0, found["gap"]))
        bar = f'<span class="gauge"><span style="width:{100 * shown:.1f}%"></span></span>'
        tiles.append(tile("of the gap to the teacher closed", percent(found["gap"]), "", bar))
    if found["kl_now"] is not None:
        tiles.append(tile("KL to the teacher, nats/token", number(found["kl_now"], 2), f"from {number(found['kl_before'], 2)} before"))
    if not tiles:
        return '<p class="none">Nothing was evaluated yet.</p>'
    plot = ladder(rewards) if rewards["now"] is not None else ""
    return f'<div class="tiles">{"".join(tiles)}</div>{plot}'


def tile(label: str, value: str, below: str, extra: str = "") -> str:
    return f'<div class="tile"><p class="value">{value}</p><p class="label">{label}</p>{extra}<p class="below">{below}</p></div>'


def ladder(rewards: Mapping[str, Mapping[str, float] | None]) -> str:
    """Means with their intervals, one under the other on one axis."""
    measured = [(when, found) for when, found in rewards.items() if found is not None]
    low = min(0.0, *(found["low"] for _, found in measured))
    high = max(1.0, *(found["high"] for _, found in measured))
    rows = []
    for when, found in measured:
        left, right, mean = (100 * (found[name] - low) / (high - low) for name in ("low", "high", "mean"))
        rows.append(
            f'<div class="rung {when}"><span>{when}</span><span class="rail">'
            f'<i style="left:{left:.2f}%;width:{max(right - left, 0.3):.2f}%"></i><b style="left:{mean:.2f}%"></b></span>'
            f'<span class="figures">{percent(found["mean"])} <small>[{100 * found["low"]:.1f}, {100 * found["high"]:.1f}]'
            f" of {found['count']:,.0f}</small></span></div>"
        )
    return f'<div class="ladder">{"".join(rows)}</div>'


def table(runs: Sequence[Told], found: Sequence[Mapping[str, Any]]) -> str:
    """A row a run, with its interval as a picture."""

    def with_interval(own: Mapping[str, float] | None) -> str:
        return "–" if own is None else f"{percent(own['mean'])} <small>[{100 * own['low']:.0f}, {100 * own['high']:.0f}]</small>"

    rows = []
    for index, (run, own) in enumerate(zip(runs, found, strict=True)):
        cells = [with_interval(own["rewards"][when]) for when in ("before", "now", "teacher")]
        cells += [percent(own["gap"]), number(own["kl_before"], 3), number(own["kl_now"], 3), f"{own['step']:,}"]
        cells.append(duration(sum(line.get("time/step") or 0.0 for line in run.metrics)))
        rows.append(
            f'<tr><th scope="row" class="c{colour(index)}"><i></i><bdi>{text(run.name)}</bdi></th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    names = ("reward before", "now", "teacher", "gap closed", "KL before", "KL now", "steps", "training")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return scrolled(f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")


def scrolled(table: str) -> str:
    """A table that may be wider than the screen."""
    return f'<div class="scroll" tabindex="0"><table>{table}</table></div>'


def progress(runs: Sequence[Told]) -> str:
    charts = [reward_chart(runs), kl_chart(runs)]
    charts += [
        metric_chart(runs, "reverse_kl", "Reverse KL in training", "nats/token", 0.0),
        metric_chart(runs, "entropy", "Entropy of the student", "nats/token", 0.0),
        metric_chart(runs, "length", "Length of completions", "tokens", 0.0),
        metric_chart(runs, "optim/grad_norm", "Gradient norm", "", 0.0),
    ]
    note = "" if len(runs) > 1 else "Thin lines: every step; strong lines: the mean over a fortieth of the run. Dashed: the teacher."
    return section("Progress", f'{key(runs)}<div class="charts">{"".join(charts)}</div>', "progress", note)


def reward_chart(runs: Sequence[Told]) -> str:
    lines, bands = [], []
    for index, run in enumerate(runs):
        own = [(line["step"], found) for line in students(run) if (found := reward(line)) is not None]
        lines.append(Line(Series(run.name, [(step, found["mean"]) for step, found in own]), colour(index)))
        bands.append(Band([(step, found["low"], found["high"]) for step, found in own], colour(index)))
        best = reward(teacher(run))
        if best is not None and own:
            level = Series("teacher", [(own[0][0], best["mean"]), (own[-1][0], best["mean"])])
            lines.append(Line(level, colour(index), "level"))
    shares = all(0 <= y <= 1 for band in bands for _, low, high in band.points for y in (low, high))
    return chart("Reward", "evaluation, 95 % interval", lines, Axes(percent=shares), bands)


def kl_chart(runs: Sequence[Told]) -> str:
    lines = [
        Line(Series(run.name, [(line["step"], line.get("kl")) for line in students(run)]), colour(index)) for index, run in enumerate(runs)
    ]
    return chart("Exact KL to the teacher", "nats/token", lines, Axes(floor=0.0))


def metric_chart(runs: Sequence[Told], name: str, title: str, unit: str, floor: float | None = None) -> str:
    lines = []
    for index, run in enumerate(runs):
        points = values(run, name)
        if len(runs) == 1:
            lines.append(Line(Series("every step", thinned(points)), colour(index), "faint"))
        lines.append(Line(Series(run.name, smoothed(points)), colour(index)))
    return chart(title, unit, lines, Axes(floor=floor))


def positions(runs: Sequence[Told]) -> str:
    """KL, entropy and lengths by position, at the beginning and at the end of a run; of several runs at their ends."""
    found = [pieces(run) for run in runs]
    if not any(found):
        return ""
    kl, entropy, lengths = [], [], []
    for index, own in enumerate(found):
        if not own:
            continue
        tenth = max(1, len(own) // 10)
        parts = [(f"{runs[index].name}: last steps", own[-tenth:], "main", colour(index))]
        if len(runs) == 1:
            parts = [("first steps", own[:tenth], "level", 1), ("last steps", own[-tenth:], "main", 0)]
        for label, lines, kind, shade in parts:
            kl.append(Line(Series(label, by_position(lines, "reverse_kl")), shade, kind))
            entropy.append(Line(Series(label, by_position(lines, "entropy")), shade, kind))
            lengths.append(Line(Series(label, ends(lines)), shade, "main"))
    axes = Axes(x="position", floor=0.0)
    charts = [
        chart("Reverse KL by position", "nats/token", kl, axes),
        chart("Entropy by position", "nats/token", entropy, axes),
        chart("Lengths", "share of completions", lengths[::-1], Axes(x="tokens", percent=True, floor=0.0), bars=len(runs) == 1),
    ]
    about = "The last tenth of the steps" + (", and dashed or in outline the first tenth." if len(runs) == 1 else ".")
    about += f" Positions that fewer than one token in {FEW} stands at are left out."
    return section("Along the completion", f'{key(runs)}<div class="charts">{"".join(charts)}</div>', "positions", about)


def pieces(run: Told) -> list[dict[str, Any]]:
    return [line["by_position"] for line in run.metrics if isinstance(line.get("by_position"), dict)]


def by_position(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """The mean over steps at the middle of each piece of the completion, each token counted once; None where there are too few."""
    width, few = lines[0]["width"], sum(sum(line["tokens"]) for line in lines) / FEW
    points: list[tuple[float, float | None]] = []
    for piece in range(len(lines[0]["tokens"])):
        known = [(line[name][piece], line["tokens"][piece]) for line in lines if line[name][piece] is not None]
        count = sum(tokens for _, tokens in known)
        points.append((middle(piece, width), sum(value * tokens for value, tokens in known) / count if count > few else None))
    return points


def ends(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
    width, total = lines[0]["width"], sum(sum(line["ends"]) for line in lines)
    return [(middle(piece, width), sum(line["ends"][piece] for line in lines) / (total or 1)) for piece in range(len(lines[0]["ends"]))]


def middle(piece: int, width: int) -> float:
    """Positions are counted from 1."""
    return piece * width + (width + 1) / 2


def token_view(data: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    items = "".join(f"<li><bdi>{escape(note)}</bdi></li>" for note in notes)
    left_out = f'<ul class="notes">{items}</ul>' if items else ""
    if not any(own["rollouts"] for own in data):
        return section("Tokens", f'<p class="none">No completions are stored (track.rollouts_per_step).</p>{left_out}', "tokens")
    steps = sorted({step for own in data for step in own["steps"]})
    controls = (
        '<form class="controls" id="controls" autocomplete="off">'
        '<label class="wide"><span>step <output id="step-name"></output></span>'
        f'<input type="range" id="step" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" step="1"></label>'
        '<label class="wide"><span>differs by at least <output id="least-name"></output></span>'
        '<input type="range" id="least" min="0" max="5" value="0" step="0.1"></label>'
        '<label><span>order</span><select id="order"><option value="step">one step</option>'
        '<option value="largest">largest disagreement of all steps</option></select></label></form>'
    )
    legend = (
        '<ul class="legend"><li class="scale"><span>teacher finds it less likely</span><i></i><span>more likely</span></li>'
        '<li><span class="tok clipped">held back</span> by the clip</li>'
        '<li><span class="tok cut">bounded</span> advantage</li>'
        '<li><span class="tok off">not learnt from</span></li>'
        '<li><span class="mark">✂</span> cut off</li></ul>'
    )
    detail = '<aside id="detail" aria-live="polite"><p class="hint">Point at a token, tap it, or use the arrow keys.</p></aside>'
    view = f'<div class="view"><div id="columns" class="columns"></div>{detail}</div>'
    about = (
        "What the student wrote, before that step’s update, coloured by teacher − student log-probability at the sampling temperature: "
        "where the two disagree is where something is learnt."
    )
    script = '<noscript><p class="notice">The token view needs the script in this file.</p></noscript>'
    return section("Tokens", f"{script}{controls}{legend}{view}{left_out}", "tokens", about)


def costs(runs: Sequence[Told]) -> str:
    times, memories = [], []
    for index, run in enumerate(runs):
        spent = [(label, sum(line.get(name) or 0.0 for line in run.metrics)) for name, label in PHASES]
        if sum(seconds for _, seconds in spent) > 0:
            times.append(shares(index, runs, spent, duration))
        grown = (run.summary or {}).get("peak_memory_grown_bytes") or {}
        if grown:
            memories.append(shares(index, runs, [(work, grown.get(work, 0)) for work in MEMORY], size))
    if not times and not memories:
        return ""
    parts = [f"<div><h3>Training time</h3>{''.join(times)}</div>"] if times else []
    if memories:
        parts.append(f"<div><h3>What raised the peak of memory</h3>{''.join(memories)}</div>")
    return section("Time and memory", f'<div class="costs">{"".join(parts)}</div>', "costs")


def shares(index: int, runs: Sequence[Told], named: Sequence[tuple[str, float]], shown: Callable[[float], str]) -> str:
    """One bar cut in pieces, and what they stand for."""
    total = sum(value for _, value in named)
    name = "" if len(runs) == 1 else f'<span class="c{colour(index)} dot"><i></i><bdi>{text(runs[index].name)}</bdi></span>'
    kept = [(number, label, value) for number, (label, value) in enumerate(named) if value > total / 1000]
    bar = "".join(f'<i class="p{number}" style="flex-grow:{value / total:.5f}"></i>' for number, _, value in kept)
    items = "".join(
        f'<li><i class="p{number}"></i>{escape(label)} <b>{shown(value)}</b> <small>{100 * value / total:.0f} %</small></li>'
        for number, label, value in kept
    )
    return f'<div class="share">{name}<b class="total">{shown(total)}</b><div class="stack">{bar}</div><ul>{items}</ul></div>'


def settings(runs: Sequence[Told]) -> str:
    """What differs between runs first, then all options of each, its command line and versions."""
    options = [flatten(run.config) for run in runs]
    parts = []
    if len(runs) > 1:
        names = sorted({name for own in options for name in own if len({repr(other.get(name)) for other in options}) > 1})
        head = "".join(f'<th scope="col" class="c{colour(i)}"><i></i><bdi>{text(run.name)}</bdi></th>' for i, run in enumerate(runs))
        rows = "".join(
            f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td><bdi>{value_of(own, name)}</bdi></td>" for own in options)}</tr>'
            for name in names
        )
        parts.append(f"<h3>What differs</h3>{scrolled(f'<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>')}")
    for run, own in zip(runs, options, strict=True):
        words = " ".join(text(word) for word in run.overrides)
        summary = run.summary or {}
        versions = [f"{name} {value}" for name, value in (summary.get("versions") or {}).items()]
        shown = [f"<p><code><bdi>opd train {words}</bdi></code></p>"] if run.overrides else []
        facts = [*versions, *([summary["device"]] if summary.get("device") else [])]
        shown += [f'<p class="versions">{text(" · ".join(facts))}</p>'] if facts else []
        rows = "".join(f'<tr><th scope="row">{text(name)}</th><td><bdi>{value_of(own, name)}</bdi></td></tr>' for name in own)
        named = "All options" if len(runs) == 1 else f"All options of <bdi>{text(run.name)}</bdi>"
        shown.append(f"<details><summary>{named}</summary>{scrolled(f'<tbody>{rows}</tbody>')}</details>")
        parts.append("".join(shown))
    return section("Configuration", "".join(parts), "settings")


def value_of(options: Mapping[str, Any], name: str) -> str:
    return text(format_value(options[name])) if name in options else "–"
