"""L2: every pair of notable values in one call, and everything declared, judged by its numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.checks.capability import declared_calls
from hal_conformance.context import Context
from hal_conformance.cover import (
    BATCH_CLASSES,
    ELEMENTS,
    OTHER,
    QUERIES_PLANNED,
    Labels,
    factors,
    head_choices,
    other_dims,
    others,
    plan,
)
from hal_conformance.draw import LENGTHS, MOST_PAGE, Draw

_QUICK: Final = 24
"""Cases of a quick run: the first of a plan bring most pairs together."""

_FULL: Final = 4
"""Plans of a full run."""

_ROWS: Final = 2000
"""Sequences times queries times KV heads a large batch may have: the oracle takes them one by one."""

_WORK: Final = 4e7
"""Products of a case, about; its lengths follow from that."""

_CACHE: Final = 3_000_000
"""Elements of a cache above which all sequences share a few pages."""


def _plan(context: Context, turn: int) -> tuple[Labels, ...]:
    return plan(context.dense, f"{context.settings.seed}/{turn}")


def _planned(context: Context) -> int:
    mode = context.settings.mode
    turns = _FULL if mode == "full" else 1
    every = sum(len(_plan(context, turn)) for turn in range(turns))
    return min(every, _QUICK) if mode == "quick" else every


@holds("MLA-46", _planned)
def every_pair(context: Context) -> None:
    """One row of the plan."""
    turn, at = 0, context.index
    while at >= len(_plan(context, turn)):
        turn, at = turn + 1, at - len(_plan(context, turn))
    context.check(realise(context.draw(), _plan(context, turn)[at]))


def realise(draw: Draw, row: Labels) -> MlaCase:
    """A case of these kinds; whatever they leave open is drawn."""
    declared, rng = draw.declared, draw.rng
    chosen = {factor.name: value for factor, value in zip(factors(declared), row, strict=True)}
    values = {factor.name: factor.values for factor in factors(declared)}

    def number(name: str, among: Any, most: int) -> int:
        if chosen[name] == OTHER:
            return rng.choice(others(among, values[name], most))
        return int(chosen[name])

    page = number("page_size", declared.page_size, MOST_PAGE)
    s_q = number("s_q", declared.s_q, QUERIES_PLANNED)
    least, most = BATCH_CLASSES[chosen["batch"]]
    heads = head_choices(declared, chosen["h_q"], chosen["h_kv"])
    every_dims = _dims(draw, chosen["head_dim/head_dim_v"], values["head_dim/head_dim_v"])
    columns = min(map(sum, every_dims))
    h_q, h_kv = _affordable(rng, heads, lambda pair: least * s_q * pair[0] * columns)
    d, d_v = _affordable(rng, every_dims, lambda pair: least * s_q * h_q * sum(pair))
    fitting = min(_ROWS // (s_q * h_kv), ELEMENTS // (s_q * h_q * (d + d_v)))
    batch = rng.randint(least, max(least, min(most, fitting)))
    tokens = int(_WORK / (batch * s_q * h_q * (d + d_v)))
    lengths = tuple(_length(draw, page, max(12, min(tokens, 600))) for _ in range(batch))
    elements = sum(-(-n // page) for n in lengths) * page * h_kv * d
    pages = "pool" if elements > _CACHE else rng.choice(("ordered", "shuffled", "shuffled", "shared"))
    data = draw.data() if pages in ("ordered", "shuffled") else rng.choice(("normal", "hot"))
    return MlaCase(
        dtype=chosen["dtype"],
        lengths=lengths,
        s_q=s_q,
        q_lens=_ragged(draw, batch, s_q) if chosen["ragged"] == "yes" else None,
        h_q=h_q,
        h_kv=h_kv,
        d=d,
        d_v=d_v,
        page=page,
        causal=chosen["causal"] == "yes",
        batch_invariant=chosen["batch_invariant"] == "yes",
        lse_base=chosen["lse_base"],
        scale=rng.choice((None, None, 0.05)),
        data=data,
        pages=pages,
        poison=rng.choice(("nan", "inf", "huge")),
        garbage=rng.choice((2147480000, -1, 0)),
        q_layout=chosen["q"],
        kv_layout=chosen["kv_cache"],
        out_layout=chosen["out"],
        table_layout=chosen["block_table"],
        plan=chosen["plan"] == "yes",
        device=draw.device,
        **_starts(draw, chosen["unaligned"], chosen["out"]),
    )


def _affordable(
    rng: random.Random, choices: list[tuple[int, int]], size: Callable[[tuple[int, int]], int]
) -> tuple[int, int]:
    """Any that keeps the case small, or the smallest."""
    return rng.choice([one for one in choices if size(one) <= ELEMENTS] or [min(choices, key=size)])


def _dims(draw: Draw, label: str, values: tuple[str, ...]) -> list[tuple[int, int]]:
    if label != OTHER:
        d, d_v = label.split("/")
        return [(int(d), int(d_v))]
    known = {(int(d), int(v)) for d, v in (value.split("/") for value in values if value != OTHER)}
    return list(other_dims(draw.declared, known))


def _length(draw: Draw, page: int, most: int) -> int:
    """None, an edge of a page, whole tiles, or any; within the work there is, unless a page is longer."""
    kind = draw.rng.random()
    if kind < 0.08:
        return 0
    if kind < 0.4 and page <= 2 * most:
        return max(0, page * draw.rng.randint(1, max(1, most // page)) + draw.rng.choice((-1, 0, 0, 1)))
    whole = [n for n in LENGTHS if n <= most]
    return draw.rng.choice(whole) if kind < 0.55 and whole else draw.rng.randint(1, most)


def _ragged(draw: Draw, batch: int, s_q: int) -> tuple[int, ...]:
    q_lens = [draw.rng.randint(0, s_q) for _ in range(batch)]
    q_lens[draw.rng.randrange(batch)] = s_q
    return tuple(q_lens)


def _starts(draw: Draw, label: str, out_layout: str) -> dict[str, int]:
    if label == "none":
        return {}
    if label != "several":
        return draw.starts(label)
    return draw.starts("q", "kv", "table", *(["out"] if out_layout != "none" else []))


def _calls_here(context: Context) -> list[MlaCase]:
    """What CAP-05 calls, as far as it is for the device this run judges."""
    return [case for case in declared_calls(context) if case.device == context.device]


@holds("MLA-47", lambda context: len(_calls_here(context)))
def what_is_declared_is_right(context: Context) -> None:
    """The calls of CAP-05, compared with the reference."""
    context.check(_calls_here(context)[context.index].but(data=context.draw().data()))
