"""What is chosen for a call of decode, for plans in which every pair of values meets."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Final

from hal.spec.capability import Capabilities, Ints, MlaCapabilities
from hal_conformance.case import MlaCase
from hal_conformance.cover import OTHER, Cover, Factor
from hal_conformance.draw import (
    HEAD_DIMS,
    KV_HEADS,
    MOST_DIM,
    MOST_HEADS,
    MOST_KV_HEADS,
    MOST_PAGE,
    PAGES,
    QUERIES,
    notable,
    within,
)

QUERIES_PLANNED: Final = 40

ELEMENTS: Final = 800_000
"""Of q and out together, in one planned case."""

HEAD_CLASSES: Final[dict[str, Callable[[int], bool]]] = {
    "1": lambda n: n == 1,
    "2…15": lambda n: 1 < n < 16,
    "16": lambda n: n == 16,
    "17… no multiple of 16": lambda n: 16 < n <= 128 and n % 16 != 0,
    "32…128 multiple of 16": lambda n: 16 < n <= 128 and n % 16 == 0,
    "129…": lambda n: n > 128,
}
BATCH_CLASSES: Final = {"1": (1, 1), "2…6": (2, 6), "7…64": (7, 64), "65…": (65, 300)}


def _numbers(declared: Ints, usual: Iterable[int], most: int) -> tuple[str, ...]:
    found = notable(declared, usual, most)
    return (*map(str, found), *([OTHER] if set(within(declared, most)) - set(found) else []))


def others(declared: Ints, values: Iterable[str], most: int) -> list[int]:
    """The declared numbers that ``other`` stands for."""
    return [n for n in within(declared, most) if str(n) not in set(values)]


def _dims(declared: MlaCapabilities) -> tuple[str, ...]:
    ends = [(d, v) for d in notable(declared.head_dim, (), MOST_DIM) for v in notable(declared.head_dim_v, (), d)]
    found = {(d, v) for d, v in (*HEAD_DIMS, *ends) if d in declared.head_dim and v in declared.head_dim_v and v <= d}
    return (*(f"{d}/{v}" for d, v in sorted(found)), *([OTHER] if next(other_dims(declared, found), None) else []))


def other_dims(declared: MlaCapabilities, found: Container[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Declared pairs of head_dim and head_dim_v that are not ``found``."""
    every = product(within(declared.head_dim, MOST_DIM), within(declared.head_dim_v, MOST_DIM))
    return ((d, v) for d, v in every if v <= d and (d, v) not in found)


def _one_of(values: tuple[str, ...], value: object) -> str:
    return str(value) if str(value) in values else OTHER


def queries_of(case: MlaCase) -> int:
    """The most queries a sequence of a case has."""
    return max(case.queries, default=0)


def start_of(case: MlaCase) -> str:
    """Which of its views begin off their alignment."""
    off = [name for name in ("q", "kv", "out", "table") if getattr(case, f"{name}_start")]
    return "none" if not off else off[0] if len(off) == 1 else "several"


def plain_dense(declared: Capabilities) -> MlaCapabilities | None:
    """What is declared of dense decode of caches that are not packed: of no others are there obligations yet."""
    dense = declared.mla_dense
    return dense if dense is not None and "plain" in dense.kv_formats else None


@cache
def decode(declared: MlaCapabilities) -> Cover[MlaCase]:
    """Everything that is chosen for a call of decode."""

    def allowed(chosen: Mapping[str, str]) -> bool:
        if "h_q" in chosen and "h_kv" in chosen and not head_choices(declared, chosen["h_q"], chosen["h_kv"]):
            return False
        return (chosen.get("out"), chosen.get("unaligned")) != ("none", "out")

    return Cover(_factors(declared), allowed, ELEMENTS, ("h_kv", "out"))


