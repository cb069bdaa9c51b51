"""The doctor's findings on a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.doctor.findings import Report, Status

WIDTH = 130  # characters where there is no terminal to fit into
MARKS = {Status.ok: ("ok", "green"), Status.warn: ("warn", "yellow"), Status.fail: ("FAIL", "bold red")}


def show(report: Report, console: Console | None = None) -> None:
    """A line a finding, its remedy below it, and a prompt as each model sees it where the two differ."""
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
        console.print(side_by_side(report))
    warned = len(report.of(Status.warn))
    if report.ready:
        console.print(Text(f"ready, {warned} to look at" if warned else "ready", style="bold green"))


def side_by_side(report: Report) -> Table:
    """The first prompt, rendered by each model's template."""
    alike = len(set(report.rendered.values())) == 1
    shown = {"first prompt": next(iter(report.rendered.values()))} if alike else report.rendered
    table = Table(show_edge=False, title_justify="left")
    for role in shown:
        table.add_column(role if alike else f"first prompt, {role}'s template", overflow="fold", ratio=1)
    table.add_row(*(Text(text) for text in shown.values()))
    return table
