"""E3: ranks that die, stop, come late or leave."""

from __future__ import annotations

import os
from pathlib import Path

from hal_conformance.checks import holds
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.ep import Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_play import Played, patiently, play
from hal_conformance.ep_round import scripts
from hal_conformance.ep_turns import calls, in_turn, named_as

PATIENCE = 2.0
"""``timeout`` of buffers whose ranks fail."""

LATE = 4.0
"""The same where a rank is only late."""

SHORT = 1.0
"""The same where all are idle for longer."""

SLACK = 3.0
"""Seconds a busy machine may be late with a RankFailure."""


def usual(context: Context, ranks: tuple[int, ...], **changes: object) -> EpCase:
    """A case of usual sizes, with rows that every declared mode takes."""
    return draw(context).base(ranks, cast=draw(context).cast(), **changes)


def _named(context: Context, played: Played, culprit: int, within: float, names: list[str]) -> None:
    """Every other rank raised a RankFailure with the culprit's number, in time, and raises one ever after."""
    for rank, steps in enumerate(played.steps):
        if rank == culprit:
            continue
        made = [steps[name] for name in names if name in steps]
        failed = [done for done in made if done.raised is not None]
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
        elif not raised.get("phase"):
            context.problem(f"rank {rank}: {first.name} does not say in which phase rank {culprit} failed")
        if first.end - first.begin > within + SLACK:
            context.problem(
                f"rank {rank}: {first.name} raised only after {first.end - first.begin:.1f} s; timeout is {within:g} s"
            )
            context.record.diagnosis = context.record.diagnosis or {"cause": "the timeout is not kept"}
        later = made[made.index(first) + 1 :]
        quiet = [done.name for done in later if done.raised is None]
        if quiet:
            context.problem(f"rank {rank}: after the failure {quiet[0]} returned as if nothing had been")
        slow = [done.name for done in later if done.end - done.begin > within]
        if slow:
            context.problem(f"rank {rank}: after the failure {slow[0]} waited again for a rank known to have failed")


