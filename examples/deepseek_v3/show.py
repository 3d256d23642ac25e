"""What the terminal shows: token ids as they come, a progress bar, tokens per second, and the verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from examples.deepseek_v3.check import Verdict
from examples.deepseek_v3.engine import Progress as Stepped
from examples.deepseek_v3.scheduler import Request

_TAIL: Final = 12


class Stream:
    """Shows one run while it goes on; a context manager.

    On a terminal the last tokens of every prompt that is being answered move above a progress bar. Each prompt that is
    complete is printed with all its token ids, unless the run is a repetition.

    Parameters
    ----------
    out : Console
    title : str
    requests : sequence of Request
    repeats : bool
        The same tokens were shown before.
    """

    def __init__(self, out: Console, title: str, requests: Sequence[Request], repeats: bool) -> None:
        self._out, self._repeats = out, repeats
        self._requests = {request.number: request for request in requests}
        self._tokens: dict[int, list[int]] = {request.number: [] for request in requests}
        self._running: dict[int, int] = {}
        self._start: float | None = None
        self._progress = Progress(
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=out,
        )
        total = sum(request.new_tokens for request in requests)
        self._task = self._progress.add_task(title, total=total, speed="starting")
        self._live = Live(self._progress, console=out, transient=True, auto_refresh=False, redirect_stdout=False)
        self._shown = out.is_terminal

    def __enter__(self) -> Stream:
        if self._shown:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._live.stop()

    def add(self, step: Stepped) -> None:
        """Take in one step of one rank."""
        now = time.perf_counter()
        if self._start is None:
            self._start = now
        for number in step.joined:
            self._running[number] = step.step
        for number, token in step.tokens:
            self._tokens[number].append(token)
        for number in step.left:
            joined = self._running.pop(number)
            if not self._repeats:
                self._print(number, joined, step)
        if self._shown:
            done = sum(map(len, self._tokens.values()))
            speed = f"{done / (now - self._start):.0f} tokens/s" if now > self._start else ""
            self._progress.update(self._task, completed=done, speed=speed)
            self._live.update(Group(self._tails(), self._progress), refresh=True)

    def _print(self, number: int, joined: int, step: Stepped) -> None:
        length = len(self._requests[number].prompt)
        head = f"prompt {number}, {length} tokens, rank {step.rank}, steps {joined} to {step.step}:"
        self._out.print(Text.assemble((head, "dim"), " ", " ".join(map(str, self._tokens[number]))), soft_wrap=True)

    def _tails(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(no_wrap=True)
        for number in sorted(self._running):
            tokens = self._tokens[number]
            text = " ".join(map(str, tokens[-_TAIL:])) if tokens else "reading the prompt"
            grid.add_row(f"prompt {number}", ("… " if len(tokens) > _TAIL else "") + text)
        return grid


def print_rows(out: Console, rows: dict[str, str]) -> None:
    """Names and what there is to say of them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=9, style="dim")
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        grid.add_row(name, text)
    out.print(grid)


def print_verdicts(out: Console, verdicts: Iterable[Verdict]) -> bool:
    """One line a check as it is decided: PASS or FAIL, what it demands, what was found. Whether all passed."""
    passed = True
    with out.status("comparing with transformers"):
        for verdict in verdicts:
            passed &= verdict.passed
            mark = ("PASS", "bold green") if verdict.passed else ("FAIL", "bold red")
            out.print(Text.assemble(mark, f"  {verdict.demand} ", (f"({verdict.found})", "dim")), soft_wrap=True)
    return passed
