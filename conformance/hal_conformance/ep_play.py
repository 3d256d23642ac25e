"""Plays a script on a team of local ranks and notes what no result can excuse: errors, hangs, written guards."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hal_conformance.context import Context, Stop
from hal_conformance.ep import CALLS, Done, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ranks import GroupResult, Team

_TEAMS: Final[dict[int, Team]] = {}
_LIMIT: Final = 25.0


@dataclass(frozen=True, slots=True)
class Played:
    """What became of every step of every rank; a rank that was meant to die has none."""

    steps: list[dict[str, Done]]
    group: GroupResult

    def __getitem__(self, at: tuple[int, str]) -> Done:
        rank, name = at
        return self.steps[rank][name]

    def result(self, rank: int, name: str) -> dict[str, Any]:
        """The tensors and numbers a step gave."""
        return self.steps[rank][name].result

    def texts(self, name: str) -> list[str]:
        """What the step raised on each rank, with its type; empty where it raised nothing."""
        found = [steps[name].raised for steps in self.steps if name in steps]
        return ["" if r is None else f"{r['type']}: {r['text']}" for r in found]


def team(world: int) -> Team:
    """The ranks of this size; new ones where the last ones failed."""
    found = _TEAMS.get(world)
    if found is None or not found.whole:
        if found is not None:
            found.close()
        found = _TEAMS[world] = Team(world)
    return found


@atexit.register
def _close() -> None:
    for one in _TEAMS.values():
        one.close()
    _TEAMS.clear()


def play(
    context: Context,
    case: EpCase,
    scripts: Sequence[Sequence[Step]],
    *,
    raising: Collection[str] = (),
    mortal: Collection[int] = (),
    timeout: float = _LIMIT,
    first: Callable[[Played], None] | None = None,
) -> Played:
    """Play one script a rank.

    Parameters
    ----------
    context : Context
    case : EpCase
        For the record.
    scripts : sequence of sequence of Step
    raising : collection of str
        Names of steps that may raise.
    mortal : collection of int
        Ranks that are meant to die or to stop.
    timeout : float
        Seconds for the whole.
    first : callable, optional
        Judges what was returned before a call raised, which may tell why.

    Raises
    ------
    Stop
        A rank died or hangs, or a call raised that must not: the problems are noted.
    """
    record = context.record
    if not record.problems:
        record.case = case.to_dict()
    payloads = [{"script": list(s), "backend": context.backend, "device": context.device} for s in scripts]
    limit = timeout * max(1.0, context.settings.patience)

    def ask() -> GroupResult:
        return team(len(scripts)).ask("hal_conformance.ep:play", payloads, limit, mortal)

    group: GroupResult = ask() if context.tape is None else context.tape.through(ask)
    record.calls += sum(step.op in CALLS for script in scripts for step in script)
    values = [{"steps": [], "launches": {}} if value is None else value for value in group.values]
    played = Played([_by_name(value["steps"]) for value in values], group)
    if group.message:
        context.problem(group.message)
        raise Stop
    wrong = False
    said: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        record.add_launches(value["launches"])
        for done in value["steps"]:
            record.seconds += done.end - done.begin if done.name else 0.0
            for text in done.problems:
                said.setdefault(f"{done.name}: {text}", []).append(rank)
            if done.raised is not None and done.name not in raising:
                wrong = True
                said.setdefault(f"{done.name} raised {done.raised['type']}: {done.raised['text']}", []).append(rank)
    if wrong and first is not None:
        first(played)
    for text, ranks in said.items():
        context.problem(f"{_ranks(ranks)}: {text}")
    if wrong:
        raise Stop
    called = any(step.op in CALLS for script in scripts for step in script)
    if called and any(case.tokens) and not mortal and not any(value["launches"] for value in values):
        context.problem("no kernel of this backend was launched: something else moved these rows")
    return played


def patiently(check: Callable[[Context, float], None]) -> Callable[[Context], None]:
    """Give a check that goes by the clock a second chance with longer times, for machines that are busy."""

    def run(context: Context) -> None:
        for scale in (1.0, 3.0):
            context.restart()
            with contextlib.suppress(Stop):
                check(context, scale)
            if not context.record.problems:
                return

    run.__doc__ = check.__doc__
    return run


def _by_name(steps: Sequence[Done]) -> dict[str, Done]:
    return {done.name: done for done in steps if done.name}


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
