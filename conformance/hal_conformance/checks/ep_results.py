"""E2: what becomes of results and handles of the low-latency mode once they were used, and once their buffer closed."""

from __future__ import annotations

from typing import Any

from hal_conformance.checks import holds
from hal_conformance.checks.ep_low_latency import base, few
from hal_conformance.context import Context
from hal_conformance.ep import Step
from hal_conformance.ep_play import Played, play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import PackedRound, scripts


@holds("EPL-21")
def handles_used_again(context: Context) -> None:
    """Combine twice by one handle, with other rows; by an old one, whose memory a later dispatch may have taken.

    Whatever becomes of the old one, live results are what they were, and are two.
    """
    case = few(base(context, (2, 3)))
    first, second, third = (PackedRound(context, case) for _ in range(3))
    again, old, older = (PackedRound(context, case, first.inputs) for _ in range(3))
    hooked: dict[str, Any] = {"return_recv_hook": True} if context.index % 2 and context.ep.recv_hook else {}
    ended = "finish" if hooked else "look"

    def steps(rank: int) -> list[Step]:
        return [
            first.dispatch(rank, "first"),
            first.combine(rank, "combine first", of="first"),
            again.combine(rank, "again", of="first", **hooked),
            Step(ended, "end of again", {"of": "again"}),
            second.dispatch(rank, "second", **hooked),
            old.combine(rank, "old", of="first"),
            Step(ended, "end of second", {"of": "second"}),
            third.dispatch(rank, "third"),
            older.combine(rank, "older", of="first"),
            third.dispatch(rank, "too many"),
            Step("look", "second later", {"of": "second"}),
            Step("look", "third later", {"of": "third"}),
            second.combine(rank, "combine second", of="second"),
            third.combine(rank, "combine third", of="third"),
        ]

    def lasted(played: Played) -> None:
        second.judge_dispatch(played, "a live result after a combine by an old handle", step="second later")
        third.judge_dispatch(played, "a live result after a combine by an old handle", step="third later")

    raising = ("old", "older", "too many")
    played = play(context, case, scripts(case, steps, "low_latency"), raising=raising, first=lasted)
    first.judge_combine(played, "combine first")
    again.judge_combine(played, "a second combine by its handle", step="end of again")
    _right_or_refused(context, played, old, "old")
    _right_or_refused(context, played, older, "older")
    lasted(played)
    refused_alike(context, played, "too many", what="a third live result after a combine by an old handle")
    second.judge_combine(played, "combine second")
    third.judge_combine(played, "combine third")


def _right_or_refused(context: Context, played: Played, made: PackedRound, name: str) -> None:
    """A combine by a handle whose memory may be another's by now."""
    if any(played.texts(name)):
        refused_alike(context, played, name, "handle", what="a combine by an old handle")
    else:
        made.judge_combine(played, "a combine by an old handle", step=name)


@holds("EPL-22")
def results_stay(context: Context) -> None:
    """A live result, its handle and sums after later calls, after close, and beside what a later buffer receives."""
    case = few(base(context, (2, 3)))
    summed, live, *later = (PackedRound(context, case) for _ in range(4))

    def script(rank: int) -> list[Step]:
        def looks(when: str) -> list[Step]:
            return [Step("look", f"{name} {when}", {"of": name}) for name in ("live", "sum")]

        def calls(turn: int) -> list[Step]:
            of = f"later {turn}"
            return [later[turn].dispatch(rank, of), later[turn].combine(rank, f"combine {of}", of=of)]

        return [
            Step("open", "buffer", case.buffer("low_latency")),
            summed.dispatch(rank, "summed"),
            live.dispatch(rank, "live"),
            summed.combine(rank, "sum", of="summed"),
            Step("close"),
            *looks("after close"),
            Step("open", "buffer", case.buffer("low_latency")),
            *calls(0),
            *calls(1),
            *looks("beside a later buffer"),
            Step("close"),
        ]

    played = play(context, case, [script(rank) for rank in range(case.ranks)])
    for when in ("after close", "beside a later buffer"):
        live.judge_dispatch(played, f"a live result {when}", step=f"live {when}")
        summed.judge_combine(played, f"a sum {when}", step=f"sum {when}")
    for turn, made in enumerate(later):
        made.judge_dispatch(played, f"later {turn}")
        made.judge_combine(played, f"combine later {turn}")
