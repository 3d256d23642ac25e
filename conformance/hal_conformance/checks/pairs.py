"""L2: every pair of notable values in one call, and everything declared, judged by its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from hal.spec.capability import Ints
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.checks.capability import declared_calls
from hal_conformance.context import Context
from hal_conformance.cover import OTHER, Labels
from hal_conformance.cover_mla import (
    BATCH_CLASSES,
    ELEMENTS,
    QUERIES_PLANNED,
    decode,
    head_choices,
    other_dims,
    others,
)
from hal_conformance.draw import LENGTHS, MOST_DIM, MOST_PAGE, Draw, within

Choice = TypeVar("Choice", int, tuple[int, int])

_QUICK: Final = 20
"""Cases of a quick run: the first of a plan bring most pairs together."""

_DRAWN: Final = 40
"""Pairs of head_dim and head_dim_v of which one is taken."""

_ROWS: Final = 2000
"""Sequences times queries times KV heads a large batch may have: the oracle takes them one by one."""

_WORK: Final = 4e7
"""Products of a case, about; its lengths follow from that."""

_SCALES: Final = {"default": None, "positive": 0.05, "zero": 0.0, "negative": -0.05}

_CACHE: Final = 3_000_000
"""Elements of a cache above which all sequences share a few pages."""


def _planned(context: Context) -> int:
    return decode(context.dense).count(context.settings.seed, context.settings.mode, _QUICK)


@holds("MLA-46", _planned)
def every_pair(context: Context) -> None:
    """One row of the plan."""
    context.check(realise(context.draw(), decode(context.dense).row(context.settings.seed, context.index)))


def realise(draw: Draw, planned: Labels) -> MlaCase:
    """A case of these kinds; whatever they leave open is drawn."""
    declared, rng = draw.declared, draw.rng
    cover = decode(declared)
    chosen, values = cover.chosen(planned), cover.values()

    def numbers(name: str, among: Ints, most: int) -> list[int]:
        return others(among, values[name], most) if chosen[name] == OTHER else [int(chosen[name])]

    def affordable(choices: Sequence[Choice], size: Callable[[Choice], int]) -> Choice:
        """Any that keeps the case small, or the smallest."""
        return rng.choice([one for one in choices if size(one) <= ELEMENTS] or [min(choices, key=size)])

    page = rng.choice(numbers("page_size", declared.page_size, MOST_PAGE))
    least, most = BATCH_CLASSES[chosen["batch"]]
    heads = head_choices(declared, chosen["h_q"], chosen["h_kv"])
    dims = _dims(draw, chosen["head_dim/head_dim_v"], values["head_dim/head_dim_v"])
    row = least * min(map(sum, dims))
    s_q = affordable(numbers("s_q", declared.s_q, QUERIES_PLANNED), lambda n: row * min(heads)[0] * n)
    h_q, h_kv = affordable(heads, lambda pair: row * pair[0] * s_q)
    d, d_v = affordable(dims, lambda pair: least * sum(pair) * h_q * s_q)
    fitting = min(_ROWS // (s_q * h_kv), ELEMENTS // (s_q * h_q * (d + d_v)))
    batch = rng.randint(least, max(least, min(most, fitting)))
    tokens = int(_WORK / (batch * s_q * h_q * (d + d_v)))
    lengths = tuple(_length(draw, page, max(12, min(tokens, 600))) for _ in range(batch))
    elements = sum(-(-n // page) for n in lengths) * page * h_kv * d
    pages = "pool" if elements > _CACHE else rng.choice(("ordered", "shuffled", "shuffled", "shared"))
    own = pages in ("ordered", "shuffled") and chosen["block_table"] != "expanded"
    data = draw.data() if own else rng.choice(("normal", "hot"))
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
        scale=_SCALES[chosen["softmax_scale"]],
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


def _dims(draw: Draw, label: str, values: tuple[str, ...]) -> list[tuple[int, int]]:
    if label != OTHER:
        d, d_v = label.split("/")
        return [(int(d), int(d_v))]
    known = {(int(d), int(v)) for d, v in (value.split("/") for value in values if value != OTHER)}
    # There may be 100,000 others: some at random do, and the first where most are no pair.
    dims, columns = within(draw.declared.head_dim, MOST_DIM), within(draw.declared.head_dim_v, MOST_DIM)
    drawn = [(draw.rng.choice(dims), draw.rng.choice(columns)) for _ in range(_DRAWN)]
    found = [(d, v) for d, v in drawn if v <= d and (d, v) not in known]
    return found or [next(other_dims(draw.declared, known))]


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
