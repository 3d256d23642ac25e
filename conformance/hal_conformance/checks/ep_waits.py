"""E2: what is counted for the caller: rows that came, and the time that was waited for each rank."""

from __future__ import annotations

from typing import Any, Final

import torch

from hal_conformance.checks import holds
from hal_conformance.checks.ep_calls import PAUSE
from hal_conformance.checks.ep_low_latency import base
from hal_conformance.context import Context
from hal_conformance.cover_ep import endings
from hal_conformance.ep import Step
from hal_conformance.ep_judge import recv_stats
from hal_conformance.ep_play import Played, patiently, play
from hal_conformance.ep_round import ENDS, PackedRound, scripts

_BEFORE: Final = 10**9
"""What a counter of waits holds before the call: more than any call waits, so that what is stored over it is less."""

_CALLS: Final = ("dispatch", "combine")


@holds("EPL-12")
@patiently
def statistics(context: Context, scale: float) -> None:
    """Received counts are added; waits are added in microseconds, and the late rank has the most.

    In turn of calls, of hooks and of events. Before one hook or event every rank computes for longer than one is late.
    """
    case = base(context, (3, 2), routing="distinct")
    made = PackedRound(context, case)
    late = context.rng.randrange(case.ranks)
    ends = endings(context.ep)
    end = ends[context.index % len(ends)]
    computing = context.rng.choice(_CALLS) if end != "call" else ""
    start = torch.arange(case.local, dtype=torch.int32) * 1000

    def ended(call: Step) -> list[Step]:
        computes = [Step("sleep", args={"seconds": 1.5 * PAUSE * scale})] if call.name == computing else []
        return [call, *computes, Step("look" if end == "call" else "finish", f"end of {call.name}", {"of": call.name})]

    def steps(rank: int) -> list[Step]:
        pause = [Step("sleep", args={"seconds": PAUSE * scale})] if rank == late else []
        waits = torch.full((case.ranks,), _BEFORE, dtype=torch.int64)
        counters: dict[str, Any] = {"cumulative_local_expert_recv_stats": start, "dispatch_wait_recv_cost_stats": waits}
        return [
            made.dispatch(rank, "warm"),
            Step("drop", args={"of": "warm"}),
            *pause,
            *ended(made.dispatch(rank, **counters, **ENDS[end])),
            *pause,
            *ended(made.combine(rank, combine_wait_recv_cost_stats=waits, **ENDS[end])),
        ]

    played = play(context, case, scripts(case, steps, "low_latency"))
    made.judge_dispatch(played, step="end of dispatch")
    made.judge_combine(played, step="end of combine")
    for rank in range(case.ranks):
        recv_stats(context, rank, played.result(rank, "end of dispatch"), start + made.wants[rank].count)
        for call in _CALLS:
            _waited(context, played, rank, call, late, PAUSE * scale, call == computing)


def _waited(context: Context, played: Played, rank: int, call: str, late: int, seconds: float, computed: bool) -> None:
    """Note what is wrong with the waits of one rank, where one came so many seconds late."""
    name = f"{call}_wait_recv_cost_stats"
    waits = (played.result(rank, f"end of {call}")[name] - _BEFORE).tolist()
    if min(waits) < 0:
        context.problem(f"rank {rank}: {name} fell to {waits}: microseconds waited are added")
    if rank == late:
        return
    if computed:
        if max(waits) > 0.5e6 * seconds:
            text = f"rank {late} came {seconds} s late, while the caller computed, and {name} says {waits} µs"
            context.problem(f"rank {rank}: {text}; what the hook or event itself waits is counted")
        return
    if not 0.2e6 <= waits[late] / seconds <= 20e6:
        context.problem(f"rank {rank}: rank {late} came {seconds} s late, and {name} says {waits} µs")
    if any(n > waits[late] / 2 for other, n in enumerate(waits) if other != late):
        context.problem(f"rank {rank}: only rank {late} came late, and {name} says {waits} µs")