def _factors(declared: MlaCapabilities) -> tuple[Factor[MlaCase], ...]:
    dims = _dims(declared)
    every = _numbers(declared.h_kv, KV_HEADS, MOST_KV_HEADS)
    classes = tuple(a for a in HEAD_CLASSES if any(head_choices(declared, a, b) for b in every))
    h_kv = tuple(b for b in every if any(head_choices(declared, a, b) for a in classes))
    page = _numbers(declared.page_size, PAGES, MOST_PAGE)
    s_q = _numbers(declared.s_q, QUERIES, QUERIES_PLANNED)
    least_heads = {a: min(n for b in h_kv for n, _ in head_choices(declared, a, b)) for a in classes}
    free_queries = others(declared.s_q, s_q, QUERIES_PLANNED)
    least_queries = {a: min(free_queries) if a == OTHER else int(a) for a in s_q}
    views = ("contiguous", "padded", "odd", "heads_first", "expanded")
    padded = ("padded_row", "padded_token", "padded_block", "odd")
    caches = ("contiguous", *padded, "heads_first", "blocks_inner", "expanded")

    def flag(declared_too: bool) -> tuple[str, ...]:
        return ("no", "yes") if declared_too else ("no",)

    return (
        Factor("dtype", declared.dtypes, lambda c: c.dtype),
        Factor("head_dim/head_dim_v", dims, lambda c: _one_of(dims, f"{c.d}/{c.d_v}"), _columns),
        Factor("h_q", classes, _head_class, lambda value: least_heads[value]),
        Factor("h_kv", h_kv, lambda c: _one_of(h_kv, c.h_kv)),
        Factor("page_size", page, lambda c: _one_of(page, c.page)),
        Factor("s_q", s_q, lambda c: _one_of(s_q, queries_of(c)), lambda value: least_queries[value]),
        Factor("causal", flag(declared.causal), lambda c: "yes" if c.causal else "no"),
        Factor("ragged", flag(declared.ragged_q), lambda c: "no" if c.q_lens is None else "yes"),
        Factor("q", views, lambda c: c.q_layout),
        Factor("kv_cache", caches, lambda c: c.kv_layout),
        Factor("out", ("none", "contiguous", "padded", "heads_first"), lambda c: c.out_layout),
        Factor("block_table", ("contiguous", "strided", "expanded", "wide"), lambda c: c.table_layout),
        Factor("unaligned", ("none", "q", "kv", "out", "table", "several"), start_of),
        Factor("batch", tuple(BATCH_CLASSES), _batch_class, lambda value: BATCH_CLASSES[value][0]),
        Factor("lse_base", declared.lse_bases, lambda c: c.lse_base),
        Factor("batch_invariant", flag(declared.batch_invariant), lambda c: "yes" if c.batch_invariant else "no"),
        Factor("plan", ("no", "yes"), lambda c: "yes" if c.plan else "no"),
        Factor("softmax_scale", ("default", "positive", "zero", "negative"), _scale_class),
    )


def _columns(value: str) -> int:
    return 2 if value == OTHER else sum(map(int, value.split("/")))


def _scale_class(case: MlaCase) -> str:
    if case.scale is None:
        return "default"
    return "zero" if case.scale == 0 else "positive" if case.scale > 0 else "negative"


def _head_class(case: MlaCase) -> str:
    return next((name for name, holds in HEAD_CLASSES.items() if holds(case.h_q)), OTHER)


def _batch_class(case: MlaCase) -> str:
    return next((name for name, (a, z) in BATCH_CLASSES.items() if a <= case.batch <= z), OTHER)


@cache
def head_choices(declared: MlaCapabilities, h_q: str, h_kv: str) -> list[tuple[int, int]]:
    """Declared h_q and h_kv of these kinds that divide."""
    values = _numbers(declared.h_kv, KV_HEADS, MOST_KV_HEADS)
    kv = others(declared.h_kv, values, MOST_KV_HEADS) if h_kv == OTHER else [int(h_kv)]
    found = [n for n in within(declared.h_q, max(MOST_HEADS, *kv)) if HEAD_CLASSES[h_q](n)]
    return [(n, k) for k in kv for n in found if n % k == 0]
