"""E3: ranks that die, stop, come late or leave."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from hal_conformance.checks import holds
from hal_conformance.checks.ep_nodes import modes
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.ep import CALLS, Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_play import Played, patiently, play
from hal_conformance.ep_round import PackedRound, Round, normal, scripts

PATIENCE = 2.0
"""``timeout`` of buffers whose ranks fail."""

LATE = 4.0
"""The same where a rank is only late."""

SLACK = 3.0
"""Seconds a busy machine may be late with a RankFailure."""


def _work(made: Round, packed: PackedRound | None, rank: int, turns: int) -> list[Step]:
    """So many rounds of all declared calls."""
    found = []
    for turn in range(turns):
        found += [made.dispatch(rank, f"dispatch {turn}"), made.combine(rank, f"combine {turn}", of=f"dispatch {turn}")]
        if packed is not None:
            found.append(packed.dispatch(rank, f"packed {turn}"))
            found.append(packed.combine(rank, f"summed {turn}", of=f"packed {turn}"))
            found.append(Step("drop", args={"of": f"packed {turn}"}))
    return found


def _rounds(context: Context, case: EpCase, absent: Collection[int] = ()) -> tuple[Round, PackedRound | None]:
    both = "low_latency" in context.ep.modes and case.per_node is None
    cast = "none" if "none" in context.ep.casts else context.ep.casts[0]
    made = Round(context, case, absent=absent)
    return made, PackedRound(context, case.but(cast=cast), made.inputs, absent) if both else None


def _named(context: Context, played: Played, culprit: int, within: float, names: list[str]) -> None:
    """Every other rank raised a RankFailure with the culprit's number, in time, and raises one ever after."""
    for rank, steps in enumerate(played.steps):
        if rank == culprit:
            continue
        calls = [steps[name] for name in names if name in steps]
        failed = [done for done in calls if done.raised is not None]
        if not failed:
            context.problem(f"rank {rank}: no call raised RankFailure although rank {culprit} was gone")
            continue
        first = failed[0]
        raised = first.raised or {}
        if raised["type"] != "RankFailure":
            context.problem(
                f"rank {rank}: {first.name} raised {raised['type']} instead of RankFailure for rank {culprit}: "
                f"{raised['text']}"
            )
        elif raised.get("rank") != culprit:
            context.problem(
                f"rank {rank}: {first.name} names rank {raised.get('rank')}, but rank {culprit} failed: "
                f"{raised['text']}"
            )
            if context.record.diagnosis is None:
                local = culprit % 2 == raised.get("rank")
                context.record.diagnosis = {
                    "cause": "the wrong rank is named"
                    + (": it is numbered within its node" if local else "")
                    + (": it names itself" if raised.get("rank") == rank else "")
                }
        if first.end - first.begin > within + SLACK:
            context.problem(
                f"rank {rank}: {first.name} raised only after {first.end - first.begin:.1f} s; timeout is {within:g} s"
            )
            context.record.diagnosis = context.record.diagnosis or {"cause": "the timeout is not kept"}
        later = calls[calls.index(first) + 1 :]
        quiet = [done.name for done in later if done.raised is None]
        if quiet:
            context.problem(f"rank {rank}: after the failure {quiet[0]} returned as if nothing had been")
        slow = [done.name for done in later if done.end - done.begin > within]
        if slow:
            context.problem(f"rank {rank}: after the failure {slow[0]} waited again for a rank known to have failed")


def _calls(steps: list[Step]) -> list[str]:
    return [step.name for step in steps if step.op in CALLS]


def _fatal(context: Context, case: EpCase, dying: list[Step], scale: float, spared: int = 0) -> None:
    """One rank, none of the first ``spared``, does ``dying`` between two rounds, or while they go on."""
    made, packed = _rounds(context, case)
    culprit = context.rng.randrange(spared, case.ranks)
    turns, after = 4, context.rng.randrange(3)

    def steps(rank: int) -> list[Step]:
        work = _work(made, packed, rank, turns)
        if rank == culprit:
            at = len(work) * after // 4
            work = work[:at] + dying + work[at:]
        return work

    whole = scripts(case, steps, modes(packed), timeout=PATIENCE * scale)
    names = _calls(_work(made, packed, 0, turns))
    played = play(context, case, whole, raising=names, mortal=(culprit,), timeout=30.0 * scale)
    _named(context, played, culprit, PATIENCE * scale, names)
    first = _calls(_work(made, packed, 0, turns))[0]
    if after and first == "dispatch 0":
        whole_ranks = [r for r in range(case.ranks) if r != culprit and first in played.steps[r]]
        others = [r for r in whole_ranks if played[r, first].raised is None]
        made.judge_dispatch(played, first, ranks=others)


