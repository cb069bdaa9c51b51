"""Show the findings of `opd doctor` in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.doctor.findings import Report, Status

WIDTH = 130  # characters, where the output is not a terminal
MARKS = {Status.ok: ("ok", "green"), Status.warn: ("warn", "yellow"), Status.fail: ("FAIL", "bold red")}


def show(report: Report, console: Console | None = None) -> None:
    """Print each finding with its remedy, then the first prompt as each model sees it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        mark, style = MARKS[finding.status]
        text = Text(finding.what)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="cyan")
        table.add_row(Text(mark, style=style), Text(finding.check), text)
    console.print(table)
    if report.rendered:
        texts = {f"first prompt, {role}'s template": text for role, text in report.rendered.items()}
        if len(set(texts.values())) == 1:
            texts = {"first prompt": next(iter(texts.values()))}
        prompts = Table(show_edge=False)
        for title in texts:
            prompts.add_column(title, overflow="fold", ratio=1)
        prompts.add_row(*map(Text, texts.values()))
        console.print(prompts)
    if report.ready:
        warnings = len(report.of(Status.warn))
        console.print(Text(f"ready, {warnings} to look at" if warnings else "ready", style="bold green"))
