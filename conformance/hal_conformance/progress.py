"""A run as it is seen in a terminal: a bar, and a line for every obligation that is through."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hal_conformance.session import RED, Result, Session
from hal_conformance.table import OBLIGATIONS

_COLOURS = {
    "PASS": "green",
    "REFUSED": "green",
    "WAIVED": "yellow",
    "UNCOVERED": "yellow",
    "BLOCKED": "dim",
    "SKIPPED": "dim",
}


def play(session: Session, console: Console) -> None:
    """Run all that was chosen, with a bar."""
    chosen = [o.id for o in session.chosen()]
    with _progress(console) as progress:
        task = progress.add_task("", total=None)

        def step(name: str, done: int, planned: int) -> None:
            # A bar that is full has ended, and its clock stands still.
            if done < planned:
                where = f"{name}, {chosen.index(name) + 1} of {len(chosen)}"
                progress.update(task, description=where, completed=done, total=planned)

        for obligation in OBLIGATIONS:
            _say(progress.console, session.run_one(obligation, step))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _say(console: Console, result: Result) -> None:
    # A blocked level is one line of the summary, not one an obligation.
    if result.status in ("SKIPPED", "BLOCKED"):
        return
    colour = _COLOURS.get(result.status, "bold red")
    title = result.obligation.title
    console.print(
        f"  [{colour}]{result.status:<9}[/] {result.id}  {title} [dim]({result.seconds:.1f} s)[/]", highlight=False
    )
    if result.status in RED:
        for failure in result.failures[:1]:
            cause = (failure.get("diagnosis") or {}).get("cause")
            if cause:
                console.print(f"            [bold]likely cause: {cause}[/]", highlight=False, soft_wrap=True)
            console.print(f"            {failure['problems'][0]}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"            {failure['reproduce']}", highlight=False, markup=False, soft_wrap=True)
        if not result.failures:
            console.print(f"            {result.message}", highlight=False, markup=False, soft_wrap=True)
