"""Makes the tensors of a case, to attack: unused memory poisoned, unused table entries garbage, hostile numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from hal_conformance.case import MlaCase
from hal_conformance.memory import Guarded, place, write
from hal_conformance.threads import few_threads, is_small

POISON: Final = {"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "huge": 3.0e4}
"""Values of memory nobody may read. ``huge`` is finite: it survives a multiplication by zero, unlike NaN."""

_POOL: Final = 12, 3_000_000
"""Pages at most, and elements about, that all sequences of a case share where ``pages`` is ``pool``."""

_OWN_EDGES: Final = 8
"""Sequences of such a case up to which each has a first and a last page of its own."""

_SPARE: Final = 2
_WIDE: Final = 1100
"""Columns of a table that nobody uses: usually, and where it is ``wide``."""


@dataclass(slots=True)
class Inputs:
    """The tensors of one call and what is needed to check it.

    Attributes
    ----------
    case : MlaCase
    q, kv_cache, block_table, cache_seqlens : Guarded
    cu_seqlens_q : Guarded or None
    table : Tensor
        The page numbers on the host, unused entries included.
    seed : int
        What `build` made them from.
    """

    case: MlaCase
    q: Guarded
    kv_cache: Guarded
    block_table: Guarded
    cache_seqlens: Guarded
    cu_seqlens_q: Guarded | None
    table: Tensor
    seed: int = 0
    _host: dict[str, Tensor] = field(default_factory=dict)

    def guarded(self) -> list[Guarded]:
        """Every input."""
        found = [self.q, self.kv_cache, self.block_table, self.cache_seqlens]
        return found if self.cu_seqlens_q is None else [*found, self.cu_seqlens_q]

    def seal(self) -> None:
        """Take the present bits as the ones the call must leave alone."""
        for guarded in self.guarded():
            guarded.seal()

    def arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
        """Positional and keyword arguments both `hal.mla_decode` and the reference take."""
        case = self.case
        keywords: dict[str, Any] = {
            "head_dim_v": case.d_v,
            "softmax_scale": case.scale,
            "causal": case.causal,
            "lse_base": case.lse_base,
        }
        if self.cu_seqlens_q is not None:
            keywords["cu_seqlens_q"] = self.cu_seqlens_q.view
        return (self.q.view, self.kv_cache.view, self.block_table.view, self.cache_seqlens.view), keywords

    def queries(self, sequence: int) -> Tensor:
        """The query rows of one sequence, float64 on the host: [s_q, h_q, d]."""
        q = self._host.setdefault("q", self.q.view.detach().cpu().double())
        if self.case.q_lens is None:
            return q[sequence]
        start = sum(self.case.q_lens[:sequence])
        return q[start : start + self.case.q_lens[sequence]]

    def keys(self, sequence: int, length: int | None = None, table: Tensor | None = None) -> Tensor:
        """The first ``length`` tokens of a sequence, float64 on the host: [length, h_kv, d]."""
        cache = self._host.setdefault("kv", self.kv_cache.view.detach().cpu())
        length = self.case.lengths[sequence] if length is None else length
        table = self.table if table is None else table
        positions = torch.arange(length)
        pages = table[sequence][positions // self.case.page].long()
        return cache[pages, positions % self.case.page].double()


def build(case: MlaCase, seed: int) -> Inputs:
    """Make the tensors of a case; the same seed gives the same bits on every machine."""
    with few_threads(is_small(case)):
        made = _build(case, seed)
        made.seal()
        return made


def _build(case: MlaCase, seed: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    table, num_blocks = _table(case, rng)
    dtype, device = case.torch_dtype, case.device
    poison = POISON[case.poison]
    q = _place_q(case, poison)
    kv = _place_kv(case, num_blocks, poison)
    live = torch.zeros(num_blocks, case.page, dtype=torch.bool)
    for j, length in enumerate(case.lengths):
        positions = torch.arange(length)
        live[table[j][positions // case.page].long(), positions % case.page] = True
    q_data, kv_data = DATA[case.data](case, q.view.shape, kv.view.shape, table, rng)
    write(q.view, q_data.to(dtype))
    stored = kv_data.to(dtype)
    stored[~live] = poison
    write(kv.view, stored)
    pad = (5, 0) if case.table_layout == "strided" else (0, 0)
    at = case.table_start
    once = (0,) if case.table_layout == "expanded" else ()
    shape = tuple(table.shape)
    block_table = place("block_table", shape, torch.int32, device, fill=case.garbage, pad=pad, start=at, once=once)
    write(block_table.view, table)
    lens = place("cache_seqlens", (case.batch,), torch.int32, device, fill=case.garbage, start=at)
    lens.view.copy_(torch.tensor(case.lengths, dtype=torch.int32))
    cu = None
    if case.q_lens is not None:
        cu = place("cu_seqlens_q", (case.batch + 1,), torch.int32, device, fill=case.garbage, start=at)
        starts = torch.tensor([0, *case.q_lens]).cumsum(0)
        cu.view.copy_(starts.to(torch.int32))
    return Inputs(case, q, kv, block_table, lens, cu, table, seed)


def make_out(case: MlaCase) -> Guarded | None:
    """The ``out`` argument of a case, full of NaN; None where the case passes none."""
    if case.out_layout == "none":
        return None
    shape = _rows_shape(case, case.d_v)
    rank = len(shape)
    layouts: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "padded": {"pad": (*(3,) * (rank - 2), 9, 0)},
        "heads_first": {"order": (*range(rank - 3), rank - 2, rank - 3, rank - 1)},
    }
    return place(
        "out", shape, case.torch_dtype, case.device, fill=None, start=case.out_start, **layouts[case.out_layout]
    )


def _rows_shape(case: MlaCase, last: int) -> tuple[int, ...]:
    if case.q_lens is None:
        return (case.batch, case.s_q, case.h_q, last)
    return (sum(case.q_lens), case.h_q, last)


def _place_q(case: MlaCase, poison: float) -> Guarded:
    shape = _rows_shape(case, case.d)
    rank = len(shape)
    layouts: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "padded": {"pad": (*(16,) * (rank - 2), 8, 0)},
        "odd": {"pad": (*(1,) * (rank - 1), 0)},
        "heads_first": {"order": (*range(rank - 3), rank - 2, rank - 3, rank - 1)},
        "expanded": {"once": (0,)},
    }
    return place("q", shape, case.torch_dtype, case.device, fill=poison, start=case.q_start, **layouts[case.q_layout])


def _place_kv(case: MlaCase, num_blocks: int, poison: float) -> Guarded:
    shape = (num_blocks, case.page, case.h_kv, case.d)
    layouts: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "padded_row": {"pad": (0, 0, 64, 0)},
        "padded_token": {"pad": (0, 32, 0, 0)},
        "padded_block": {"pad": (640, 0, 0, 0)},
        "odd": {"pad": (3, 1, 1, 0)},
        "heads_first": {"order": (0, 2, 1, 3)},
        "blocks_inner": {"order": (1, 0, 2, 3)},
        "expanded": {"once": (2,)},
    }
    return place(
        "kv_cache", shape, case.torch_dtype, case.device, fill=poison, start=case.kv_start, **layouts[case.kv_layout]
    )


def _table(case: MlaCase, rng: torch.Generator) -> tuple[Tensor, int]:
    """Page numbers with garbage past the used ones, and how many pages the cache has (some used by nobody)."""
    counts = [-(-length // case.page) for length in case.lengths]
    pool = max(2, min(_POOL[0], _POOL[1] // (case.page * case.h_kv * case.d)))
    edges = 2 * case.batch if case.batch <= _OWN_EDGES else 0
    num_blocks = (min(sum(counts), pool + edges) if case.pages == "pool" else sum(counts)) + _SPARE
    order = torch.arange(num_blocks) if case.pages == "ordered" else torch.randperm(num_blocks, generator=rng)
    columns = max(counts, default=0) + (_WIDE if case.table_layout == "wide" else _SPARE)
    table = torch.full((case.batch, columns), case.garbage, dtype=torch.int32)
    if case.pages == "pool":
        for j, count in enumerate(counts):
            drawn = torch.randint(max(num_blocks - _SPARE - edges, 1), (count,), generator=rng)
            table[j, :count] = order[drawn].to(torch.int32)
            if edges and count > 2 and num_blocks == pool + edges + _SPARE:
                table[j, [0, count - 1]] = order[pool + 2 * j : pool + 2 * j + 2].to(torch.int32)
        return _as_laid_out(table, counts, case), num_blocks
    start = 0
    for j, count in enumerate(counts):
        table[j, :count] = order[start : start + count].to(torch.int32)
        start += count
    if case.pages == "shared":
        for j in range(1, case.batch):
            common = min(counts[j], counts[j - 1]) // 2 + 1 if min(counts[j], counts[j - 1]) else 0
            table[j, :common] = table[j - 1, :common]
        for j, count in enumerate(counts):
            if count > 2:
                table[j, count - 2] = table[j, 0]
    return _as_laid_out(table, counts, case), num_blocks


def _as_laid_out(table: Tensor, counts: list[int], case: MlaCase) -> Tensor:
    """Where all rows are one in memory, that of the longest sequence."""
    if case.table_layout == "expanded" and counts:
        table[:] = table[counts.index(max(counts))].clone()
    return table


Maker = Callable[[MlaCase, torch.Size, torch.Size, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def _unit(shape: torch.Size, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float32).div_(10).clamp_(-1, 1)


def _normal(case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Published data: randn / 10 within ±1."""
    return _unit(q, rng), _unit(kv, rng)


