"""E2: results, handles and lent memory of the low-latency mode: used, used again, and once their buffer closed."""

from __future__ import annotations

from typing import Any

from hal_conformance.checks import holds
from hal_conformance.checks.ep_low_latency import base, few
from hal_conformance.context import Context
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
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


@holds("EPL-08")
def zero_copy(context: Context) -> None:
    """Rows written into lent memory, of one result after the other; in turn of two that live at once.

    In every third case of memory that was lent before the hook, asked for twice, and lent again for a second combine.
    """
    case = base(context)
    if context.index % 3 == 2:
        _lent_again(context, case)
        return
    turns = [PackedRound(context, case) for _ in range(2)]
    at_once = context.index % 2 == 1

    def steps(rank: int) -> list[Step]:
        lent, summed = [], []
        for turn, made in enumerate(turns):
            lend = Step("low_latency_combine_buffer", f"lent {turn}", {"handle": Ref(f"dispatch {turn}")})
            fill = Step("fill", args={"into": f"lent {turn}", "value": made.outputs[rank]})
            combine = made.combine(rank, f"combine {turn}", of=f"dispatch {turn}", zero_copy=True)
            summed.append(Step(combine.op, combine.name, {**combine.args, "x": Ref(f"lent {turn}", "")}))
            lent.append([made.dispatch(rank, f"dispatch {turn}"), lend, fill])
        if at_once:
            return [*lent[0], *lent[1], *reversed(summed)]
        return [*lent[0], summed[0], *lent[1], summed[1]]

    played = play(context, case, scripts(case, steps, "low_latency"))
    for turn, made in enumerate(turns):
        made.judge_dispatch(played, f"dispatch {turn}")
        made.judge_combine(played, f"combine {turn}")


def _lent_again(context: Context, case: EpCase) -> None:
    """Memory is one handle's from its dispatch to its combine, however often it is asked for; then there is other."""
    made = PackedRound(context, case)
    again = PackedRound(context, case, made.inputs)
    hooked: dict[str, Any] = {"return_recv_hook": True} if context.ep.recv_hook else {}

    def lend(name: str) -> Step:
        return Step("low_latency_combine_buffer", name, {"handle": Ref("dispatch")})

    def summed(one: PackedRound, rank: int, name: str, filled: str, given: str) -> list[Step]:
        fill = Step("fill", args={"into": filled, "value": one.outputs[rank]})
        combine = one.combine(rank, name, zero_copy=True)
        return [fill, Step(combine.op, combine.name, {**combine.args, "x": Ref(given, "")})]

    def steps(rank: int) -> list[Step]:
        found = [made.dispatch(rank, **hooked), lend("early")]
        found += [Step("finish" if hooked else "look", "received", {"of": "dispatch"}), lend("twice")]
        found += summed(made, rank, "combine", "early", "twice")
        return [*found, lend("anew"), *summed(again, rank, "combine again", "anew", "anew")]

    played = play(context, case, scripts(case, steps, "low_latency"))
    made.judge_dispatch(played, step="received")
    made.judge_combine(played)
    again.judge_combine(played, "combine again")