@holds("EPX-10")
@patiently
def killed(context: Context, scale: float) -> None:
    """Killed between calls, or at any moment while calls go on."""
    case = draw(context).base((3, 2, 4))
    sudden = [Step("die_after", args={"seconds": context.rng.random() * 0.01})]
    if context.index % 2:
        # Enough work that it does not end before.
        sudden.append(Step("sleep", args={"seconds": 0.002}))
        sudden = [*sudden, Step("sleep", args={"seconds": 0.02})]
    _fatal(context, case, sudden if context.index % 2 else [Step("die")], scale)


@holds("EPX-11")
@patiently
def stopped(context: Context, scale: float) -> None:
    """Stopped, as by a debugger: it lives, and does not answer."""
    case = draw(context).base((2, 3))
    _fatal(context, case, [Step("stop")], scale)


@holds("EPX-12")
@patiently
def slow(context: Context, scale: float) -> None:
    """Late by less than the timeout: waited for, and nobody is named."""
    case = draw(context).base((2, 3))
    made, packed = _rounds(context, case)
    late, at = context.rng.randrange(case.ranks), context.rng.randrange(1, 5)

    def steps(rank: int) -> list[Step]:
        work = _work(made, packed, rank, 2)
        pause = Step("sleep", args={"seconds": 0.4 * LATE * scale})
        return [*work[:at], pause, *work[at:]] if rank == late else work

    played = play(context, case, scripts(case, steps, modes(packed), timeout=LATE * scale))
    for turn in range(2):
        made.judge_dispatch(played, f"dispatch {turn}")
        made.judge_combine(played, f"combine {turn}")


