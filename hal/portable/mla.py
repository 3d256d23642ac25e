"""The host side of the portable MLA decode: sizes, workspace, launches, over any driver of `hal.portable.runtime`.

A plan owns all memory that decoding needs; its size follows from sizes alone, never from lengths, so that nothing here
waits for a device to look at them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hal.portable.runtime import Argument, Device, Facts, Memory, Program, Queue, Source
from hal.spec.capability import MAX_HEAD_DIM

if TYPE_CHECKING:
    from torch import Tensor

    from hal.spec.mla import MlaDecodeArgs, MlaGeometry
    from hal.spec.plan import MlaPlanArgs


SCHEDULE: Final = ("mla.h", "mla_schedule.h")
DECODE: Final = ("elements.h", "mla.h", "mla_decode.h", "mla_merge.h")
ELEMENTS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Few sizes, so that little is compiled: it takes seconds each, and all but the last of a kind are seldom asked for.
_WIDTHS_K: Final = (64, MAX_HEAD_DIM)
_WIDTHS_V: Final = (64, 512, MAX_HEAD_DIM)
_ROWS: Final = (4, 8, 16)
_FEW: Final = 4
_BLOCKS: Final = (32, 16, 8)
_THREADS: Final = 128
_LANES: Final = 8
_SCAN: Final = 64
_CHUNKS: Final = 32
"""With ``batch_invariant`` the most pieces of a sequence, over all its units."""
_LEAST_TOKENS: Final = (128, 512)
"""Least tokens of a piece: usually, and with ``batch_invariant``."""
_MOST: Final = 2**31 - 1
_LN2: Final = math.log(2)


@dataclass(frozen=True, slots=True)
class Tile:
    """What the kernels are compiled with; ``kernels/mla_decode.h`` says what each is."""

    element: int
    rows: int
    block: int
    width_k: int
    width_v: int
    subgroup: int

    @staticmethod
    def of(facts: Facts, g: MlaGeometry) -> Tile:
        """The largest that fits local memory, without more rows than there are."""
        # How many queries a ragged sequence has is known to the device alone: mostly one or two.
        there = g.h_q // g.h_kv * (2 if g.ragged_q else max(g.s_q, 1))
        wanted = _FEW if there <= _FEW else _ROWS[-1]
        k = next(width for width in _WIDTHS_K if width >= g.head_dim)
        v = next(width for width in _WIDTHS_V if width >= g.head_dim_v)
        choices = (
            Tile(ELEMENTS[g.dtype], rows, block, k, v, facts.subgroup)
            for rows in sorted((rows for rows in _ROWS if rows <= wanted), reverse=True)
            for block in _BLOCKS
        )
        return next(tile for tile in choices if tile.local_bytes <= facts.local_bytes or tile.smallest)

    @property
    def smallest(self) -> bool:
        """Whether there is nothing to choose after it."""
        return (self.rows, self.block) == (_ROWS[0], _BLOCKS[-1])

    @property
    def slices(self) -> int:
        """Sets of threads that have rows of their own."""
        vectors = self.width_v // 8
        return min(self.rows, 1 << (-(-_THREADS // vectors) - 1).bit_length())

    @property
    def threads(self) -> int:
        """Of a group."""
        return self.width_v // 8 * self.slices

    @property
    def grain(self) -> int:
        """Scores of a token that one thread computes, so that all threads have some."""
        share = self.rows * self.block // self.threads
        return min(4, self.rows, 1 << max(share, 1).bit_length() - 1)

    @property
    def local_bytes(self) -> int:
        """Of a group of ``mla_decode``."""
        tokens = (self.rows + self.block) * (self.width_k + 8) * (2 if self.element else 4)
        numbers = self.rows * self.block + 2 * self.threads + 6 * self.rows
        return tokens + 4 * numbers + 8 * self.block

    def schedule(self) -> Source:
        """``mla_schedule``, which depends on very little."""
        return Source(SCHEDULE, (("ROWS", self.rows), ("BLOCK", self.block), ("SCAN", _SCAN)))

    def decode(self) -> Source:
        """``mla_decode`` and ``mla_merge`` of these sizes."""
        flags = {
            "ELEMENT": self.element,
            "ROWS": self.rows,
            "BLOCK": self.block,
            "WIDTH_K": self.width_k,
            "WIDTH_V": self.width_v,
            "SLICES": self.slices,
            "GRAIN": self.grain,
            "HAL_SUBGROUP": self.subgroup,
        }
        return Source(DECODE, tuple(flags.items()))


@dataclass(frozen=True, slots=True)
class Schedule:
    """A plan: what ``mla_schedule`` found, and the workspace of every decode with it.

    Attributes
    ----------
    geometry : MlaGeometry
    tile : Tile
    program : Program
    sums, slots, states : Memory
        See ``kernels/mla.h``.
    parts, most_slots : int
    """

    geometry: MlaGeometry
    tile: Tile
    program: Program
    sums: Memory
    slots: Memory
    states: Memory
    parts: int
    most_slots: int

    def most_pieces(self, total_q: int) -> int:
        """A bound on the pieces of a batch, whatever its lengths."""
        g, rows = self.geometry, self.tile.rows
        group = g.h_q // g.h_kv
        tiles = total_q * group // rows + g.batch if g.ragged_q else g.batch * -(-g.s_q * group // rows)
        return tiles * g.h_kv + (self.most_slots if g.batch_invariant else self.parts)


class PortableMla:
    """MLA decode on one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._programs: dict[Source, Program] = {}

    def plan(self, args: MlaPlanArgs) -> Schedule:
        """Allocate, and let the device sum up the pieces of these lengths."""
        queue = self.device.queue()
        schedule = self._plan(queue, args.geometry, args.cache_seqlens, args.cu_seqlens_q)
        queue.finish()
        return schedule

    def decode(self, args: MlaDecodeArgs, schedule: Schedule | None) -> None:
        """Write ``args.out`` and ``args.lse``."""
        assert args.block_table is not None and args.cache_seqlens is not None
        if args.out.numel() == 0:
            return
        queue = self.device.queue()
        if schedule is None:
            schedule = self._plan(queue, args.geometry(), args.cache_seqlens, args.cu_seqlens_q)
        self._launch(queue, args, args.block_table, args.cache_seqlens, schedule)
        queue.finish()

    def _program(self, source: Source) -> Program:
        if source not in self._programs:
            self._programs[source] = self.device.build(source)
        return self._programs[source]

    def _plan(self, queue: Queue, g: MlaGeometry, lengths: Tensor, starts: Tensor | None) -> Schedule:
        facts, tile = self.device.facts, Tile.of(self.device.facts, g)
        parts = facts.processors * facts.groups
        slots = g.batch * _CHUNKS if g.batch_invariant else 2 * parts
        empty = self.device.allocator.empty
        schedule = Schedule(
            geometry=g,
            tile=tile,
            program=self._program(tile.decode()),
            sums=empty(8 * (3 * g.batch + 2)),
            slots=empty(4 * slots * tile.rows * tile.width_v),
            states=empty(8 * slots * tile.rows),
            parts=parts,
            most_slots=slots,
        )
        where = queue.read(lengths)
        arguments = (
            where,
            where if starts is None else queue.read(starts),
            schedule.sums,
            *_int32(g.batch, starts is not None, g.s_q, g.h_q // g.h_kv, g.h_kv, parts),
            *_int32(_CHUNKS if g.batch_invariant else 0, -(-_LEAST_TOKENS[g.batch_invariant] // tile.block)),
        )
        queue.launch(self._program(tile.schedule()), "mla_schedule", 1, _SCAN, arguments)
        return schedule

    def _launch(self, queue: Queue, args: MlaDecodeArgs, table: Tensor, lengths: Tensor, schedule: Schedule) -> None:
        g, tile, facts = schedule.geometry, schedule.tile, self.device.facts
        at_lengths = queue.read(lengths)
        at_starts = at_lengths if args.cu_seqlens_q is None else queue.read(args.cu_seqlens_q)
        out, out_strides = queue.write(args.out)
        lse, lse_strides = queue.write(args.lse)
        q_strides, out_strides = args.q.stride()[:-1], out_strides[:-1]
        if g.ragged_q:
            # There is no dimension of the batch: queries are found by their offsets.
            q_strides, out_strides, lse_strides = (0, *q_strides), (0, *out_strides), (0, *lse_strides)
        log_unit = np.float32(1.0 if args.lse_base == "2" else _LN2)
        group = args.h_q // args.h_kv
        counts = _int32(args.batch, g.ragged_q, args.s_q, args.total_q, group, args.h_kv)
        to = _int64(*out_strides, *lse_strides[:2])
        kv_strides = args.kv_cache.stride()[:3]
        most_pieces = schedule.most_pieces(args.total_q)
        at_once = facts.processors * facts.groups
        decode: tuple[Argument, ...] = (
            queue.read(args.q),
            queue.read(args.kv_cache),
            queue.read(table),
            at_lengths,
            at_starts,
            schedule.sums,
            out,
            lse,
            schedule.slots,
            schedule.states,
            np.float32(args.softmax_scale / _LN2),
            log_unit,
            *counts,
            *_int32(args.head_dim, args.head_dim_v, args.page_size, args.num_blocks),
            *_int32(min(args.max_blocks * args.page_size, _MOST), args.causal, _aligned(args.q, args.kv_cache)),
            *_int64(most_pieces, schedule.most_slots, *q_strides, *kv_strides, table.stride(0)),
            *to,
        )
        queue.launch(schedule.program, "mla_decode", max(1, min(at_once, most_pieces)), tile.threads, decode)
        if schedule.most_slots > 0 and (schedule.parts > 1 or g.batch_invariant):
            merge: tuple[Argument, ...] = (
                at_lengths,
                at_starts,
                schedule.sums,
                out,
                lse,
                schedule.slots,
                schedule.states,
                log_unit,
                *counts,
                *_int32(args.head_dim_v),
                *_int64(schedule.most_slots),
                *to,
            )
            queue.launch(schedule.program, "mla_merge", min(at_once, schedule.most_slots), tile.threads, merge)


def _int32(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


def _int64(*values: int) -> tuple[np.int64, ...]:
    return tuple(np.int64(value) for value in values)


def _aligned(*tensors: Tensor) -> bool:
    """Whether eight elements can be read at once wherever a row begins."""
    return all(t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:-1]) for t in tensors)


class OnEachDevice:
    """`PortableMla` of every device that calls came for, opened when the first one does.

    Parameters
    ----------
    opened : callable
        Given torch's number of a device, its driver.
    """

    def __init__(self, opened: Callable[[int], Device]) -> None:
        self._opened = opened
        self._kernels: dict[int, PortableMla] = {}

    def on(self, index: int) -> PortableMla:
        """The kernels of one device."""
        if index not in self._kernels:
            self._kernels[index] = PortableMla(self._opened(index))
        return self._kernels[index]

    def launches(self) -> Mapping[str, int]:
        """As `Device.launches`, over all devices: those of one kind have their names in common."""
        found: Counter[str] = Counter()
        for kernels in self._kernels.values():
            found.update(kernels.device.launches())
        return found
