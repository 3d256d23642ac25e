"""E1 and E2: what a first call on the only buffer of all ranks does not show; and what a handle tells of its rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from hal_conformance.checks import holds
from hal_conformance.checks.ep_low_latency import base, few
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_judge import handle_told
from hal_conformance.ep_play import Played, play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import PackedRound, Round, scripts


def _processors(context: Context) -> Step:
    """How many processors this rank's next calls may take."""
    return Step("processors", args={"number": context.rng.choice((1, 2, 7, None))})


@holds("EPN-15")
def unlike_calls(context: Context) -> None:
    """A row of unlike calls on one buffer; each must be right, and is combined at once or after the next dispatch."""
    ep = context.ep
    case = draw(context).base((3, 2, 4))
    calls = draw(context).unlike(case)
    options: list[dict[str, Any]] = [{"bias": 1}, {"bias": 2}, {"alignment": 4}, {"worst": case.ranks * 24}, {}]
    if "expand" in ep.layouts:
        options[2] |= {"expand": True}
    if "float8_e4m3fn" in ep.dtypes and case.hidden % 16 == 0 and case.hidden in ep.row_bytes:
        options[1] |= {"scales": "float32"}
    context.rng.shuffle(options)
    # As the last one in everything but its weights, which are those of no call before.
    calls.append(calls[-1])
    options.append({**options[-1], "weights": ""})
    rounds = [Round(context, call.but(**option)) for call, option in zip(calls, options, strict=True)]

    def steps(rank: int) -> list[Step]:
        found = [rounds[0].dispatch(rank, "dispatch 0")]
        for turn, made in enumerate(rounds):
            if turn + 1 < len(rounds):
                found += [_processors(context), rounds[turn + 1].dispatch(rank, f"dispatch {turn + 1}")]
            found.append(_processors(context))
            found.append(made.combine(rank, f"combine {turn}", of=f"dispatch {turn}"))
        return found

    def arrived(played: Played) -> None:
        for turn, made in enumerate(rounds):
            made.judge_dispatch(played, f"dispatch {turn}")

    played = play(context, rounds[0].case, scripts(calls[0], steps), first=arrived)
    arrived(played)
    for turn, made in enumerate(rounds):
        made.judge_combine(played, f"combine {turn}")


@holds("EPN-16")
def other_buffers(context: Context) -> None:
    """Two buffers of other sizes in turn; a buffer of some of the ranks, whose numbers in it are not the program's."""
    case = draw(context).base((2, 3), bias=1)
    if context.index % 2:
        _part_of_the_ranks(context, Round(context, case), "normal")
        return
    other = draw(context).apart(case)
    rounds = {"buffer": [Round(context, case) for _ in range(2)], "other": [Round(context, other) for _ in range(2)]}

    def steps(rank: int) -> list[Step]:
        found = [Step("open", "other", other.buffer())]
        for turn in range(2):
            for call in ("dispatch", "combine"):
                for name, (first, second) in rounds.items():
                    made, of = (first, second)[turn], f"dispatch {name} {turn}"
                    step = made.dispatch(rank, of) if call == "dispatch" else made.combine(rank, f"combine {of}", of=of)
                    found.append(Step(step.op, step.name, step.args, name))
        return [*found, Step("close", "closed", on="other")]

    def arrived(played: Played) -> None:
        for name, every in rounds.items():
            for turn, made in enumerate(every):
                made.judge_dispatch(played, f"dispatch {name} {turn}")

    played = play(context, case, scripts(case, steps), first=arrived)
    arrived(played)
    for name, every in rounds.items():
        for turn, made in enumerate(every):
            made.judge_combine(played, f"combine dispatch {name} {turn}")


def _part_of_the_ranks(context: Context, made: Round | PackedRound, mode: str) -> None:
    case = made.case
    left_out = context.rng.randrange(case.ranks)
    part = [rank for rank in range(case.ranks + 1) if rank != left_out]

    def script(rank: int) -> list[Step]:
        group = Step("group", "part", {"ranks": part})
        if rank == left_out:
            return [group]
        opened = Step("open", "buffer", case.buffer(mode, group=Ref("part")))
        here = part.index(rank)
        return [group, opened, made.dispatch(here), made.combine(here), Step("close", "close")]

    played = play(context, case, [script(rank) for rank in range(case.ranks + 1)])
    members = Played([played.steps[rank] for rank in part], played.group)
    made.judge_dispatch(members)
    made.judge_combine(members)


