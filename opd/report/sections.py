"""The sections of the page, each HTML made from runs. Missing numbers are dashes, as a run may be read at any moment."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.report.charts import LIGHT, Band, Line, chart, smoothed, thinned
from opd.report.compare import incomparable
from opd.report.controls import Effect
from opd.runs.outcome import by_dataset, compared_evaluations, find_warnings, rewards_are_shares
from opd.runs.reader import Run, flatten, format_value
from opd.runs.text import (
    MISSING,
    format_amount,
    format_bytes,
    format_duration,
    format_number,
    format_percent,
    format_reward,
    gap_label,
    visible,
)

HERE = Path(__file__).parent
MAX_CHARACTERS = 300  # of a name or a value
PHASES = {
    "sampling": "time/sample", "waiting for other processes": "time/wait", "teacher’s scores": "time/score", "update": "time/update",
}  # fmt: skip
USE = {"MFU": "perf/mfu", "of the copy rate while decoding": "perf/decode_bandwidth", "of the threads’ CPU time": "perf/cpu"}
MEMORY = ("loading", "evaluation", "sampling", "scoring", "update")
OUTCOME = ("reward before", "after", "teacher", "gap closed", "KL before", "KL after")
DISAGREEMENTS = (  # and whose answer is worse and better
    ("The teacher is better", "after", "teacher"), ("Worse than before", "after", "before"), ("Better than before", "before", "after"),
)  # fmt: skip
MAX_ANSWERS = 8  # of each kind
MIN_SHARE = 1 / 500  # of the tokens; a mean over fewer would be the loudest and say the least

Outcome = Mapping[str, Any]


def text(value: object) -> str:
    """Return any text as HTML, on one line, escaped and cut, with marks for invisible characters."""
    return escape(visible(str(value), MAX_CHARACTERS).replace("↵\n", "↵"))


def _named(run: Run) -> str:
    """Return the run's name, isolated from the direction of the text around it."""
    return f"<bdi>{text(run.name)}</bdi>"


def _colour(index: int) -> int:
    return index % len(LIGHT)


def _head(scope: str, index: int, run: Run) -> str:
    return f'<th scope="{scope}" class="c{_colour(index)}"><i></i>{_named(run)}</th>'


def _section(title: str, body: str, name: str, about: str = "") -> str:
    lead = f'<p class="about">{about}</p>' if about else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table that scrolls where it is wider than the screen; `head` and `rows` are HTML of table cells."""
    cells = "".join(head)
    header = f"<thead><tr><th></th>{cells}</tr></thead>" if cells else ""
    return f'<div class="scroll" tabindex="0"><table>{header}<tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table></div>'


def _outcome_table(more: Sequence[str], rows: Iterable[tuple[str, Outcome, Sequence[str]]]) -> str:
    """Return a table of what was achieved. `rows`: the HTML of each row's head, its outcome, and its cells for the columns `more`."""
    lines = []
    for head, outcome, others in rows:
        cells = [
            *(
                format_reward(outcome[f"reward_{when}"], outcome[f"reward_{when}_interval"], digits=0, shares=outcome["reward_is_share"])
                for when in ("before", "after", "teacher")
            ),
            format_percent(outcome["gap_closed"]),
            *(format_number(outcome[f"eval_kl_{when}"]) for when in ("before", "after")),
            *others,
        ]
        lines.append(head + "".join(f"<td>{cell}</td>" for cell in cells))
    return _table((f'<th scope="col">{name}</th>' for name in (*OUTCOME, *more)), lines)


def _key(runs: Sequence[Run]) -> str:
    """Return the legend of the runs' colours; nothing for one run."""
    items = "".join(f'<li class="c{_colour(i)}"><i></i>{_named(run)}</li>' for i, run in enumerate(runs))
    return f'<ul class="key">{items}</ul>' if len(runs) > 1 else ""


def _teacher(path: Any, weights: str) -> Any:
    return path if weights == "own" else f"the student itself ({weights})"


