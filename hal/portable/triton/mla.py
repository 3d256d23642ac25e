"""The host side of MLA decode in Triton: sizes, workspace, launches. Nothing here waits for the device.

A plan launches `kernels.schedule` and owns all memory that decoding needs; a decode with it allocates nothing, so that
plan and decode can be captured in a graph. Workspace depends on sizes alone, never on lengths.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from hal.portable.triton import tuning
from hal.portable.triton.tuning import Table, Variant
from hal.spec.capability import MAX_HEAD_DIM
from hal.spec.errors import SpecError
from hal.spec.validation import Level, validation_level

if TYPE_CHECKING:
    from hal.spec.mla import MlaDecodeArgs, MlaGeometry
    from hal.spec.plan import MlaPlanArgs

_MOST: Final = 2**31 - 1
_SCAN: Final = 64
_MOST_ROWS: Final = 128
_LN2: Final = math.log(2)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from a geometry and a tuning table: how a step is cut, and what the kernels are compiled with.

    Attributes
    ----------
    variant : Variant
    table : Table
    main, tail : int
        Columns of K in two powers of two.
    group : int
        Query heads of a KV head.
    side : int
        Tiles that run side by side.
    parts : int
        Shares of the work.
    each : int
        With ``batch_invariant`` the most units of a sequence that are merged; else 0.
    """

    variant: Variant
    table: Table
    main: int
    tail: int
    group: int
    side: int
    parts: int
    each: int

    @staticmethod
    def of(arch: str, processors: int, g: MlaGeometry) -> Sizes:
        """Choose for a geometry. Only ``parts`` depends on the device, and nothing on the batch."""
        table = tuning.table(arch)
        main, tail = tuning.split_columns(g.head_dim)
        group = g.h_q // g.h_kv
        # How many queries a ragged sequence has is known to the device alone: mostly one or two.
        rows = group * (2 if g.ragged_q else max(g.s_q, 1))
        # V wider than one power of two takes a second accumulator, for which no chip has room beside many rows.
        held = rows if g.head_dim_v <= main else 1
        variant = tuning.choose(arch, main + tail, held, g.page_size)
        tiles = -(-rows // variant.rows)
        side = min(tiles, table.side)
        parts = max(1, processors * variant.shares // side)
        units = -(-tiles // side) * g.h_kv
        each = 0
        if g.batch_invariant:
            most = table.chunks // 2
            each = most if g.ragged_q else units if units <= most else 0
        return Sizes(variant, table, main, tail, group, side, parts, each)

    def constants(self, g: MlaGeometry) -> dict[str, Any]:
        """What all three kernels are compiled with."""
        return {
            "RAGGED": g.ragged_q,
            "ROWS": self.variant.rows,
            "BLOCK_N": self.variant.block_n,
            "BEGIN": self.table.begin,
            "INVARIANT": g.batch_invariant,
            "CHUNKS": self.table.chunks,
            "CHUNK_BLOCKS": max(1, self.table.chunk_tokens // self.variant.block_n),
        }

    def compiled(
        self, kernel: str, g: MlaGeometry, *, token: int = 576, unit: int = 8, wide: bool = False
    ) -> dict[str, Any]:
        """What one kernel is compiled with beside `constants`; keywords are what follows from strides."""
        if kernel == "schedule":
            return {"PARTS": _power_of_two(self.parts), "CHUNK": _SCAN}
        if kernel == "merge":
            columns = self.columns(g)
            together = min(self.table.together, self.variant.rows)
            return {"COLUMNS": columns, "WIDTH": _power_of_two(columns), "TOGETHER": together, "UNIT": unit}
        return {
            "MAIN": self.main,
            "TAIL": self.tail,
            "AT_ONCE": min(self.main, self.variant.columns),
            "FULL": g.head_dim == self.main + self.tail,
            "FULL_V": g.head_dim_v >= self.main,
            "TAIL_V": g.head_dim_v > self.main,
            "WHOLE": g.page_size % self.variant.block_n == 0,
            "TOKEN": token if token in tuning.USUAL_TOKENS else 0,
            "UNIT": unit,
            "WIDE": wide,
            "STAGES": self.variant.stages,
        }

    def columns(self, g: MlaGeometry) -> int:
        """Columns of a partial result."""
        return self.main + (self.tail if g.head_dim_v > self.main else 0)

    def slots(self, g: MlaGeometry) -> int:
        """Partial results there may be at once."""
        return self.side * (g.batch * self.table.chunks if g.batch_invariant else 2 * self.parts)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A plan: `kernels.schedule`'s result and the workspace of every decode with it, in one allocation each.

    Attributes
    ----------
    geometry : MlaGeometry
    sizes : Sizes
    prefix, first : Tensor
        [batch + 1] int64, [parts] int32.
    slots, states : Tensor
        float32 partial results; their maxima and sums.
    flag : Tensor
        [1] int32: what was noticed of indices out of range.
    """

    geometry: MlaGeometry
    sizes: Sizes
    prefix: Tensor
    first: Tensor
    slots: Tensor
    states: Tensor
    flag: Tensor


class TritonMla:
    """MLA decode on one kind of device.

    Parameters
    ----------
    arch : str
        Selects the table of `tuning`.
    processors : int
        Of the device, each of which gets an equal share of the work.
    """

    def __init__(self, arch: str, processors: int) -> None:
        from hal.portable.triton import kernels

        self._kernels = kernels
        self.arch = arch
        self.processors = processors
        self.launches: Counter[str] = Counter()

    def plan(self, args: MlaPlanArgs) -> Schedule:
        """Allocate, and let the device sum up the steps of these lengths."""
        return self._plan(args.geometry, args.cache_seqlens, args.cu_seqlens_q)

    def decode(self, args: MlaDecodeArgs, schedule: Schedule | None) -> None:
        """Write ``args.out`` and ``args.lse`` on the current stream.

        Raises
        ------
        SpecError
            At validation level ``full``: an index or length was out of range. It was not followed at any level.
        """
        assert args.block_table is not None and args.cache_seqlens is not None
        if args.out.numel() == 0:
            return
        if schedule is None:
            schedule = self._plan(args.geometry(), args.cache_seqlens, args.cu_seqlens_q)
        self._launch(args, args.block_table, args.cache_seqlens, schedule)
        if validation_level() is Level.FULL:
            _raise_faults(schedule.flag)

    def _plan(self, g: MlaGeometry, lengths: Tensor, starts: Tensor | None) -> Schedule:
        sizes = Sizes.of(self.arch, self.processors, g)
        slots, rows = sizes.slots(g), sizes.variant.rows

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=g.device)

        schedule = Schedule(
            geometry=g,
            sizes=sizes,
            prefix=empty(g.batch + 1, dtype=torch.int64),
            first=empty(sizes.parts, dtype=torch.int32),
            slots=empty(slots, rows, sizes.columns(g), dtype=torch.float32),
            states=empty(slots, 2, rows, dtype=torch.float32),
            flag=empty(1, dtype=torch.int32),
        )
        if g.batch:
            self._kernels.schedule[(1,)](
                lengths,
                lengths if starts is None else starts,
                schedule.prefix,
                schedule.first,
                schedule.flag,
                g.batch,
                g.s_q,
                sizes.group,
                g.h_kv,
                sizes.side,
                sizes.parts,
                **sizes.compiled("schedule", g),
                **sizes.constants(g),
                num_warps=4,
            )
            self.launches["mla_schedule"] += 1
        return schedule

    def _launch(self, args: MlaDecodeArgs, table: Tensor, lengths: Tensor, schedule: Schedule) -> None:
        g, sizes = schedule.geometry, schedule.sizes
        variant, starts, token = sizes.variant, args.cu_seqlens_q, args.kv_cache.stride(1)
        offsets = lengths if starts is None else starts
        q_strides, out_strides = args.q.stride()[-4:-1], args.out.stride()[-4:-1]
        lse_strides = args.h_q * args.s_q, args.s_q
        if starts is not None:
            # A ragged q has no batch dimension; its queries are found by their offsets instead.
            q_strides, out_strides = (0, *q_strides), (0, *out_strides)
            lse_strides = 0, args.total_q
        strides = (*q_strides, *args.kv_cache.stride()[:3])
        unit = _unit(*strides, *out_strides)
        constants = sizes.constants(g)
        log_unit = 1.0 if args.lse_base == "2" else _LN2
        out_sizes = (*(stride // unit for stride in out_strides), *lse_strides)
        numbers = (
            args.batch,
            args.s_q,
            args.total_q,
            sizes.group,
            args.h_kv,
            args.head_dim_v,
            min(args.max_blocks * args.page_size, _MOST),
            sizes.side,
            sizes.parts,
        )
        made = (schedule.prefix, schedule.first, schedule.slots, schedule.states)
        self._kernels.decode[(sizes.side, sizes.parts)](
            args.q,
            args.kv_cache,
            table,
            lengths,
            offsets,
            args.out,
            args.lse,
            *made,
            schedule.flag,
            args.softmax_scale / _LN2,
            log_unit,
            int(args.causal),
            *(stride // unit for stride in strides),
            table.stride(0),
            *out_sizes,
            args.head_dim,
            args.page_size,
            args.num_blocks,
            *numbers,
            **sizes.compiled("decode", g, token=token, unit=unit, wide=_far(args)),
            **constants,
            num_warps=variant.warps,
        )
        self.launches["mla_decode"] += 1
        cuts = g.batch * sizes.each if g.batch_invariant else sizes.parts
        if cuts < 1 or (cuts == 1 and not g.batch_invariant):
            return
        merged = sizes.compiled("merge", g, unit=unit)
        self._kernels.merge[(cuts, sizes.side, variant.rows // merged["TOGETHER"])](
            lengths,
            offsets,
            args.out,
            args.lse,
            *made,
            log_unit,
            *out_sizes,
            *numbers,
            sizes.each,
            **merged,
            **constants,
            num_warps=4,
        )
        self.launches["mla_merge"] += 1


def _raise_faults(flag: Tensor) -> None:
    """Read what the kernels noticed, which waits for them."""
    found = int(flag.item())
    if not found:
        return
    flag.zero_()
    if found & 4:
        raise SpecError("cu_seqlens_q", "offsets out of order", "offsets that start at 0, never fall, end at total_q")
    if found & 1:
        raise SpecError("cache_seqlens", "a length out of range", "0…max_blocks × page_size")
    raise SpecError("block_table", "an entry out of range", "0…num_blocks − 1 within cache_seqlens")


def _unit(*strides: int) -> int:
    """What strides are counted in: 8 elements where all are multiples of it, which is 16 bytes of two-byte elements."""
    return 1 if any(stride % 8 for stride in strides) else 8


def _far(args: MlaDecodeArgs) -> bool:
    """Whether an offset within a tile of rows or a page of tokens may not fit 32 bits."""
    token, query, head = args.kv_cache.stride(1), args.q.stride(-3), args.q.stride(-2)
    row = max(query + head * args.h_q, args.out.stride(-3) + args.out.stride(-2) * args.h_q)
    return max(token * args.page_size, row * _MOST_ROWS) > _MOST - MAX_HEAD_DIM


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
