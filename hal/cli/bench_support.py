"""What the bench commands share: options, files, progress, and lines on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli.status import InForce
from hal.cli.text import console, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from hal.bench.rounds import Watcher

BackendOption = Annotated[str | None, typer.Option("--backend", metavar="NAME", help="Overrides HAL_BACKEND.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.")]
RecordOption = Annotated[
    Path | None, typer.Option("--record", metavar="FILE", help="Write every sample and the machine as JSON.")
]
AgainstOption = Annotated[
    Path | None, typer.Option("--against", metavar="FILE", help="Compare with what --json wrote in an earlier run.")
]


def earlier_run(path: Path | None) -> dict[str, Any] | None:
    """The document of ``--against``.

    Raises
    ------
    typer.BadParameter
        It is not one.
    """
    from hal.bench.report import DocumentError, load

    if path is None:
        return None
    try:
        return load(path)
    except DocumentError as error:
        raise typer.BadParameter(str(error), param_hint="'--against'") from None


def require_writable(**files: Path | None) -> None:
    """Find out before the measurement that a result could not be kept; keywords are the options' names.

    Raises
    ------
    typer.BadParameter
        A file cannot be written.
    """
    for option, path in files.items():
        if path is None:
            continue
        target = path if path.exists() else path.absolute().parent
        if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
            raise typer.BadParameter(f"{path} cannot be written", param_hint=f"'--{option}'")


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write a document where one is wanted."""
    from hal.bench import report

    if path is not None:
        report.write(path, document)


def about(chosen: InForce) -> str:
    """What the backend says of itself, who brought it, and who chose it."""
    from hal import plugins

    assert chosen.selected is not None
    status = plugins.registry().status(chosen.selected.name)
    evidence = "" if status.probe is None or status.probe.evidence == "hardware" else f", {status.probe.evidence} only"
    return plain(f"{status.reason}{evidence} ({status.distribution}; {chosen.why})")


def progress_bar() -> Progress:
    """A bar on stderr where that is a terminal; redrawing takes a processor that is being measured, so rarely."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    to = console(stderr=True)
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=to, disable=not to.is_terminal, refresh_per_second=2)


def watcher(progress: Progress) -> Watcher:
    """Let a run move the bar."""
    from rich.progress import TaskID

    from hal.bench.rounds import Watcher

    current: list[TaskID] = []

    def stage(text: str, steps: int) -> None:
        current[:] = [progress.add_task(text, total=steps)]

    return Watcher(stage, lambda: progress.advance(current[0]))


def show(out: Console, lines: Iterable[Text]) -> None:
    """Print lines that are already as wide as they may be."""
    for line in lines:
        out.print(line, soft_wrap=True)
