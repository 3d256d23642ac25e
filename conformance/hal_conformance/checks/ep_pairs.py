"""E1, E2 and E3: every pair of notable values in one call of expert parallelism, judged bit for bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Final

from hal.spec.capability import EpCapabilities
from hal_conformance import cover_ep
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.cover import Cover, Labels
from hal_conformance.covers import at
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_judge import laid_out
from hal_conformance.ep_options import ended, judge_packed, packed_calls, taken
from hal_conformance.ep_play import play
from hal_conformance.ep_round import PackedRound, Round, scripts

Plan = Callable[[EpCapabilities, bool], Cover[EpCase]]

_QUICK: Final = 8
"""Cases of a quick run: the first of a plan bring most pairs together."""

_QUICK_NODES: Final = 3
"""The same over several nodes, where a case takes longer."""

_LONG: Final = 1024
"""Columns up to which any are drawn."""

_MANY: Final = 256
"""Experts up to which any are drawn."""

_PACKED: Final = 500_000
"""Experts times columns times tokens of a rank that a low-latency case may have where each is drawn by itself."""


def _cover(context: Context, plan: Plan, nodes: bool) -> Cover[EpCase]:
    return plan(at(context.ep, context.settings.ranks), nodes)


def _count(plan: Plan, nodes: bool) -> Callable[[Context], int]:
    def count(context: Context) -> int:
        settings = context.settings
        return _cover(context, plan, nodes).count(settings.seed, settings.mode, _QUICK_NODES if nodes else _QUICK)

    return count


def _case(context: Context, plan: Plan, nodes: bool) -> tuple[EpCase, Labels]:
    cover = _cover(context, plan, nodes)
    row = cover.row(context.settings.seed, context.index)
    case = realise(context.rng, context.ep, cover.chosen(row))
    return case, cover.labels(case)


def realise(rng: random.Random, declared: EpCapabilities, chosen: dict[str, str]) -> EpCase:
    """A case of these kinds; whatever they leave open is drawn."""
    ranks = int(chosen["ranks"])
    scaled = cover_ep.scaled_in(chosen)
    topk, width = rng.choice(cover_ep.topk_for(declared, chosen["topk"], chosen["buffer's topk"] == "wider"))
    experts = cover_ep.experts_for(declared, chosen["experts of a rank"], ranks)
    columns = cover_ep.columns_for(declared, chosen["columns"], cover_ep.itemsize(chosen["dtype"]), scaled)
    low, high = cover_ep.TOKENS[chosen["tokens"]]
    if "cast" in chosen and experts[0] * columns[0] * high > _PACKED:
        # Every expert has room for what every rank may send: what is large is no larger than it must be.
        experts, columns, high = experts[:1], columns[:1], min(high, low + 2)
    tokens = _tokens(rng, ranks, chosen["tokens"], low, high)
    case = EpCase(
        ranks=ranks,
        experts=_near_the_least(rng, experts, _MANY),
        topk=topk,
        width=width,
        hidden=_near_the_least(rng, columns, _LONG),
        tokens=tokens,
        capacity=max(*tokens, 1) + rng.randint(1, 4) if chosen["room"] == "more" else 0,
        dtype=chosen["dtype"],
        routing=chosen["routing"],
        data=chosen["data"],
        weights=chosen["weights"].replace("none", ""),
        pad=rng.choice((8 * rng.randint(1, 3), rng.randint(1, 7))) if chosen["rows"] == "padded" else 0,
        start=rng.choice((0, rng.randint(1, 7))),
        finish=chosen["finish"],
    )
    if "ranks of a node" in chosen:
        case = case.but(per_node=rng.choice(cover_ep.sizes_of(declared, ranks, chosen["ranks of a node"])))
    return _packed(case, chosen) if "cast" in chosen else _normal(rng, case, chosen)


def _tokens(rng: random.Random, ranks: int, kind: str, low: int, high: int) -> tuple[int, ...]:
    special = rng.randrange(ranks)
    if kind == "none on a rank":
        return tuple(0 if rank == special else rng.randint(low, high) for rank in range(ranks))
    if kind == "65… on a rank":
        return tuple(rng.randint(low, high) if rank == special else rng.randint(1, 17) for rank in range(ranks))
    return tuple(rng.randint(low, high) for _ in range(ranks))


def _near_the_least(rng: random.Random, found: list[int], any_up_to: int) -> int:
    """Any of them up to a bound; beyond it one that is not much larger than it must be."""
    return rng.choice([n for n in found if n <= max(any_up_to, found[0] * 5 // 4)])


def _normal(rng: random.Random, case: EpCase, chosen: dict[str, str]) -> EpCase:
    low, high = cover_ep.ALIGNMENT[chosen["expert_alignment"]]
    case = case.but(
        scales=chosen["scales"].replace("none", ""),
        expand=chosen["layout"] == "expand",
        alignment=rng.randint(low, high),
        bias=int(chosen["bias"]),
        handle=chosen["handle"],
        back=chosen["weights back"] == "yes",
        pre_reduce=chosen.get("pre_reduce") == "yes",
    )
    if chosen["overflow"] == "drop":
        case = case.but(overflow="drop", room=rng.randint(1, max(1, sum(case.tokens) * 2 // 3)))
    elif chosen["overflow"] == "grow":
        case = case.but(overflow="grow", room=rng.randint(1, 3))
    if chosen["num_worst_tokens"] == "yes":
        rows = case.ranks * case.most
        if case.expand:
            # A row for every choice, and in every group some padding at most.
            rows = rows * min(case.topk, case.local) + case.local * (case.alignment - 1)
        case = case.but(worst=rows + rng.randrange(3))
    return case


def _packed(case: EpCase, chosen: dict[str, str]) -> EpCase:
    return case.but(
        cast=chosen["cast"],
        zero_copy=chosen["zero_copy"] == "yes",
        out=chosen["out"],
        statistics=chosen["statistics"] == "yes",
    )


def _normal_pairs(context: Context, nodes: bool) -> None:
    case, row = _case(context, cover_ep.normal, nodes)
    first = Round(context, case)
    made = first.again(weights=context.index % 3 > 0) if case.handle == "cached" else first
    # A cached dispatch has nothing to do with the handle's rows; the earlier result is combined after it.
    every = {"dispatch": first} if made is first else {"dispatch": first, "cached": made}
    elsewhere = context.rng.random() < 0.3

    def steps(rank: int) -> list[Step]:
        found = [Step("layout", "layout", {"topk_idx": first.inputs[rank].topk_idx})]
        for name, one in every.items():
            found += ended(case, one.dispatch(rank, name, handle=None if one is first else Ref("dispatch")))
            found.append(Step("scribble", args={"of": name}))
        for name, one in reversed(every.items()):
            combine = one.combine(rank, f"sum of {name}", of=name)
            found += ended(case, dataclasses.replace(combine, elsewhere=elsewhere))
        return found

    played = play(context, case, scripts(case, steps))
    for name, one in every.items():
        one.judge_dispatch(played, name, step=taken(name), earlier=() if one is first else first.inputs)
        one.judge_combine(played, f"sum of {name}", step=taken(f"sum of {name}"))
    for rank in range(case.ranks):
        laid_out(context, case, first.inputs[rank], rank, played.result(rank, "layout"))
    context.record.met(_name("normal", nodes), row)


def _packed_pairs(context: Context, nodes: bool) -> None:
    case, row = _case(context, cover_ep.low_latency, nodes)
    made = PackedRound(context, case)
    played = play(context, case, scripts(case, lambda rank: packed_calls(made, rank), "low_latency"))
    judge_packed(context, played, made)
    context.record.met(_name("low_latency", nodes), row)


def _name(mode: str, nodes: bool) -> str:
    return f"EP {mode}{' across nodes' * nodes}"


@holds("EPN-34", _count(cover_ep.normal, False))
def normal_pairs(context: Context) -> None:
    """One row of the plan of the normal mode."""
    _normal_pairs(context, False)


@holds("EPL-19", _count(cover_ep.low_latency, False))
def low_latency_pairs(context: Context) -> None:
    """One row of the plan of the low-latency mode."""
    _packed_pairs(context, False)


@holds("EPX-04", _count(cover_ep.normal, True))
def normal_pairs_across_nodes(context: Context) -> None:
    """One row of the plan of the normal mode over several nodes."""
    _normal_pairs(context, True)


@holds("EPX-05", _count(cover_ep.low_latency, True))
def low_latency_pairs_across_nodes(context: Context) -> None:
    """One row of the plan of the low-latency mode over several nodes."""
    _packed_pairs(context, True)
