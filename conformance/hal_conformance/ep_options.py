"""Calls as a case has their options: how they end, what they write to, what they count, and memory that was lent."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Final

import torch

from hal_conformance.context import Context
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_judge import recv_stats, written
from hal_conformance.ep_play import Played
from hal_conformance.ep_round import ENDS, PackedRound, placed

_TIMES: Final = 20.0
"""How much more than the time there was may be counted as waited: clocks of devices go as they like."""

_MEANWHILE: Final = 0.02
"""Seconds in which what is done behind the caller's back is done, before its hook runs."""


def _sent(op: str) -> tuple[str, ...]:
    """What a call has sent when it returns a hook; choices, weights and biases of a combine are read until that ran."""
    return ("x",) if op.endswith("combine") else ("x", "topk_idx", "topk_weights")


def ended(case: EpCase, step: Step) -> list[Step]:
    """A call and what completes it; once it has what it was given, that is used for something else."""
    step = dataclasses.replace(step, args={**step.args, **ENDS[case.finish]})
    found = [step]
    if case.finish != "call":
        if case.finish == "hook":
            found.append(Step("spoil", args={"of": step.name, "names": _sent(step.op)}))
            found.append(Step("sleep", args={"seconds": _MEANWHILE}))
        found.append(Step("finish", f"end of {step.name}", {"of": step.name}))
    # What came is looked at when what was sent is something else.
    return [*found, Step("spoil", args={"of": step.name}), Step("look", taken(step.name), {"of": step.name})]


def taken(name: str) -> str:
    """The step whose results are those of the call of this name."""
    return f"what {name} gave"


def _received_before(case: EpCase) -> torch.Tensor:
    """Counters of rows that came before."""
    return torch.arange(case.local, dtype=torch.int32) * 1000


def packed_calls(made: PackedRound, rank: int) -> list[Step]:
    """A low-latency dispatch and its combine, with whatever its case asks for."""
    case = made.case
    counters: dict[str, Any] = {}
    if case.statistics:
        counters["cumulative_local_expert_recv_stats"] = _received_before(case)
        counters["dispatch_wait_recv_cost_stats"] = torch.zeros(case.ranks, dtype=torch.int64)
    found = ended(case, made.dispatch(rank, **counters))
    flags: dict[str, Any] = {}
    if case.out != "none":
        out = torch.full((case.tokens[rank], case.hidden), 7.0).to(case.torch_dtype)
        flags["out"] = placed(case.but(pad=max(case.pad, 3)) if case.out == "padded" else case.but(pad=0), out)
    if case.zero_copy:
        found.append(Step("low_latency_combine_buffer", "lent", {"handle": Ref("dispatch")}))
        found.append(Step("fill", args={"into": "lent", "value": made.outputs[rank]}))
        flags |= {"x": Ref("lent", ""), "zero_copy": True}
    return found + ended(case, made.combine(rank, **flags))


def judge_packed(
    context: Context, played: Played, made: PackedRound, name: str = "{}", ranks: Collection[int] | None = None
) -> None:
    """Compare what came of `packed_calls`; ``name`` is what the names of its steps were put into."""
    case = made.case
    received, summed = (name.format(taken(call)) for call in ("dispatch", "combine"))
    made.judge_dispatch(played, name.format("dispatch"), ranks=ranks, step=received)
    made.judge_combine(played, name.format("combine"), ranks=ranks, step=summed)
    for rank in range(case.ranks) if ranks is None else ranks:
        if case.statistics:
            got = played.result(rank, received)
            recv_stats(context, rank, got, _received_before(case) + made.wants[rank].count)
            seconds = played[rank, received].end - played[rank, name.format("dispatch")].begin
            waits = got["dispatch_wait_recv_cost_stats"].tolist()
            if min(waits) < 0 or max(waits) > 1e6 * _TIMES * (1 + seconds):
                text = f"dispatch_wait_recv_cost_stats says {waits} µs"
                context.problem(f"rank {rank}: {text} of a call that was over in {seconds:.2f} s")
        if case.out != "none":
            written(context, rank, played.result(rank, summed))