@holds("EPX-13")
@patiently
def left(context: Context, scale: float) -> None:
    """A rank that closes its buffer while the others go on is named."""
    case = draw(context).base((2, 3))
    made, packed = _rounds(context, case)
    culprit = context.rng.randrange(case.ranks)
    quiet = [Step("close"), Step("sleep", args={"seconds": PATIENCE * scale + 1})]

    def steps(rank: int) -> list[Step]:
        work = _work(made, packed, rank, 2)
        return work[: len(work) // 2] + quiet if rank == culprit else work

    names = _calls(_work(made, packed, 0, 2))
    whole = scripts(case, steps, modes(packed), timeout=PATIENCE * scale)
    played = play(context, case, whole, raising=names)
    _named(context, played, culprit, PATIENCE * scale, names)


@holds("EPX-14")
@patiently
def masked(context: Context, scale: float) -> None:
    """The others carry on without a dead rank, as if it had never been there; and without one masked by hand."""
    case = draw(context).base((3, 4), routing="distinct")
    if case.ranks < 3:
        case = draw(context).base((3,))
    if case.ranks == 1:
        # Nobody can be missed.
        normal(context, case)
        return
    culprit = context.rng.randrange(case.ranks)
    by_hand = context.index % 2 == 1
    whole, whole_packed = _rounds(context, case)
    made = Round(context, case, whole.inputs, absent={culprit})
    cast = "none" if "none" in context.ep.casts else context.ep.casts[0]
    packed = None
    if whole_packed is not None:
        packed = PackedRound(context, case.but(cast=cast), whole.inputs, absent={culprit})

    def steps(rank: int) -> list[Step]:
        start = _work(whole, whole_packed, rank, 1)
        if rank == culprit:
            return [*start, Step("sleep", args={"seconds": 60.0}) if by_hand else Step("die")]
        mask = [Step("set_mask", "mask", {"rank": culprit})] if by_hand else []
        # The call under way when the rank dies may have its rows or not; those after it must not.
        lost = [] if by_hand else [Step("dispatch", "under way", made.dispatch(rank).args)]
        again = _work(made, packed, rank, 2)
        renamed = [_named_as("{} without", step) for step in again]
        found = [*start, *mask, *lost, *renamed, Step("masked", "masks")]
        if by_hand:
            found += [Step("set_mask", "", {"rank": culprit, "masked": False}), Step("masked", "masks after")]
        return found

    script = scripts(case, steps, modes(packed), timeout=PATIENCE * scale, mask_ranks=True)
    played = play(context, case, script, raising=("under way",), mortal=(culprit,))
    rest = [rank for rank in range(case.ranks) if rank != culprit]
    for turn in range(2):
        made.judge_dispatch(played, f"dispatch {turn} without", ranks=rest)
        made.judge_combine(played, f"combine {turn} without", ranks=rest)
        if packed is not None:
            packed.judge_dispatch(played, f"packed {turn} without", ranks=rest)
            packed.judge_combine(played, f"summed {turn} without", ranks=rest)
    for rank in rest:
        said = played.result(rank, "masks")["value"]
        if said != [r == culprit for r in range(case.ranks)]:
            context.problem(f"rank {rank}: masked() is {said}, but only rank {culprit} is gone")
        if by_hand and any(played.result(rank, "masks after")["value"]):
            context.problem(f"rank {rank}: masked() still names a rank after its mask was lifted")


def _named_as(name: str, step: Step, on: str = "buffer") -> Step:
    """A step on a buffer whose result, and those it refers to, have other names: ``name`` with the old one put in."""
    args = {k: Ref(name.format(v.name), v.field) if isinstance(v, Ref) else v for k, v in step.args.items()}
    if "of" in args:
        args["of"] = name.format(args["of"])
    return Step(step.op, name.format(step.name) if step.name else "", args, on)


@holds("EPX-15")
@patiently
def killed_across_nodes(context: Context, scale: float) -> None:
    """A rank killed on one node is named, by its number in the whole group, on all nodes."""
    case = draw(context).across((4,))
    # Its number in the group differs from that in its node, but for every other case.
    assert case.per_node is not None
    _fatal(context, case, [Step("die")], scale, spared=0 if context.index % 2 else case.per_node)


@holds("EPX-16")
@patiently
def nothing_left(context: Context, scale: float) -> None:
    """No memory, no file with a name is left, however the ranks ended."""
    case = draw(context).base((2, 3))
    made, packed = _rounds(context, case)
    culprit = context.rng.randrange(case.ranks)
    kill = context.index % 2 == 0
    names = _calls(_work(made, packed, 0, 2))

    def script(rank: int) -> list[Step]:
        opened = Step("open", "buffer", case.buffer(modes(packed), timeout=PATIENCE * scale))
        work = _work(made, packed, rank, 2)
        half = len(work) // 2
        found = [Step("files", "before"), opened, *work[:half], Step("files", "files")]
        if kill and rank == culprit:
            return [*found, Step("sleep", args={"seconds": 0.5}), Step("die")]
        return [*found, Step("sleep", args={"seconds": 0.2}), *work[half:], Step("close")]

    # The dead rank cannot tell what it had open; it says so while it lives, and its peers have the same windows.
    played = play(
        context,
        case,
        [script(rank) for rank in range(case.ranks)],
        raising=names if kill else (),
        mortal=(culprit,) if kill else (),
        timeout=30.0 * scale,
    )
    left: dict[str, int] = {}
    for rank, steps in enumerate(played.steps):
        if "files" not in steps:
            continue
        new = set(steps["files"].result["files"]) - set(steps["before"].result["files"])
        left |= {path: rank for path in sorted(new) if os.path.lexists(path)}
    for path, rank in list(left.items())[:3]:
        folder = str(Path(path).parent)
        context.problem(f"rank {rank}: memory named in {folder} is left behind after the ranks are gone")
        context.record.diagnosis = context.record.diagnosis or {
            "cause": "the name is removed by close() only, or never"
        }
    pids = {steps["files"].result["pid"] for steps in played.steps if "files" in steps}
    segments = _segments(pids)
    if segments:
        context.problem(f"{segments} System V shared memory segments of the ranks are left behind")


def _segments(pids: set[int]) -> int:
    try:
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(int(line.split()[4]) in pids for line in lines)


@holds("EPX-17")
@patiently
def later_buffer(context: Context, scale: float) -> None:
    """After a failure, and after a refused call, another buffer of the same group works."""
    case = draw(context).base((2, 3))
    made, packed = _rounds(context, case)
    late = context.rng.randrange(case.ranks)
    names = [f"first {name}" for name in _calls(_work(made, packed, 0, 1))]

    def script(rank: int) -> list[Step]:
        first = [_named_as("first {}", step, "old") for step in _work(made, packed, rank, 1)]
        opened = Step("open", "old", case.buffer(modes(packed), timeout=scale))
        slow = [Step("sleep", args={"seconds": 3.0 * scale})] if rank == late else []
        # The late rank finds that it was given up; all go on with a new buffer.
        again = Step("open", "buffer", case.buffer(modes(packed), timeout=10.0))
        return [opened, *slow, *first, Step("close", on="old"), again, *_work(made, packed, rank, 1), Step("close")]

    played = play(context, case, [script(rank) for rank in range(case.ranks)], raising=names)
    for rank in range(case.ranks):
        raised = played[rank, names[0]].raised
        if rank != late and (raised is None or raised.get("rank") != late):
            context.problem(f"rank {rank}: {names[0]} did not name rank {late}, which was three times its timeout late")
    made.judge_dispatch(played, "dispatch 0")
    made.judge_combine(played, "combine 0")