def heading(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        title, facts = f"{len(runs)} runs", _key(runs)
    else:
        [run] = runs
        options = flatten(run.config)
        weights = "base" if options.get("control") == "self" else options.get("teacher.weights", "own")
        named = {
            "student": options.get("model.path"),
            "teacher": _teacher(options.get("teacher.path"), weights),
            "data": options.get("data.path") or options.get("data.source"),
            "control": None if options.get("control", "none") == "none" else options["control"],
        }
        data = run.config.get("data") or {}
        if labels := sorted(data.get("mix") or {}):
            entries = (run.config.get("teachers") or {}).items()
            own = {label: _teacher(entry.get("path"), entry.get("weights") or "own") for label, entry in entries}
            paths = [f"{own[label]} ({label})" if label in own else str(named["teacher"]) for label in labels]
            named |= {"teacher": ", ".join(dict.fromkeys(paths)), "data": ", ".join(labels)}
        if run.metrics:
            tokens = sum(line.get("tokens") or 0 for line in run.metrics)
            if (rows := (run.summary or {}).get("rows", 0)) > (prompts := (run.summary or {}).get("prompts", 0)):
                named["prompts"] = f"{prompts:,} of {rows:,}, the others are too long"
            named |= {"steps": f"{run.metrics[-1]['step']:,}", "trained tokens": f"{tokens:,.0f}"}
        items = (f"<div><dt>{label}</dt><dd><bdi>{text(value)}</bdi></dd></div>" for label, value in named.items() if value is not None)
        title, facts = _named(run), f'<dl class="who">{"".join(items)}</dl>'
    notices = []
    for run in runs:
        notices += [
            f'<p class="notice">{_named(run)}: {text(warning)}.</p>' for warning in find_warnings(run.evaluations, run.config, run.changes)
        ]
        if run.status != "done":
            reason = f": {text(run.reason)}" if run.reason else ""
            notices.append(f'<p class="notice">{_named(run)} is not finished ({text(run.status)}{reason}).</p>')
    if note := incomparable(runs):
        notices.append(f'<p class="notice">{text(note[0].upper() + note[1:])}.</p>')
    return f'<header><p class="kicker">opd · report</p><h1>{title}</h1>{facts}{"".join(notices)}</header>'


def results(runs: Sequence[Run], outcomes: Sequence[Outcome], effects: Sequence[Effect]) -> str:
    body = _result_of_one(runs[0], outcomes[0]) if len(runs) == 1 else _result_of_several(runs, outcomes)
    body += "".join(f'<p class="effect">{text(effect.sentence())}</p>' for effect in effects)
    about = "Rewards with 95% intervals, under identical decoding; the KL is exact, over the vocabulary at temperature 1."
    return _section("Result", body, "result", about)


def _result_of_one(run: Run, outcome: Outcome) -> str:
    def tile(label: str, value: str, before: str = "", extra: str = "") -> str:
        below = "" if before in ("", MISSING) else f"from {before} before"
        return f'<div class="tile"><p class="value">{value}</p><p class="label">{label}</p>{extra}<p class="below">{below}</p></div>'

    tiles = []
    if outcome["reward_after"] is not None:
        after, before = (format_amount(outcome[f"reward_{when}"], outcome["reward_is_share"]) for when in ("after", "before"))
        tiles.append(tile("reward", after, before))
    if outcome["gap_closed"] is not None:
        shown = max(0.0, min(1.0, outcome["gap_closed"]))
        bar = f'<span class="gauge"><span style="width:{100 * shown:.1f}%"></span></span>'
        tiles.append(tile(gap_label(outcome["gap_closed"]), format_percent(abs(outcome["gap_closed"])), extra=bar))
    if outcome["eval_kl_after"] is not None:
        after, before = (format_number(outcome[f"eval_kl_{when}"], ".2f") for when in ("after", "before"))
        tiles.append(tile("KL to the teacher, nats/token", after, before))
    if not tiles:
        return '<p class="none">Nothing was evaluated yet.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{_reward_bars(run)}'


def _reward_bars(run: Run) -> str:
    """Return mean rewards with their intervals, below each other on one axis."""
    compared = compared_evaluations(run.evaluations).items()
    measured = [(when, line["rewards"]) for when, line in compared if line is not None and line.get("rewards")]
    shares = rewards_are_shares(run.evaluations)
    low = min([0.0, *(rewards["low"] for _, rewards in measured)])
    high = max([1.0, *(rewards["high"] for _, rewards in measured)])
    rows = []
    for when, rewards in measured:
        left, right, mean = (100 * (rewards[name] - low) / (high - low) for name in ("low", "high", "mean"))
        figures = format_reward(rewards["mean"], (rewards["low"], rewards["high"]), shares=shares)
        rows.append(
            f'<div class="rung {when}"><span>{when}</span><span class="rail">'
            f'<i style="left:{left:.2f}%;width:{max(right - left, 0.3):.2f}%"></i><b style="left:{mean:.2f}%"></b></span>'
            f'<span class="figures">{figures} <small>of {rewards["count"]:,.0f}</small></span></div>'
        )
    return f'<div class="ladder">{"".join(rows)}</div>' if rows else ""


def _result_of_several(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    rows = (
        (_head("row", index, run), outcome, (format_number(outcome["steps"], ","), format_duration(outcome["seconds"])))
        for index, (run, outcome) in enumerate(zip(runs, outcomes, strict=True))
    )
    return _outcome_table(("steps", "training"), rows)


def datasets(runs: Sequence[Run]) -> str:
    """Return a table of what each run achieved on each of its datasets, and a chart of their KL; nothing for runs without `data.mix`."""
    rows: list[tuple[str, Outcome, Sequence[str]]] = []
    kl: list[Line] = []
    for run in runs:
        for label, outcome in by_dataset(run.metrics, run.evaluations).items():
            name = text(label) if len(runs) == 1 else f"{_named(run)}, {text(label)}"
            rows.append((f'<th scope="row">{name}</th>', outcome, [format_number(outcome["graded_tokens"], ",")]))
            points = [(line["step"], line.get(f"data/{label}/reverse_kl")) for line in run.metrics]
            kl.append(Line(label if len(runs) == 1 else f"{run.name}, {label}", smoothed(points), _colour(len(kl))))
    if not rows:
        return ""
    charts = f'<div class="charts">{chart("Reverse KL in training, by dataset", "nats/token", kl, floor=0.0)}</div>'
    return _section("Datasets", _outcome_table(["trained tokens"], rows) + charts, "datasets")


def progress(runs: Sequence[Run]) -> str:
    rewards, bands, kl, kl_bands, overlap = [], [], [], [], []
    for index, run in enumerate(runs):
        student = [line for line in run.evaluations if line.get("model") == "student"]
        kl.append(Line(run.name, [(line["step"], line.get("kl")) for line in student], _colour(index)))
        kl_bands.append(Band([(line["step"], *line["kl_interval"]) for line in student if line.get("kl_interval")], _colour(index)))
        overlap.append(Line(run.name, [(line["step"], (line.get("overlap") or {}).get("mass")) for line in student], _colour(index)))
        judged = [(line["step"], line["rewards"]) for line in student if line.get("rewards")]
        rewards.append(Line(run.name, [(step, found["mean"]) for step, found in judged], _colour(index)))
        bands.append(Band([(step, found["low"], found["high"]) for step, found in judged], _colour(index)))
        teacher = (compared_evaluations(run.evaluations)["teacher"] or {}).get("rewards")
        if teacher and judged:
            rewards.append(Line("teacher", [(step, teacher["mean"]) for step, _ in (judged[0], judged[-1])], _colour(index), "level"))
    shares = all(rewards_are_shares(run.evaluations) for run in runs)
    charts = [
        chart("Reward", "evaluation, 95% interval", rewards, percent=shares, bands=bands),
        chart("Exact KL to the teacher", "nats/token, 95% interval", kl, floor=0.0, bands=kl_bands),
        chart("Top-16 overlap with the teacher", "evaluation, share of its probability", overlap, percent=True),
        _metric_chart(runs, "reverse_kl", "Reverse KL in training", "nats/token"),
        _metric_chart(runs, "entropy", "Entropy of the student", "nats/token"),
        _metric_chart(runs, "length", "Length of completions", "tokens"),
        _metric_chart(runs, "optim/grad_norm", "Gradient norm", ""),
    ]
    note = "" if len(runs) > 1 else "Thin lines: every step; strong lines: the mean over a fortieth of the run. Dashed: the teacher."
    return _section("Progress", f'{_key(runs)}<div class="charts">{"".join(charts)}</div>', "progress", note)


def _metric_chart(runs: Sequence[Run], name: str, title: str, unit: str) -> str:
    lines = []
    for index, run in enumerate(runs):
        points = [(line["step"], line.get(name)) for line in run.metrics]
        if len(runs) == 1:
            lines.append(Line("every step", thinned(points), _colour(index), "faint"))
        lines.append(Line(run.name, smoothed(points), _colour(index)))
    return chart(title, unit, lines, floor=0.0)


def positions(runs: Sequence[Run]) -> str:
    """Return charts of KL, entropy and length by token position: at a run's beginning and end, or the ends of several runs."""
    kl, entropy, overlap, lengths = [], [], [], []
    for index, run in enumerate(runs):
        found = [line["overlap"]["by_position"] for line in run.evaluations if line.get("overlap")]
        for label, part, kind, colour in _ends(runs, index, "evaluation", found, 1):
            overlap.append(Line(label, _means_by_position(part, "overlap/mass"), colour, kind))
        found = [line["by_position"] for line in run.metrics if isinstance(line.get("by_position"), dict)]
        for label, part, kind, colour in _ends(runs, index, "steps", found, max(1, len(found) // 10)):
            kl.append(Line(label, _means_by_position(part, "reverse_kl"), colour, kind))
            entropy.append(Line(label, _means_by_position(part, "entropy"), colour, kind))
            lengths.append(Line(label, _lengths(part), colour))
    if not kl:
        return ""
    charts = [
        chart("Reverse KL by position", "nats/token", kl, x="position", floor=0.0),
        chart("Entropy by position", "nats/token", entropy, x="position", floor=0.0),
        chart("Top-16 overlap by position", "evaluation, share of the teacher’s probability", overlap, x="position", percent=True),
        chart("Lengths", "share of completions", lengths[::-1], x="tokens", percent=True, floor=0.0, bars=len(runs) == 1),
    ]
    about = "The last tenth of the steps" + ("; dashed or in outline: the first tenth." if len(runs) == 1 else ".")
    about += f" Positions with less than {MIN_SHARE:.1%} of the tokens are left out."
    return _section("Along the completion", f'{_key(runs)}<div class="charts">{"".join(charts)}</div>', "positions", about)


def _ends(runs: Sequence[Run], index: int, what: str, lines: Sequence[Any], count: int) -> list[tuple[str, Sequence[Any], str, int]]:
    """Return label, lines, kind and colour of a run's last lines and, where it is the only one, of its first."""
    if not lines:
        return []
    if len(runs) > 1:
        return [(f"{runs[index].name}: last {what}", lines[-count:], "main", _colour(index))]
    return [(f"first {what}", lines[:count], "level", 1), (f"last {what}", lines[-count:], "main", 0)]


def _means_by_position(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """Return the mean over steps at the middle of each bucket of positions, weighted by tokens; None where there are too few."""
    enough = sum(sum(line["tokens"]) for line in lines) * MIN_SHARE
    points: list[tuple[float, float | None]] = []
    for bucket in range(len(lines[0]["tokens"])):
        known = [(line[name][bucket], line["tokens"][bucket]) for line in lines if line[name][bucket] is not None]
        count = sum(tokens for _, tokens in known)
        mean = sum(value * tokens for value, tokens in known) / count if count > enough else None
        points.append((_middle(bucket, lines[0]["width"]), mean))
    return points


def _lengths(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
    """Return the share of completions that end in each bucket of positions."""
    total = sum(sum(line["ends"]) for line in lines) or 1
    buckets = range(len(lines[0]["ends"]))
    return [(_middle(bucket, lines[0]["width"]), sum(line["ends"][bucket] for line in lines) / total) for bucket in buckets]


def _middle(bucket: int, width: int) -> float:
    return bucket * width + (width + 1) / 2  # positions are counted from 1


def answers(runs: Sequence[Run]) -> str:
    """Return the answers in which student and teacher, or the student before and after, disagree; nothing for several runs."""
    by_prompt: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for line in runs[0].answers if len(runs) == 1 else ():
        when = "teacher" if line["model"] == "teacher" else "before" if line["step"] == 0 else "after"
        by_prompt.setdefault((line.get("dataset", ""), line["sample_id"]), {})[when] = line
    body = ""
    for title, worse, better in DISAGREEMENTS:
        judged = [found for found in by_prompt.values() if all((found.get(who) or {}).get("reward") is not None for who in (worse, better))]
        differing = [found for found in judged if found[worse]["reward"] < found[better]["reward"]]
        rows = []
        for found in differing[:MAX_ANSWERS]:
            prompt, reference = found[better]["prompt"], ", ".join(found[better]["answer"])
            cells = [prompt, reference, *(_rewarded(found.get(who)) for who in ("before", "after", "teacher"))]
            rows.append("".join(f"<td><bdi>{text(cell)}</bdi></td>" for cell in cells))
        if judged:
            shown = f", the first {MAX_ANSWERS}" if len(differing) > MAX_ANSWERS else ""
            body += f"<h3>{title}: {len(differing):,} of {len(judged):,}{shown}</h3>"
            body += _table((f'<th scope="col">{name}</th>' for name in ("reference", "before", "after", "teacher")), rows) if rows else ""
    about = "Answers to the same evaluation prompts, each with its reward; all are in answers.jsonl."
    return _section("Answers", body, "answers", about) if body else ""


def _rewarded(answer: Mapping[str, Any] | None) -> str:
    """Return an answer with its reward in front."""
    if answer is None:
        return MISSING
    reward = MISSING if answer["reward"] is None else f"{answer['reward']:g}"
    return f"{reward}: {answer['completion']}"


def token_view(data: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Return the controls and the legend of the token view, which page.js fills from `data`; `notes` say what was left out."""
    items = "".join(f"<li><bdi>{escape(note)}</bdi></li>" for note in notes)
    left_out = f'<ul class="notes">{items}</ul>' if items else ""
    if not any(run["rollouts"] for run in data):
        why = "No completions are stored: the run took no step, or track.rollouts_per_step is 0."
        return _section("Tokens", f'<p class="none">{why}</p>{left_out}', "tokens")
    last = len({step for run in data for step in run["steps"]}) - 1
    body = (HERE / "tokens.html").read_text(encoding="utf-8").rstrip().format(last=last)
    about = (
        "Completions of the student before that step’s update, coloured by teacher − student log-probability at the loss’s temperature: "
        "the larger the difference, the stronger the training signal."
    )
    return _section("Tokens", body + left_out, "tokens", about)


def costs(runs: Sequence[Run]) -> str:
    times, memories = [], []
    for index, run in enumerate(runs):
        dot = "" if len(runs) == 1 else f'<span class="c{_colour(index)} dot"><i></i>{_named(run)}</span>'
        seconds = {label: sum(line.get(name) or 0.0 for line in run.metrics) for label, name in PHASES.items()}
        grown = (run.summary or {}).get("peak_memory_grown_bytes") or {}
        used = {label: [line[name] for line in run.metrics if line.get(name) is not None] for label, name in USE.items()}
        use = ", ".join(f"{format_percent(fmean(values))} {label}" for label, values in used.items() if values)
        times.append(_shares(dot, seconds, format_duration) + (f"<p><small>{use}</small></p>" if use else ""))
        memories.append(_shares(dot, {kind: grown.get(kind, 0) for kind in MEMORY}, format_bytes))
    parts = {"Training time": "".join(times), "What raised the peak of memory": "".join(memories)}
    body = "".join(f"<div><h3>{title}</h3>{part}</div>" for title, part in parts.items() if part)
    return _section("Time and memory", f'<div class="costs">{body}</div>', "costs") if body else ""


def _shares(dot: str, amounts: Mapping[str, float], shown: Callable[[float], str]) -> str:
    """Return one bar divided by `amounts`, with a legend; nothing where there is none."""
    total = sum(amounts.values())
    if total <= 0:
        return ""
    parts = [(number, label, value) for number, (label, value) in enumerate(amounts.items()) if value > total / 1000]
    bar = "".join(f'<i class="p{number}" style="flex-grow:{value / total:.5f}"></i>' for number, _, value in parts)
    items = "".join(
        f'<li><i class="p{number}"></i>{escape(label)} <b>{shown(value)}</b> <small>{format_percent(value / total, ".0f")}</small></li>'
        for number, label, value in parts
    )
    return f'<div class="share">{dot}<b class="total">{shown(total)}</b><div class="stack">{bar}</div><ul>{items}</ul></div>'


def settings(runs: Sequence[Run]) -> str:
    """Return what differs between runs, then the command line, the versions and all options of each."""
    options = [flatten(run.config) for run in runs]

    def row(name: str, values: Sequence[Mapping[str, Any]]) -> str:
        cells = (text(format_value(value[name])) if name in value else MISSING for value in values)
        return f'<th scope="row">{text(name)}</th>' + "".join(f"<td><bdi>{cell}</bdi></td>" for cell in cells)

    parts = []
    if len(runs) > 1:
        names = sorted({name for each in options for name in each if len({repr(other.get(name)) for other in options}) > 1})
        head = (_head("col", index, run) for index, run in enumerate(runs))
        parts.append(f"<h3>What differs</h3>{_table(head, (row(name, options) for name in names))}")
    for run, each in zip(runs, options, strict=True):
        if run.overrides:
            parts.append(f"<p><code><bdi>opd train {' '.join(text(word) for word in run.overrides)}</bdi></code></p>")
        summary = run.summary or {}
        facts = [f"{name} {value}" for name, value in (summary.get("versions") or {}).items()]
        facts += [summary["device"]] if summary.get("device") else []
        if facts:
            parts.append(f'<p class="versions">{text(" · ".join(facts))}</p>')
        title = "All options" if len(runs) == 1 else f"All options of {_named(run)}"
        parts.append(f"<details><summary>{title}</summary>{_table((), (row(name, [each]) for name in each))}</details>")
    return _section("Configuration", "".join(parts), "settings")