def _fatal(context: Context, case: EpCase, dying: list[Step], scale: float, spared: int = 0, low: bool = False) -> None:
    """One rank, none of the first ``spared``, does ``dying`` before a call, of the low-latency mode if told so.

    It leaves while the others go on: what comes after its dying it does as far as it gets, and the last round it has no
    part in. Of two cases each it leaves in a round with hooks, in one without, and in the first.
    """
    made = in_turn(context, case)
    culprit = context.rng.randrange(spared, case.ranks)
    turns = 4
    mode = made.modes[-1] if low else made.modes[0]
    turn = (1 + context.index // 2) % (turns - 1)
    before = context.rng.choice([name for name in calls(made.steps(0, turns), mode) if name.endswith(f" {turn}")])

    def steps(rank: int) -> list[Step]:
        if rank != culprit:
            return made.steps(rank, turns)
        work = made.steps(rank, turns - 1)
        at = [step.name for step in work].index(before)
        return work[:at] + dying + work[at:] + [Step("sleep", args={"seconds": 0.02})]

    whole = scripts(case, steps, made.modes, timeout=PATIENCE * scale)
    names = calls(made.steps(0, turns))
    played = play(context, case, whole, raising=names, mortal=(culprit,), timeout=30.0 * scale)
    _named(context, played, culprit, PATIENCE * scale, names)
    if turn:
        # The first round was over when it left; whoever was late may have heard of it in there.
        first = calls(made.steps(0, 1))
        others = [rank for rank in range(case.ranks) if rank != culprit]
        made.judge(played, 1, ranks=[r for r in others if all(played[r, name].raised is None for name in first)])


@holds("EPX-10")
@patiently
def killed(context: Context, scale: float) -> None:
    """Killed between calls, or at any moment while calls go on; in turn of the normal and of the low-latency mode."""
    sudden = Step("die_after", args={"seconds": context.rng.random() * 0.01})
    dying = sudden if context.index % 2 else Step("die")
    _fatal(context, usual(context, (3, 2, 4)), [dying], scale, low=bool((context.index + context.index // 2) % 2))


@holds("EPX-11")
@patiently
def stopped(context: Context, scale: float) -> None:
    """Stopped, as by a debugger: it lives, and does not answer."""
    _fatal(context, usual(context, (2, 3)), [Step("stop")], scale, low=context.index % 2 == 1)


@holds("EPX-12")
@patiently
def slow(context: Context, scale: float) -> None:
    """Late by less than the timeout: waited for, and nobody is named. All idle for longer, and late with hooks."""
    if context.index % 2:
        _idle(context, scale)
        return
    case = usual(context, (2, 3))
    made = in_turn(context, case)
    whole = made.steps(0, 2)
    # Before a call, for which the others then wait; not before a step of its own.
    waited = [i for i, step in enumerate(whole) if i and step.name in calls(whole)]
    late, at = context.rng.randrange(case.ranks), context.rng.choice(waited)

    def steps(rank: int) -> list[Step]:
        work = made.steps(rank, 2)
        pause = Step("sleep", args={"seconds": 0.4 * LATE * scale})
        return [*work[:at], pause, *work[at:]] if rank == late else work

    made.judge(play(context, case, scripts(case, steps, made.modes, timeout=LATE * scale)), 2)


def _idle(context: Context, scale: float) -> None:
    """Nobody fails who owes nothing: before a call, and between a call and its hook, longer than the timeout."""
    case = usual(context, (2, 3))
    made = in_turn(context, case)
    timeout = SHORT * scale
    idle = Step("sleep", args={"seconds": 1.3 * timeout})

    def steps(rank: int) -> list[Step]:
        found = made.steps(rank, 1)
        if made.packed is not None and made.hooks:
            late = made.packed.dispatch(rank, "late", return_recv_hook=True)
            found += [late, idle, Step("finish", "late hook", {"of": "late"})]
            found.append(made.packed.combine(rank, "sum", of="late"))
        found.append(idle)
        return [*found, Step("barrier"), *made.steps(rank, 1, "{} after")]

    played = play(context, case, scripts(case, steps, made.modes, timeout=timeout))
    made.judge(played, 1)
    if made.packed is not None and made.hooks:
        made.packed.judge_dispatch(played, "late", step="late hook")
        made.packed.judge_combine(played, "sum")
    made.judge(played, 1, "{} after")


@holds("EPX-13")
@patiently
def left(context: Context, scale: float) -> None:
    """A rank that closes its buffer while the others go on is named."""
    case = usual(context, (2, 3))
    made = in_turn(context, case)
    culprit = context.rng.randrange(case.ranks)
    quiet = [Step("close"), Step("sleep", args={"seconds": PATIENCE * scale + 1})]

    def steps(rank: int) -> list[Step]:
        work = made.steps(rank, 2)
        return work[: len(work) // 2] + quiet if rank == culprit else work

    names = calls(made.steps(0, 2))
    whole = scripts(case, steps, made.modes, timeout=PATIENCE * scale)
    played = play(context, case, whole, raising=names)
    _named(context, played, culprit, PATIENCE * scale, names)


@holds("EPX-15")
@patiently
def killed_across_nodes(context: Context, scale: float) -> None:
    """A rank killed on one node is named, by its number in the whole group, on all nodes, in either mode."""
    case = draw(context).across((4,), cast=draw(context).cast())
    # Its number in the group differs from that in its node, but for every other pair of cases.
    assert case.per_node is not None
    spared = 0 if context.index // 2 % 2 else case.per_node
    _fatal(context, case, [Step("die")], scale, spared=spared, low=context.index % 2 == 1)


@holds("EPX-16")
@patiently
def nothing_left(context: Context, scale: float) -> None:
    """No memory, no file with a name is left, however the ranks ended."""
    case = usual(context, (2, 3))
    made = in_turn(context, case)
    culprit = context.rng.randrange(case.ranks)
    kill = context.index % 2 == 0
    names = calls(made.steps(0, 2))

    def script(rank: int) -> list[Step]:
        opened = Step("open", "buffer", case.buffer(made.modes, timeout=PATIENCE * scale))
        work = made.steps(rank, 2)
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
    case = usual(context, (2, 3))
    made = in_turn(context, case)
    late = context.rng.randrange(case.ranks)
    names = calls(made.steps(0, 1, "first {}"))

    def script(rank: int) -> list[Step]:
        first = [named_as("{}", step, "old") for step in made.steps(rank, 1, "first {}")]
        opened = Step("open", "old", case.buffer(made.modes, timeout=scale))
        slow = [Step("sleep", args={"seconds": 3.0 * scale})] if rank == late else []
        # The late rank finds that it was given up; all go on with a new buffer.
        again = Step("open", "buffer", case.buffer(made.modes, timeout=10.0))
        return [opened, *slow, *first, Step("close", on="old"), again, *made.steps(rank, 1), Step("close")]

    played = play(context, case, [script(rank) for rank in range(case.ranks)], raising=names)
    for rank in range(case.ranks):
        raised = played[rank, names[0]].raised
        if rank != late and (raised is None or raised.get("rank") != late):
            context.problem(f"rank {rank}: {names[0]} did not name rank {late}, which was three times its timeout late")
    made.judge(played, 1)
