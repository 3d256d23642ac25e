"""The kill table: every mutant against the suite, every correct backend against fresh seeds."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from hal_conformance.context import Settings
from hal_conformance.process import Secluded, Worker
from hal_conformance.session import RED, Result, Session, fresh_seed
from hal_conformance.table import BY_ID, LEVEL_IDS, OBLIGATIONS, Mode

from mutants.registry import LEFT, Mutant, install, load

WITNESS = Secluded()
"""Judges cases of every backend: it loads none."""

atexit.register(WITNESS.stop)

TESTS = Path(__file__).resolve().parent.parent
_HANGS = ("mutant-probe-hangs", "mutant-hangs-on-long")


@dataclass(frozen=True)
class Kill:
    """What became of one mutant.

    ``level`` is where it died, empty if it survived; ``by`` the obligations that killed it; ``cause`` the likely cause
    the first of them named.
    """

    mutant: Mutant
    level: str
    by: tuple[str, ...]
    cause: str
    message: str
    seconds: float

    @property
    def right(self) -> bool:
        """Died, and in the level that claims it, with the cause named where one is expected."""
        return self.level == self.mutant.level and named(self.mutant, self.cause)


def named(mutant: Mutant, cause: str) -> bool:
    """Whether a cause is one of those that describe the bug."""
    return any(part.lower() in cause.lower() for part in mutant.cause.split("|"))


@contextmanager
def installed() -> Iterator[None]:
    """Make the mutants backends of every worker process started meanwhile."""
    path = os.pathsep.join(filter(None, [_distribution().name, str(TESTS), os.environ.get("PYTHONPATH")]))
    # One host thread: the mutants compute small things, and waking a second thread takes longer than they do.
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        yield


@cache
def _distribution() -> tempfile.TemporaryDirectory[str]:
    """The mutants' metadata, there as long as this process: a worker that is kept reads it again and again."""
    folder = tempfile.TemporaryDirectory()
    install(Path(folder.name))
    return folder


def run(
    backend: str,
    seed: int | None = None,
    patience: float = 1.0,
    until: str = "",
    enough: int = 0,
    worker: Worker | None = None,
    only: str = "",
) -> list[Result]:
    """One quick run, up to the level ``until``, or until ``enough`` obligations have failed.

    With ``only``, instead that obligation as in a default run. A ``worker`` that is given stays, with the ranks it
    started.
    """
    seed = fresh_seed() if seed is None else seed
    mode: Mode = "default" if only else "quick"
    session = Session(Settings(backend, seed, mode, patience=patience), [only] if only else (), witness=WITNESS)
    session.stop_after = 1 if enough else session.stop_after
    session.worker = worker or session.worker
    results: list[Result] = []
    try:
        for obligation in [BY_ID[only]] if only else OBLIGATIONS:
            failed = sum(r.status in RED for r in results)
            if (enough and failed >= enough) or (until and LEVEL_IDS.index(obligation.level) > LEVEL_IDS.index(until)):
                break
            results.append(session.run_one(obligation))
        return results
    finally:
        if worker is None:
            session.close()


def kill(mutant: Mutant, kept: Worker | None = None) -> Kill:
    """Run the suite against one mutant until a level fails; in a worker that is kept, where that stays as it was."""
    started = time.monotonic()
    # What wrong engines do, they do to their ranks: these may serve the next one too.
    worker = kept if mutant.level.startswith("E") and not mutant.tampers else None
    patience = 0.1 if mutant.name in _HANGS else 1.0
    results = run(mutant.name, patience=patience, until=mutant.level, enough=3, worker=worker, only=mutant.only)
    for left in Path(LEFT).parent.glob(f"{Path(LEFT).name}*"):
        left.unlink()
    red = [r for r in results if r.status in RED]
    level = red[0].obligation.level if red else ""
    causes = [f["diagnosis"]["cause"] for r in red for f in r.failures if f.get("diagnosis")]
    best = next((c for c in causes if mutant.cause and named(mutant, c)), causes[0] if causes else "")
    by = tuple(f"{r.id} {r.status}" if r.status != "FAIL" else r.id for r in red)
    message = red[0].message if red else "survived"
    return Kill(mutant, level, by, best, message, time.monotonic() - started)


def table(names: list[str]) -> int:
    """Print the kill table; how many are not killed as they should be."""
    from rich.console import Console

    console = Console(width=max(120, Console().width))
    mutants = [m for m in load().values() if not names or any(n in m.name for n in names)]
    wrong = []
    console.print(f"{'mutant':<34} {'level':<10} {'killed by':<34} {'s':>6}  likely cause named")
    ranks = Worker()
    for one in mutants:
        done = kill(one, ranks)
        by = ", ".join(done.by[:3]) + (f" +{len(done.by) - 3}" if len(done.by) > 3 else "")
        mark = "" if done.right else "  ✗ "
        died = done.level if done.level == one.level else f"{one.level}→{done.level or 'alive'}"
        name = one.name.removeprefix("mutant-")
        line = f"{name:<34} {died:<10} {by or done.message:<34} {done.seconds:6.1f}  {done.cause}"
        console.print(mark + line, highlight=False, soft_wrap=True, style="" if done.right else "red")
        sys.stdout.flush()
        if not done.right:
            wrong.append(done)
    ranks.stop()
    console.print(f"{len(mutants) - len(wrong)} of {len(mutants)} mutants killed in the level that claims them")
    for done in wrong:
        console.print(
            f"  {done.mutant.name}: {done.mutant.story}; {done.message}; cause {done.cause!r}", soft_wrap=True
        )
    return len(wrong)


def survivors(backends: list[str], seeds: int) -> int:
    """Run correct backends with fresh seeds; how many runs raised an alarm."""
    alarms = 0
    for backend in backends:
        for _ in range(seeds):
            seed = fresh_seed()
            started = time.monotonic()
            red = [r for r in run(backend, seed) if r.status in RED]
            took = time.monotonic() - started
            if red:
                alarms += 1
                for result in red:
                    print(f"FALSE ALARM {backend} {result.id}: {result.message}")
                    for failure in result.failures[:1]:
                        print(f"  {failure.get('reproduce')}\n  {failure.get('case')}")
            print(f"{backend:<12} seed {seed:<12} {'ALARM' if red else 'survived':<9} {took:6.1f} s", flush=True)
    return alarms
