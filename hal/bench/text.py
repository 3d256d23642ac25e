"""Words and figures of a run: lines of at most 80 columns, with or without a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich.text import Text

from hal.bench.machine import Machine
from hal.bench.report import Change
from hal.bench.stats import Spread

WIDTH: Final = 80
NOISY: Final = 1.25
BUSY: Final = 0.05


@dataclass(frozen=True, slots=True)
class Attendance:
    """A peer, and whether it takes part.

    Attributes
    ----------
    name, summary, install : str
    lacks : tuple of str
        What of the interface it never does.
    what : str
        Its version and variant, empty if it is out.
    out : str
        Why it is out, empty if it takes part.
    """

    name: str
    summary: str
    install: str
    lacks: tuple[str, ...]
    what: str
    out: str

    def lines(self) -> Iterator[Text]:
        """What it is, or the reason and the line that installs it."""
        if self.out:
            install = f" ({self.install})" if self.install else ""
            yield from wrapped(f"  {self.name:<13} not here: {self.out}{install}", style="yellow", indent=16)
        else:
            lacks = f"; does not do: {', '.join(self.lacks)}" if self.lacks else ""
            yield from wrapped(f"  {self.name:<13} {self.summary}; {self.what}{lacks}", indent=16)


def heading(machine: Machine, backend: str, peers: Iterable[Attendance]) -> Iterator[Text]:
    """What is measured where, and who takes part."""
    for line in [f"backend {backend}: {machine.device}", *machine.lines()]:
        yield from wrapped(line)
    if machine.load > machine.cores:
        warning = "the machine is shared with other work: see below how much of it that took"
        yield from wrapped(warning, style="yellow")
    for peer in peers:
        yield from peer.lines()


def limit_line(name: str, rate: Spread, unit: str, note: str) -> Text:
    """One limit."""
    return Text(f"  {name:<11}{short(rate.p50):>6} ({span(rate)}) {unit}".ljust(42) + note)


WAITING: Final = (
    ": every time is too long, and most of all those of long calls and of kernels whose threads wait for each other, "
    "so that ratios are off too. Repeat on a quiet machine before quoting any, or use --threads 1 --clock cpu"
)
UNCOUNTED: Final = ", and of its caches and its bandwidth an unknown part; their processor time is not counted here"


def disturbance(rates: Iterable[Spread], others: float | None, meaning: str = "") -> Iterator[Text]:
    """How quiet the machine was: what others took of it, what that means, and how much its own limits varied."""
    if others is not None:
        busy = others > BUSY
        text = f"  other processes took {others:.0%} of the processors while this was timed"
        yield from wrapped(text + (meaning if busy else ""), style="yellow" if busy else "")
    worst = max((rate.p90 / rate.p10 for rate in rates), default=1.0)
    if worst > NOISY:
        yield from wrapped(
            f"  disturbed: a limit of the machine varied by ×{worst:.2f} (p90/p10) during the run, so do its fractions",
            style="yellow",
        )


def comparison(made: Sequence[Change], alone: Sequence[str], unit: str = "ms") -> Iterator[Text]:
    """A run against an earlier one."""
    yield Text()
    yield Text("against the earlier run: above 1 is better now; 'of limit' cancels the", style="bold")
    yield Text("speed of the machine, whose limits were measured in both runs", style="bold")
    yield Text(f"  {'case':<38}{f'{unit} then':>10}{f'{unit} now':>10}{'time':>8}{'of limit':>10}")
    for change in made:
        style = "green" if change.fraction > 1.05 else "red" if change.fraction < 0.95 else ""
        text = f"  {change.name:<38}{short(change.before):>10}{short(change.after):>10}"
        yield Text.assemble(text, (f"{change.faster:>8.2f}{change.fraction:>10.2f}", style))
    for name in alone:
        yield Text(f"  {name:<38}no numbers in one of the two", style="dim")


def span(spread: Spread, unit: float = 1.0) -> str:
    """From p10 to p90."""
    return f"{short(spread.p10 * unit)}–{short(spread.p90 * unit)}"


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def times(value: float) -> str:
    """A ratio: two digits after the point where it is small."""
    return f"{value:.2f}" if value < 10 else short(value)


def wrapped(line: str, style: str = "", indent: int = 2) -> Iterator[Text]:
    """The line in pieces of at most 80 columns."""
    for text in textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False):
        yield Text(text, style=style)