def _needle(case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A few tokens at the places where kernels err (ends, page and tile edges) hold most of the weight."""
    q_data, kv_data = _unit(q, rng), _unit(kv, rng)
    direction = torch.where(torch.rand(case.d, generator=rng) < 0.5, -1.0, 1.0)
    q_data += 0.5 * direction
    for j, length in enumerate(case.lengths):
        if not length:
            continue
        spots = {0, length - 1, (length - 1) // case.page * case.page, length // 2 // case.page * case.page}
        first_hidden = length - case.queries[j]
        spots |= {spot for spot in (first_hidden, first_hidden - 1) if 0 <= spot < length}
        # Scores of the needles lie near ln(length), so together they and the crowd weigh about the same.
        gain = (torch.log(torch.tensor(float(length))) + 3) / (0.5 * case.d**0.5)
        for spot in sorted(spots):
            page = int(table[j, spot // case.page])
            flavour = 1 + 0.1 * torch.randn(case.h_kv, case.d, generator=rng)
            kv_data[page, spot % case.page] = (gain * direction * flavour).clamp(-1, 1)
    return q_data, kv_data


def _underflow(
    case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scores hundreds apart: all but the best underflow, and without the running maximum everything overflows.

    Every query of every head has its own best token: another's maximum leaves nothing of it.
    """
    sign = torch.where(torch.rand(case.d, generator=rng) < 0.5, -1.0, 1.0)
    strength = torch.rand(*kv[:3], 1, generator=rng) * 2 - 1
    own = (torch.rand(*q[:-1], 1, generator=rng) + 0.5).copysign(torch.rand(*q[:-1], 1, generator=rng) - 0.5)
    return 4 * own * sign * torch.ones(q), 3 * strength * sign + 0.01 * torch.randn(kv, generator=rng)


def _negative(
    case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scores below -10,000, other ones of every query and head.

    A running maximum that starts at 0 or is another's, or a mask of -10,000, makes all weights vanish.
    """
    sign = torch.where(torch.rand(case.d, generator=rng) < 0.5, -1.0, 1.0)
    strength = 0.9 + 0.1 * torch.rand(*kv[:3], 1, generator=rng)
    own = 0.95 + 0.25 * torch.rand(*q[:-1], 1, generator=rng)
    return 24 * own * sign * torch.ones(q), -24 * strength * sign + 0.05 * torch.randn(kv, generator=rng)


def _equal(case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q is 0: every logit is exactly equal, lse is ln(length), out the mean of V."""
    return torch.zeros(q), _unit(kv, rng)


def _large(case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Huge V against tiny q: products are ordinary, V times an unnormalised weight is not."""
    power = 7 if case.dtype == "float16" else 30
    return _unit(q, rng) * 2.0**-power * 30, _unit(kv, rng) * 2.0**power


def _hot(case: MlaCase, q: torch.Size, kv: torch.Size, table: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of some tens with both signs, heads unlike each other: ordinary trained attention at its sharpest."""
    return _unit(q, rng) * 50, _unit(kv, rng) * 20


DATA: Final[dict[str, Maker]] = {
    "normal": _normal,
    "needle": _needle,
    "underflow": _underflow,
    "negative": _negative,
    "equal": _equal,
    "large": _large,
    "hot": _hot,
}
