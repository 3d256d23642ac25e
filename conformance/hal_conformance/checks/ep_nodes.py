"""E3: several nodes are like one."""

from __future__ import annotations

from typing import Any

import torch

from hal_conformance.checks import holds
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_judge import laid_out
from hal_conformance.ep_play import play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import PackedRound, Round, scripts
from hal_conformance.ep_turns import in_turn


def modes(packed: PackedRound | None) -> tuple[str, ...]:
    """The modes of a buffer for normal calls, and low-latency ones if there are any."""
    return ("normal",) if packed is None else ("normal", "low_latency")


def _nodes(context: Context, **changes: object) -> EpCase:
    ranks = (6,) if context.index % 6 == 5 else (4, 2) if context.index % 3 else (4,)
    return draw(context).across(ranks, alone=context.index % 4 == 3, **changes)


@holds("EPX-01")
def nodes_like_one(context: Context) -> None:
    """The oracle of one node is that of several, whatever the options of a call; in low latency too where declared."""
    expand = "expand" in context.ep.layouts and context.index % 2 == 1
    routing = ("mixed", "zipf", "distinct", "one", "half")[context.index % 5]
    case = _nodes(context, bias=context.index % 3, expand=expand, routing=routing)
    if context.index % 4 == 0:
        case = case.but(tokens=(0, *case.tokens[1:]))
    if context.index % 3 == 1:
        case = case.but(alignment=4)
    elif context.index % 3 == 2 and not expand:
        case = case.but(worst=case.ranks * case.most + context.rng.randrange(3))
    packed = None
    if context.index % 4 == 2 and draw(context).sends_fp8():
        case = draw(context).sized(case.but(scales="float32"))
    elif "low_latency" in context.ep.across_nodes:
        # With columns that are legal for both.
        casts = draw(context).casts()
        case = draw(context).sized(case.but(cast=casts[context.index % len(casts)]))
        packed = PackedRound(context, case)
        case = case.but(cast="none")
    made = Round(context, case)
    handle = Ref("dispatch") if context.ep.cached_handle and context.index % 2 == 0 else None
    other = Round(context, case) if handle is None else made.again()

    def steps(rank: int) -> list[Step]:
        found = [made.dispatch(rank), other.dispatch(rank, "other", handle=handle), made.combine(rank)]
        found.append(other.combine(rank, "sum", of="other"))
        if packed is not None:
            found += [packed.dispatch(rank, "packed"), packed.combine(rank, "summed", of="packed")]
        return [*found, Step("layout", "layout", {"topk_idx": made.inputs[rank].topk_idx})]

    played = play(context, case, scripts(case, steps, modes(packed)))
    made.judge_dispatch(played)
    other.judge_dispatch(played, "other", earlier=() if handle is None else made.inputs)
    made.judge_combine(played)
    other.judge_combine(played, "sum")
    if packed is not None:
        packed.judge_dispatch(played, "packed")
        packed.judge_combine(played, "summed")
    for rank in range(case.ranks):
        laid_out(context, case, made.inputs[rank], rank, played.result(rank, "layout"))


@holds("EPX-02")
def pre_reduced(context: Context) -> None:
    """Sums of each node first, then the nodes in top-k order: seen with three addends or more, the bias one of them."""
    topk = [n for n in (5, 4, 6, 3) if n in context.ep.topk]
    bias, alone = 1 + context.index // 2 % 2, context.index % 2 == 1
    ranks = (6,) if context.index % 4 == 2 else (4,)
    case = draw(context).across(ranks, alone=alone, pre_reduce=True, routing="distinct", weights="", bias=bias)
    case = case.but(topk=topk[0] if topk else case.topk)
    made = Round(context, case)
    played = play(context, case, scripts(case, lambda r: [made.dispatch(r), made.combine(r)]))
    made.judge_dispatch(played)
    made.judge_combine(played)


@holds("EPX-03")
def wrong_calls_across_nodes(context: Context) -> None:
    """Misuse on a rank of one node is told on all nodes, in either mode."""
    case = draw(context).across((4,), cast=draw(context).cast())
    case = case.but(tokens=tuple(context.rng.randint(3, 6) for _ in range(case.ranks)))
    both = in_turn(context, case)
    made = (both.packed if context.index % 3 == 1 else None) or both.normal or both.packed
    assert made is not None
    odd = context.rng.randrange(case.ranks)
    other = torch.bfloat16 if case.dtype == "float32" else torch.float32
    wrong: dict[str, Any] = {
        "x": made.inputs[odd].x.to(other),
        "topk_idx": torch.full_like(made.inputs[odd].topk_idx, case.experts),
    }
    if made is both.normal:
        wrong["expert_alignment"] = 4
    elif {"none", "fp8"} <= set(context.ep.casts) and case.hidden % 16 == 0:
        wrong["use_fp8"] = True

    def steps(rank: int) -> list[Step]:
        found = []
        for argument, value in wrong.items():
            right = made.dispatch(rank, f"right {argument}")
            changed = {**right.args, argument: value} if rank == odd else right.args
            found += [Step(right.op, f"wrong {argument}", changed), right, Step("drop", args={"of": right.name})]
        return found

    names = [f"wrong {argument}" for argument in wrong]
    played = play(context, case, scripts(case, steps, both.modes), raising=names)
    for argument in wrong:
        if refused_alike(context, played, f"wrong {argument}", argument, what=f"a wrong {argument} on rank {odd}"):
            made.judge_dispatch(played, f"right {argument}")
