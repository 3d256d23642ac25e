"""What is chosen for a call of expert parallelism, for plans in which every pair of values meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import torch

from hal.reference.ep import local_experts
from hal.spec.capability import EpCapabilities
from hal.spec.ep import PLAIN_DTYPES
from hal.spec.tensors import dtype_name
from hal_conformance.cover import Cover, Factor
from hal_conformance.draw import members, within
from hal_conformance.ep_case import EpCase

Range = tuple[int, int]

RANKS: Final = (1, 2, 3, 4)
RANKS_OF_NODES: Final = (2, 3, 4, 6)
EXPERTS: Final[dict[str, Callable[[int, int], bool]]] = {
    "1": lambda experts, ranks: local_experts(experts, ranks) == 1,
    "2…8": lambda experts, ranks: 2 <= local_experts(experts, ranks) <= 8 and experts % ranks == 0,
    "2…8 uneven": lambda experts, ranks: 2 <= local_experts(experts, ranks) <= 8 and experts % ranks != 0,
    "9…32": lambda experts, ranks: 9 <= local_experts(experts, ranks) <= 32,
    "33…64": lambda experts, ranks: 33 <= local_experts(experts, ranks) <= 64,
    "65…": lambda experts, ranks: local_experts(experts, ranks) >= 65,
}
"""Of a rank: by all experts and the ranks they are shared by."""

TOPK: Final[dict[str, Range]] = {"1": (1, 1), "2…4": (2, 4), "5…8": (5, 8), "9…16": (9, 16)}
WIDER: Final = (1, 2, 5)
"""How many choices more than a call a buffer may have."""

COLUMNS: Final[dict[str, Range]] = {
    "part of a group": (1, 127),
    "one group": (128, 128),
    "2…8 groups": (129, 1024),
    "9…32 groups": (1025, 4096),
    "33… groups": (4097, 16384),
}
"""Of 128 columns, which have a scale."""

TOKENS: Final[dict[str, Range]] = {"1": (1, 1), "2…17": (2, 17), "none on a rank": (2, 17), "65… on a rank": (65, 100)}
ALIGNMENT: Final[dict[str, Range]] = {"1": (1, 1), "2…16": (2, 16), "128": (128, 128)}
ROUTINGS: Final = ("mixed", "distinct", "zipf", "one", "one_rank", "avoid", "same", "half")
FINISH: Final = ("call", "event", "hook")

_PLAIN: Final = tuple(map(dtype_name, PLAIN_DTYPES))

_MOST_EXPERTS: Final = 1024
_MOST_SHARED: Final = 64
"""Ranks of a group over nodes, where none of the usual sizes is declared."""

_ELEMENTS: Final = 400_000
_PACKED_ELEMENTS: Final = 1_500_000
"""Low-latency results have room for what every rank might send to every expert."""


def _class(ranges: dict[str, Range], value: int) -> str:
    return next((name for name, (a, z) in ranges.items() if a <= value <= z), "")


def _flag(declared_too: bool) -> tuple[str, ...]:
    return ("no", "yes") if declared_too else ("no",)


@cache
def ranks_of(declared: EpCapabilities, nodes: bool) -> list[int]:
    """Sizes of groups; over several nodes those that are shared evenly by a declared number of them."""
    return shared_among(declared, RANKS_OF_NODES) if nodes else members(declared.ranks, RANKS)


@cache
def shared_among(declared: EpCapabilities, preferred: tuple[int, ...]) -> list[int]:
    """Declared sizes of groups that several nodes may share: the preferred ones, or the smallest."""
    shared = [n for n in range(2, _MOST_SHARED + 1) if n in declared.ranks and node_sizes(declared, n)]
    return [n for n in preferred if n in shared] or shared[:1]


@cache
def node_sizes(declared: EpCapabilities, ranks: int) -> list[int]:
    """How many ranks each of several nodes may have."""
    return [size for size in range(1, ranks) if ranks % size == 0 and ranks // size in declared.nodes]


@cache
def experts_for(declared: EpCapabilities, kind: str, ranks: int) -> list[int]:
    """Declared numbers of experts of this kind."""
    return [n for n in within(declared.num_experts, _MOST_EXPERTS) if EXPERTS[kind](n, ranks)]


@cache
def topk_for(declared: EpCapabilities, kind: str, wider: bool) -> list[tuple[int, int]]:
    """Declared numbers of choices of this kind, and how many the buffer is made for."""
    low, high = TOPK[kind]
    found = [n for n in range(low, high + 1) if n in declared.topk]
    if not wider:
        return [(n, 0) for n in found]
    return [(n, n + more) for n in found for more in WIDER if n + more in declared.topk]


@cache
def columns_for(declared: EpCapabilities, kind: str, size: int, scaled: str) -> list[int]:
    """Declared numbers of columns of this kind, of elements of so many bytes.

    ``scaled`` says what else they are to be: ``none``; ``cast``, which takes multiples of 16; or ``sent``, as FP8 rows,
    whose bytes are declared like any.
    """
    low, high = COLUMNS[kind]
    step = 4 if scaled == "none" else 16
    every = range(-(-low // step) * step, high + 1, step)
    return [
        n
        for n in every
        if n * size % 16 == 0 and n * size in declared.row_bytes and (scaled != "sent" or n in declared.row_bytes)
    ]


def legal_columns(declared: EpCapabilities, dtype: str, scaled: str) -> list[int]:
    """Columns of which rows of a dtype are declared, and what they are to be beside that (`columns_for`)."""
    return [n for kind in COLUMNS for n in columns_for(declared, kind, itemsize(dtype), scaled)]


def scalable(declared: EpCapabilities, scaled: str) -> bool:
    """Whether there are rows of any dtype that may be ``cast``, or ``sent`` as FP8."""
    return any(legal_columns(declared, dtype, scaled) for dtype in plain(declared))


def plain(declared: EpCapabilities) -> tuple[str, ...]:
    """Declared dtypes of unquantised rows."""
    return tuple(name for name in declared.dtypes if name in _PLAIN)


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found.itemsize


def _tokens(case: EpCase) -> str:
    if max(case.tokens) >= TOKENS["65… on a rank"][0]:
        return "65… on a rank"
    if min(case.tokens) == 0:
        return "none on a rank"
    return "1" if max(case.tokens) == 1 else "2…17"


def _experts(case: EpCase) -> str:
    return next((name for name, holds in EXPERTS.items() if holds(case.experts, case.ranks)), "")


def _sizes(declared: EpCapabilities, nodes: bool) -> tuple[Factor[EpCase], ...]:
    """What is chosen for calls of either mode."""
    ranks = ranks_of(declared, nodes)
    experts = tuple(kind for kind in EXPERTS if any(experts_for(declared, kind, n) for n in ranks))
    topk = tuple(kind for kind in TOPK if topk_for(declared, kind, False))
    sizes = [itemsize(name) for name in plain(declared)]
    columns = tuple(kind for kind in COLUMNS if any(columns_for(declared, kind, size, "none") for size in sizes))
    found: tuple[Factor[EpCase], ...] = (
        Factor("ranks", tuple(map(str, ranks)), lambda c: str(c.ranks), lambda v: int(v)),
        Factor("experts of a rank", experts, _experts, lambda v: int(v.split("…")[0])),
        Factor("topk", topk, lambda c: _class(TOPK, c.topk)),
        Factor(
            "buffer's topk",
            ("as the call's", *(["wider"] if any(topk_for(declared, kind, True) for kind in topk) else [])),
            lambda c: "wider" if c.width > c.topk else "as the call's",
        ),
        Factor("dtype", plain(declared), lambda c: c.dtype),
        Factor("columns", columns, lambda c: _class(COLUMNS, c.hidden), lambda v: COLUMNS[v][0]),
        Factor("tokens", tuple(TOKENS), _tokens, lambda v: TOKENS[v][0]),
        Factor("room", ("just enough", "more"), lambda c: "more" if c.most > max(*c.tokens, 1) else "just enough"),
        Factor("routing", ROUTINGS, lambda c: c.routing),
        Factor("rows", ("contiguous", "padded"), lambda c: "padded" if c.pad else "contiguous"),
    )
    if nodes:
        # By their ranks: where a node has one, all of its peers are far.
        kinds = {"1" if size == 1 else "several" for n in ranks for size in node_sizes(declared, n)}
        of_node: Factor[EpCase] = Factor(
            "ranks of a node", tuple(sorted(kinds)), lambda c: "1" if c.per_node == 1 else "several"
        )
        return (*found, of_node)
    return found


def endings(declared: EpCapabilities) -> tuple[str, ...]:
    """How calls may end."""
    kinds = {"call": True, "hook": declared.recv_hook, "event": declared.async_finish}
    return tuple(kind for kind in FINISH if kinds[kind])


def scaled_in(chosen: Mapping[str, str]) -> str:
    """What `columns_for` is to be asked for a call of these values."""
    if chosen.get("scales", "none") != "none":
        return "sent"
    return "cast" if chosen.get("cast", "none") != "none" else "none"


def _allowed(declared: EpCapabilities) -> Callable[[Mapping[str, str]], bool]:
    """Whether a call may have such values."""

    def allowed(chosen: Mapping[str, str]) -> bool:
        ranks, columns, dtype = int(chosen.get("ranks", 0)), chosen.get("columns"), chosen.get("dtype")
        if ranks:
            if "experts of a rank" in chosen and not experts_for(declared, chosen["experts of a rank"], ranks):
                return False
            if "ranks of a node" in chosen and not sizes_of(declared, ranks, chosen["ranks of a node"]):
                return False
        # Of one rank nothing is sent at all, which has an obligation of its own.
        if ranks == 1 and (chosen.get("tokens") == "none on a rank" or chosen.get("routing") == "avoid"):
            return False
        wider = chosen.get("buffer's topk") == "wider"
        if "topk" in chosen and not topk_for(declared, chosen["topk"], wider):
            return False
        scaled = scaled_in(chosen)
        if scaled == "cast" and chosen.get("data") == "bits":
            return False
        kinds = [columns] if columns else list(COLUMNS)
        dtypes = [dtype] if dtype else list(plain(declared))
        return any(columns_for(declared, kind, itemsize(name), scaled) for kind in kinds for name in dtypes)

    return allowed


def sizes_of(declared: EpCapabilities, ranks: int, kind: str) -> list[int]:
    """How many ranks of several nodes may be one each, or several."""
    return [size for size in node_sizes(declared, ranks) if (size == 1) == (kind == "1")]


@cache
def normal(declared: EpCapabilities, nodes: bool = False) -> Cover[EpCase]:
    """Everything that is chosen for a dispatch of the normal mode and its combine, on one node or over several."""
    fp8 = "float8_e4m3fn" in declared.dtypes
    overflow = [kind for kind in ("drop", "grow") if kind in declared.overflow]
    if nodes:
        overflow = [kind for kind in overflow if kind in declared.across_nodes]
    factors: tuple[Factor[EpCase], ...] = (
        *_sizes(declared, nodes),
        Factor("scales", ("none", *(["float32", "int32"] if fp8 else [])), lambda c: c.scales or "none"),
        Factor("data", ("normal", "bits"), lambda c: c.data),
        Factor("weights", ("none", "usual", "any"), lambda c: c.weights or "none"),
        Factor(
            "layout",
            tuple(name for name in ("rank", "expand") if name in declared.layouts),
            lambda c: "expand" if c.expand else "rank",
        ),
        Factor(
            "expert_alignment",
            tuple(ALIGNMENT),
            lambda c: _class(ALIGNMENT, c.alignment),
            lambda v: {"128": 16}.get(v, 1),
        ),
        Factor("num_worst_tokens", ("no", "yes"), lambda c: "yes" if c.worst else "no"),
        Factor("bias", ("0", "1", "2"), lambda c: str(c.bias)),
        Factor("weights back", ("yes", "no"), lambda c: "yes" if c.back else "no"),
        Factor("handle", ("new", *(["cached"] if declared.cached_handle else [])), lambda c: c.handle),
        Factor("finish", endings(declared), lambda c: c.finish),
        Factor("overflow", ("none", *overflow), lambda c: "none" if c.overflow == "error" else c.overflow),
    )
    if nodes:
        pre_reduce: Factor[EpCase] = Factor(
            "pre_reduce", _flag(declared.pre_reduce), lambda c: "yes" if c.pre_reduce else "no"
        )
        factors = (*factors, pre_reduce)
    return Cover(factors, _allowed(declared), _ELEMENTS, ("ranks", "topk", "dtype", "scales"))


@cache
def low_latency(declared: EpCapabilities, nodes: bool = False) -> Cover[EpCase]:
    """Everything that is chosen for a low-latency dispatch and its combine, on one node or over several."""
    factors: tuple[Factor[EpCase], ...] = (
        *_sizes(declared, nodes),
        Factor("cast", declared.casts, lambda c: c.cast),
        Factor("data", ("normal", "extreme", *(["bits"] if "none" in declared.casts else [])), lambda c: c.data),
        Factor("weights", ("usual", "any"), lambda c: c.weights or "none"),
        Factor("finish", endings(declared), lambda c: c.finish),
        Factor("zero_copy", _flag(declared.zero_copy_combine), lambda c: "yes" if c.zero_copy else "no"),
        Factor("out", ("none", "contiguous", "padded"), lambda c: c.out),
        Factor("statistics", ("no", "yes"), lambda c: "yes" if c.statistics else "no"),
    )
    return Cover(factors, _allowed(declared), _PACKED_ELEMENTS, ("ranks", "topk", "dtype", "cast"))