@holds("EPN-17")
def what_a_handle_tells(context: Context) -> None:
    """Where rows came from, in both layouts, with padding, rows that never came and dropped ones; of a cached one."""
    ep, kind = context.ep, ("rank", "expand", "worst", "drop", "expand and worst", "expand and drop")[context.index % 6]
    case = draw(context).base((3, 2, 4), routing=("mixed", "zipf", "one", "half")[context.index // 6 % 4])
    if kind.startswith("expand") and "expand" in ep.layouts:
        case = case.but(expand=True, alignment=context.rng.choice((1, 4)))
    if kind.endswith("worst"):
        # In the expand layout a row for every choice, and some padding in every group.
        rows = case.ranks * case.most
        case = case.but(worst=3 + (rows * min(case.topk, case.local) + 3 * case.local if case.expand else rows))
    if kind.endswith("drop") and "drop" in ep.overflow:
        case = case.but(overflow="drop", room=context.rng.randint(1, max(1, sum(case.tokens) // 2)))
    made = Round(context, case)
    again = {"cached": made.again()} if ep.cached_handle else {}
    rounds = {"dispatch": made, **again}

    def steps(rank: int) -> list[Step]:
        found = [
            made.dispatch(rank),
            *(one.dispatch(rank, name, handle=Ref("dispatch")) for name, one in again.items()),
        ]
        for name, one in rounds.items():
            found += [Step("tell", f"told {name}", {"of": name}), one.combine(rank, f"sum of {name}", of=name)]
        return found

    played = play(context, case, scripts(case, steps))
    for name, one in rounds.items():
        for rank in range(case.ranks):
            handle_told(context, case, one.inputs, one.wants, rank, played.result(rank, f"told {name}"), name)
        one.judge_combine(played, f"sum of {name}")


@holds("EPL-20")
def other_low_latency_buffers(context: Context) -> None:
    """Three buffers in turn, two of like sizes, each with two live results and lent memory; one of some of the ranks.

    Results are finished and combined in any order, and looked at once all others are there. A handle is its buffer's.
    """
    case = few(base(context, (2, 3)))
    if context.index % 2:
        _part_of_the_ranks(context, PackedRound(context, case), "low_latency")
        return
    sizes = {"buffer": case, "twin": case, "other": draw(context).apart(case)}
    rounds = {(name, turn): PackedRound(context, size) for turn in range(2) for name, size in sizes.items()}
    order = context.rng.sample(list(rounds), len(rounds))
    hooked: dict[str, Any] = {"return_recv_hook": True} if context.ep.recv_hook else {}

    def steps(rank: int) -> list[Step]:
        def of(key: tuple[str, int], step: Step) -> Step:
            return dataclasses.replace(step, on=key[0])

        found = [Step("open", name, size.buffer("low_latency")) for name, size in sizes.items() if name != "buffer"]
        found += [of(key, made.dispatch(rank, _named("dispatch", key), **hooked)) for key, made in rounds.items()]
        found += [Step("finish", _named("end", key), {"of": _named("dispatch", key)}) for key in order if hooked]
        found.append(rounds["twin", 0].combine(rank, "foreign", of=_named("dispatch", ("twin", 0))))
        lent: dict[tuple[str, int], dict[str, Any]] = {key: {} for key in rounds}
        for key in rounds if context.ep.zero_copy_combine else ():
            handle, name = Ref(_named("dispatch", key)), _named("lent", key)
            found.append(of(key, Step("low_latency_combine_buffer", name, {"handle": handle})))
            found.append(Step("fill", args={"into": name, "value": rounds[key].outputs[rank]}))
            lent[key] = {"x": Ref(name, ""), "zero_copy": True}
        for key in reversed(order):
            name = _named("dispatch", key)
            found.append(Step("look", _named("received", key), {"of": name}))
            found.append(of(key, rounds[key].combine(rank, _named("combine", key), of=name, **lent[key])))
        return [*found, *(Step("close", on=name) for name in sizes if name != "buffer")]

    def arrived(played: Played) -> None:
        for key, made in rounds.items():
            made.judge_dispatch(played, _named("dispatch", key), step=_named("received", key))

    played = play(context, case, scripts(case, steps, "low_latency"), raising=("foreign",), first=arrived)
    refused_alike(context, played, "foreign", "handle", what="another buffer's handle")
    arrived(played)
    for key, made in rounds.items():
        made.judge_combine(played, _named("combine", key))


def _named(call: str, key: tuple[str, int]) -> str:
    return f"{call} {key[1]} of {key[0]}"


@holds("EPL-16")
def both_modes(context: Context) -> None:
    """Calls of both modes in turn on one buffer; in turn with hooks that run after other calls were made."""
    case = base(context)
    packed, plain, third = PackedRound(context, case), Round(context, case.but(cast="none")), PackedRound(context, case)
    late = context.ep.recv_hook and context.index % 2 == 1
    hooked: dict[str, Any] = {"return_recv_hook": True} if late else {}
    done = "finish" if late else "look"

    def steps(rank: int) -> list[Step]:
        return [
            plain.dispatch(rank, "plain"),
            packed.dispatch(rank, "packed", **hooked),
            plain.combine(rank, "combine plain", of="plain", **hooked),
            plain.dispatch(rank, "between"),
            Step(done, "received", {"of": "packed"}),
            Step(done, "summed plain", {"of": "combine plain"}),
            packed.combine(rank, "combine packed", of="packed", **hooked),
            third.dispatch(rank, "third"),
            Step(done, "summed packed", {"of": "combine packed"}),
            third.combine(rank, "combine third", of="third"),
        ]

    played = play(context, case, scripts(case, steps, ("normal", "low_latency")))
    plain.judge_dispatch(played, "plain")
    plain.judge_dispatch(played, "between")
    packed.judge_dispatch(played, "packed", step="received")
    third.judge_dispatch(played, "third")
    plain.judge_combine(played, "combine plain", step="summed plain")
    packed.judge_combine(played, "combine packed", step="summed packed")
    third.judge_combine(played, "combine third")


@holds("EPL-18")
def unlike_low_latency_calls(context: Context) -> None:
    """A row of unlike calls on one buffer, of all declared casts in turn; in between results whose hook never ran."""
    case = base(context, (3, 2, 4))
    casts = context.ep.casts if case.hidden % 16 == 0 and case.hidden in context.ep.row_bytes else (case.cast,)
    calls = draw(context).unlike(case.but(cast=casts[0]))
    calls = [call.but(cast=casts[turn % len(casts)]) for turn, call in enumerate(calls)]
    rounds = [PackedRound(context, call) for call in calls]
    hooked: dict[str, Any] = {"return_recv_hook": True} if context.ep.recv_hook else {}

    def steps(rank: int) -> list[Step]:
        found = []
        for turn, made in enumerate(rounds):
            found += [made.dispatch(rank, f"let go {turn}", **hooked), Step("drop", args={"of": f"let go {turn}"})]
            late = hooked if turn % 2 else {}
            found.append(_processors(context))
            found.append(made.dispatch(rank, f"dispatch {turn}", **late))
            found += [Step("finish" if late else "look", f"received {turn}", {"of": f"dispatch {turn}"})]
            found.append(_processors(context))
            found.append(made.combine(rank, f"combine {turn}", of=f"dispatch {turn}"))
            found.append(Step("drop", args={"of": f"dispatch {turn}"}))
        return found

    def arrived(played: Played) -> None:
        for turn, made in enumerate(rounds):
            made.judge_dispatch(played, f"dispatch {turn}", step=f"received {turn}")

    played = play(context, calls[0], scripts(calls[0], steps, "low_latency"), first=arrived)
    arrived(played)
    for turn, made in enumerate(rounds):
        made.judge_combine(played, f"combine {turn}")
