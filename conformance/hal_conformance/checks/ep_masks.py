"""E3: ranks that the others carry on without, and that take part again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from hal_conformance.checks import holds
from hal_conformance.checks.ep_faults import PATIENCE, usual
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.cover_ep import endings
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import TIMEOUT, EpCase
from hal_conformance.ep_judge import handle_told
from hal_conformance.ep_options import judge_packed, packed_calls
from hal_conformance.ep_play import Played, patiently, play
from hal_conformance.ep_requirements import masks_cross
from hal_conformance.ep_round import PackedRound, Round, scripts
from hal_conformance.ep_turns import calls, in_turn, named_as

TOGETHER = Step("barrier")
"""Masks are each rank's own: that all have theirs before the next call is the caller's business."""


def _masks(ranks: Collection[int], masked: bool = True) -> list[Step]:
    return [Step("set_mask", "", {"rank": rank, "masked": masked}) for rank in sorted(ranks)]


def _by_hand(context: Context, case: EpCase, lost: Collection[int], scale: float) -> None:
    """Some ranks are masked by hand; the others have two rounds without them, as fast as if they had never been."""
    whole = in_turn(context, case)
    made = in_turn(context, case, whole.inputs, lost)

    def steps(rank: int) -> list[Step]:
        start = whole.steps(rank, 1)
        if rank in lost:
            return [*start, TOGETHER, TOGETHER]
        again = made.steps(rank, 2, "{} without")
        after = [*_masks(lost, False), Step("masked", "masks after"), TOGETHER]
        return [*start, TOGETHER, *_masks(lost), *again, Step("masked", "masks"), *after]

    played = play(context, case, scripts(case, steps, whole.modes, timeout=PATIENCE * scale, mask_ranks=True))
    rest = [rank for rank in range(case.ranks) if rank not in lost]
    made.judge(played, 2, "{} without", rest)
    _told(context, played, case, rest)
    for rank in rest:
        if any(played.result(rank, "masks after")["value"]):
            context.problem(f"rank {rank}: masked() still names a rank after its mask was lifted")
    _at_once(context, played, rest, calls(made.steps(0, 2, "{} without")), PATIENCE * scale / 2)


def _lost(context: Context, case: EpCase, lost: Sequence[int], scale: float) -> None:
    """One rank after the other is gone before a call; the others make that one too, and two rounds without it.

    The call is in turn any of either mode, by its hook or not. In every other case the first is not dead but stopped.
    """
    whole = in_turn(context, case)
    parts = [whole] + [in_turn(context, case, whole.inputs, lost[: i + 1]) for i in range(len(lost))]
    turns = 2
    names = calls(whole.steps(0, turns))
    # All calls come in turn: 3 has no divisor in common with how many there are.
    at = [names[(len(names) - 2 + 3 * (context.index // 2 * 2 + i)) % len(names)] for i in range(len(lost))]
    stops = context.index // 2 % 2 == 1

    def steps(rank: int) -> list[Step]:
        found: list[Step] = []
        for i, (before, after) in enumerate(pairwise(parts)):
            work = before.steps(rank, turns)
            upto = [step.name for step in work].index(at[i])
            if rank == lost[i]:
                gone = Step("stop" if stops and i == 0 else "die")
                return found + [named_as(f"{{}} before loss {i}", step) for step in work[:upto]] + [gone]
            # The call under way may have its rows or not; those after it must not.
            left = [step for step in work[upto:] if step.op == "drop"]
            found += [named_as(f"{{}} before loss {i}", step) for step in [*work[: upto + 1], *left]]
            found += after.steps(rank, turns, f"{{}} after loss {i}")
        return [*found, Step("masked", "masks")]

    script = scripts(case, steps, whole.modes, timeout=PATIENCE * scale, mask_ranks=True)
    played = play(context, case, script, mortal=lost, timeout=30.0 * scale)
    rest = [rank for rank in range(case.ranks) if rank not in lost]
    for i, part in enumerate(parts[1:]):
        part.judge(played, turns, f"{{}} after loss {i}", rest)
    _told(context, played, case, rest)


def _told(context: Context, played: Played, case: EpCase, rest: Collection[int]) -> None:
    """masked() names all ranks but the rest."""
    gone = ", ".join(str(rank) for rank in range(case.ranks) if rank not in rest)
    for rank in rest:
        said = played.result(rank, "masks")["value"]
        if said != [r not in rest for r in range(case.ranks)]:
            context.problem(f"rank {rank}: masked() is {said}, but only {gone} of {case.ranks} ranks are gone")


def _at_once(
    context: Context, played: Played, ranks: Collection[int], names: Collection[str], within: float = TIMEOUT / 2
) -> None:
    """Nobody waits for a rank that is masked by hand."""
    for rank in ranks:
        took = {name: played[rank, name].end - played[rank, name].begin for name in names}
        slow = max(took, key=lambda name: took[name])
        if took[slow] > within:
            context.problem(f"rank {rank}: {slow} took {took[slow]:.1f} s, as if it had waited for a masked rank")


@holds("EPX-14")
@patiently
def masked(context: Context, scale: float) -> None:
    """The others carry on without dead ranks, as if these had never been there; and without one masked by hand."""
    by_hand = context.index % 2 == 1
    case = usual(context, (3, 4) if by_hand else (4,), routing="distinct")
    if case.ranks < 3:
        case = usual(context, (3,), routing="distinct")
    if by_hand or case.ranks == 1:
        _by_hand(context, case, _some(context, case, 1), scale)
    else:
        _lost(context, case, _some(context, case, 2), scale)


@holds("EPX-20")
@patiently
def masked_across_nodes(context: Context, scale: float) -> None:
    """The same over nodes: two ranks masked by hand, of one node or of two; a dead one."""
    case = draw(context).across((4,), alone=context.index % 4 == 2, routing="distinct", cast=draw(context).cast())
    if context.index % 2 == 0:
        _by_hand(context, case, _some(context, case, 2), scale)
    else:
        _lost(context, case, _some(context, case, 1), scale)


def _some(context: Context, case: EpCase, most: int) -> list[int]:
    """So many ranks, but not all."""
    return context.rng.sample(range(case.ranks), min(most, case.ranks - 1))


@holds("EPX-18")
def masked_with_options(context: Context) -> None:
    """Two masked ranks: layouts, scales, casts and fixed numbers of rows; handles of before, and new ones.

    Low-latency calls end in every way, and in turn count, write where they are told and take lent memory.
    """
    ep = context.ep
    fp8 = "normal" in ep.modes and draw(context).sends_fp8()
    case = usual(context, (4, 3), scales="float32" if fp8 else "", routing="distinct").but(scales="")
    lost = _some(context, case, 2)
    rest = [rank for rank in range(case.ranks) if rank not in lost]
    modes = tuple(mode for mode in ("normal", "low_latency") if mode in ep.modes)
    early = [Round(context, case.but(cast="none", bias=1))] if "normal" in modes else []
    rounds = {f"rows {i}": Round(context, one, None, lost) for i, one in enumerate(_options(context, case, fp8))}
    cached = {"cached": early[0].again(absent=lost)} if early and ep.cached_handle else {}
    first = [PackedRound(context, case)] if "low_latency" in modes else []
    packed = [PackedRound(context, one, None, lost) for one in _packed_options(context, case)] if first else []

    def steps(rank: int) -> list[Step]:
        found = [one.dispatch(rank, "early") for one in early] + [one.dispatch(rank, "first") for one in first]
        found.append(TOGETHER)
        if rank in lost:
            return [*found, TOGETHER]
        found += _masks(lost)
        for name, one in cached.items():
            found.append(one.dispatch(rank, name, handle=Ref("early")))
        for name, one in rounds.items():
            found.append(one.dispatch(rank, name))
        for name, one in {**cached, **rounds}.items():
            found.append(Step("tell", f"told {name}", {"of": name}))
            found.append(one.combine(rank, f"sum of {name}", of=name))
        found += [one.combine(rank, "sum of early", of="early") for one in early]
        found += [one.combine(rank, "sum of first", of="first") for one in first]
        found += [Step("drop", args={"of": "first"})] * len(first)
        for i, low in enumerate(packed):
            found += [named_as(f"{{}} of packed {i}", step) for step in packed_calls(low, rank)]
            found.append(Step("drop", args={"of": f"dispatch of packed {i}"}))
        return [*found, TOGETHER]

    played = play(context, case, scripts(case, steps, modes, mask_ranks=True))
    for name, one in {**cached, **rounds}.items():
        one.judge_dispatch(played, name, ranks=rest)
        one.judge_combine(played, f"sum of {name}", ranks=rest)
        for rank in rest:
            handle_told(context, one.case, one.inputs, one.wants, rank, played.result(rank, f"told {name}"), name, lost)
    for one in early:
        one.without(lost).judge_combine(played, "sum of early", ranks=rest)
    for low in first:
        low.without(lost).judge_combine(played, "sum of first", ranks=rest)
    for i, low in enumerate(packed):
        judge_packed(context, played, low, f"{{}} of packed {i}", rest)
    made = steps(rest[0])[len(early) + len(first) :]
    _at_once(context, played, rest, calls(made) + [step.name for step in made if step.op == "finish"])


def _options(context: Context, case: EpCase, fp8: bool) -> list[EpCase]:
    """What a normal dispatch may ask for, declared and of the rows of a case."""
    if "normal" not in context.ep.modes:
        return []
    case = case.but(cast="none")
    worst = case.ranks * case.most + context.rng.randrange(3)
    found = [case.but(alignment=4), case.but(worst=worst, bias=2)]
    if "expand" in context.ep.layouts:
        groups = worst * min(case.topk, case.local) + 3 * case.local
        found += [case.but(expand=True, bias=1), case.but(expand=True, alignment=4, worst=groups)]
    if fp8:
        found += [one.but(scales=("float32", "int32")[i % 2]) for i, one in enumerate(found)]
    context.rng.shuffle(found)
    return found


def _packed_options(context: Context, case: EpCase) -> list[EpCase]:
    """What low-latency calls may ask for: every declared cast, every end, and half of the rest each."""
    casts = draw(context).casts() if case.hidden % 16 == 0 else [case.cast]
    ends = endings(context.ep)
    found = []
    for i in range(max(len(casts), len(ends), 2)):
        other = (i + context.index) % 2 == 1
        lent, out = other and context.ep.zero_copy_combine, "none" if other else ("contiguous", "padded")[i // 2 % 2]
        one = case.but(cast=casts[i % len(casts)], finish=ends[i % len(ends)], statistics=i % len(ends) > 0 or other)
        found.append(one.but(zero_copy=lent, out=out))
    return found


@holds("EPX-19")
def lifted(context: Context) -> None:
    """Masks set and lifted at once; two parts that carry on, each without the other, and then together again."""
    across = masks_cross(context.ep) and context.index % 2 == 1
    case = draw(context).across((4,), cast=draw(context).cast()) if across else usual(context, (3, 4))
    away = set(_some(context, case, 1 + context.index // 2 % 2))
    rest = set(range(case.ranks)) - away
    before, unmasked, together = (in_turn(context, case) for _ in range(3))
    apart = in_turn(context, case, absent=away)
    parts = {True: in_turn(context, case, apart.inputs, rest), False: apart}

    def steps(rank: int) -> list[Step]:
        others, part = rest if rank in away else away, parts[rank in away]
        found = [*before.steps(rank, 1), TOGETHER, *_masks(others), *_masks(others, False), TOGETHER]
        found += [*unmasked.steps(rank, 1, "{} unmasked"), TOGETHER, *_masks(others), *part.steps(rank, 2, "{} apart")]
        found += [TOGETHER, *_masks(others, False), TOGETHER, *together.steps(rank, 2, "{} together")]
        return [*found, Step("masked", "masks")]

    played = play(context, case, scripts(case, steps, before.modes, mask_ranks=True))
    before.judge(played, 1)
    unmasked.judge(played, 1, "{} unmasked")
    for is_away, part in parts.items():
        part.judge(played, 2, "{} apart", sorted(away if is_away else rest))
    together.judge(played, 2, "{} together")
    for rank in range(case.ranks):
        if any(played.result(rank, "masks")["value"]):
            context.problem(f"rank {rank}: masked() names a rank although every mask was lifted")
    _at_once(context, played, range(case.ranks), calls(apart.steps(0, 2, "{} apart")))
