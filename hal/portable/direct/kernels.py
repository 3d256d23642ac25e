"""The kernels of a call that ranks make on their devices, as calls on tensors and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hal.portable.direct.ways import Ways
from hal.portable.ep_kernels import WIDE, EpKernels, casts
from hal.portable.mla import ELEMENTS
from hal.portable.runtime import Event, MeetingDevice, Memory, Program, Queue, Source, Words
from hal.spec.ep import SCALE_GROUP

RING: Final = 64
"""Calls that may be under way."""
HEAD: Final = 16
"""Words of a header."""
CHANNELS: Final = 4
"""Places besides, that calls of captured graphs share: two for dispatch, two for combine."""
AGREE: Final = 9
"""Those of them that all ranks must agree on."""

_PLACES: Final = (("RING", RING), ("CHANNELS", CHANNELS))
_LANES: Final = 64
_NARROW: Final = 64
_TURNS: Final = 2000
_MOST_GROUPS: Final = 1 << 16
_LEAST_CHOICES: Final = 8


def _sources(threads: int) -> dict[str, Source]:
    sizes = (("THREADS", threads), *_PLACES, ("LANES", _LANES))
    files = ("announce", "await_all", "stage", "count", "places", "fetch")
    return {name: Source(("ep.h", "ep_meet.h", f"ep_{name}.h"), sizes) for name in files}


_BY_THREADS: Final = {threads: _sources(threads) for threads in (_NARROW, WIDE)}


def gathers(dtype: torch.dtype, topk: int) -> Source:
    """``ep_gather`` of rows of a dtype, for tokens of at most so many choices."""
    choices = max(_LEAST_CHOICES, 1 << (topk - 1).bit_length())
    sizes = (
        ("ELEMENT", ELEMENTS[dtype]),
        ("THREADS", WIDE),
        *_PLACES,
        ("MOST_CHOICES", choices),
    )
    return Source(("ep.h", "elements.h", "ep_meet.h", "ep_gather.h"), sizes)


def every(*dtypes: torch.dtype) -> list[Source]:
    """All there is to compile, for rows of some dtypes or any and up to eight choices."""
    return [
        *(source for sources in _BY_THREADS.values() for source in sources.values()),
        *(gathers(dtype, _LEAST_CHOICES) for dtype in dtypes or ELEMENTS),
    ]


class Turn(NamedTuple):
    """Which place on the boards a call has, and its number there.

    Attributes
    ----------
    slot, call : int
    epoch : int
        Address of the word that has the number instead, where the call is captured; 0 where it is not.
    """

    slot: int
    call: int
    epoch: int = 0

    @staticmethod
    def of(call: int) -> Turn:
        """Of a call that the host makes."""
        return Turn(call % RING, signed(call))


@dataclass(frozen=True, slots=True)
class Staging:
    """What a rank stages for a call.

    Attributes
    ----------
    count : int
        Rows.
    row, scale, topk, weight : int
        Of each: bytes, bytes of scales, choices, bytes of weights. All ranks have the same.
    """

    count: int
    row: int
    scale: int = 0
    topk: int = 0
    weight: int = 0

    def part(self, number: int) -> int:
        """Where the part of that number begins; see ``ep_part``."""
        sizes = (self.row, self.scale, 4 * self.topk, self.weight)
        return sum(-(-self.count * size // 16) * 16 for size in sizes[:number])

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.part(4)


class DirectKernels(EpKernels):
    """The kernels on one device, for one rank of a node.

    Attributes
    ----------
    device : MeetingDevice
    here, ranks : int
    boards : Tensor
        [R] int64: where the board of each rank is for this one.
    windows : Tensor
        [R, W, 2] int64: address and size of each rank's windows, by their numbers; 0 where one is not known.
    wrong : int
        Address of a word that says what the device found wrong with this rank's call.
    """

    device: MeetingDevice
    here: int
    ranks: int
    boards: Tensor
    windows: Tensor
    wrong: int

    def __init__(self, device: MeetingDevice) -> None:
        super().__init__(device)
        self._built: dict[tuple[str, int], Program] = {}
        self._gathers: dict[tuple[torch.dtype, int], Program] = {}
        self._casts: dict[tuple[torch.dtype, str], Program] = {}
        self._elsewhere: dict[object, Event] = {}

    @property
    def last(self) -> Event | None:
        """The end of what was launched last."""
        return self._last

    @property
    def stream(self) -> object:
        """Where something was launched last."""
        return None if self._last is None else self._last.stream

    def lend(self, ways: Ways) -> None:
        """Keep ways that were counted on another stream than that of the last launch until it is done with them."""
        one: Ways | None = ways if ways.stream != self.stream else None
        while one is not None:
            self.device.used_here(one.memory)
            one = one.before

    def settle(self) -> None:
        """Wait for all that was launched, wherever."""
        super().settle()
        while self._elsewhere:
            self._elsewhere.popitem()[1].wait()

    def carved(self, *words: int) -> tuple[Memory, list[int]]:
        """Memory for kernels alone, and where pieces of so many words begin in it, at multiples of 16 bytes."""
        ends = list(accumulate(-(-one // 4) * 16 for one in words))
        memory = self.device.allocator.empty(max(ends[-1], 16))
        begin = address_of(memory)
        return memory, [begin, *(begin + end for end in ends[:-1])]

    def stage(
        self,
        queue: Queue,
        to: int,
        staging: Staging,
        x: Tensor | None,
        scales: Tensor | None = None,
        idx: Tensor | None = None,
        weights: Tensor | None = None,
        routes: int = 0,
        experts: int = 0,
        valid: tuple[int, int, int] | None = None,
    ) -> None:
        """Put rows and what goes with them at ``to``; see ``ep_stage``.

        ``valid`` says how many slots there are for each expert, and where it stands how many of them have rows.
        """
        if not staging.count:
            return
        rows = None if x is None else self.rows_of(queue, x)
        row_strides = (0, 0) if scales is None else scales.stride()
        counts, begin, slots = valid or (0, 0, 0)
        threads = self._wide(staging.count)
        # Most slots have no row: groups that look at several are sooner through than as many groups.
        most = 16 * self.device.facts.processors if valid else _MOST_GROUPS
        words = (staging.count, 0 if x is None else staging.row // 16, staging.row, staging.scale, staging.topk)
        self._start(
            queue,
            "stage",
            "ep_stage",
            self._groups(min(-(-staging.count * _LANES // threads), most)),
            threads,
            to,
            0 if rows is None else rows.memory,
            *(0 if one is None else queue.read(one) for one in (scales, idx, weights)),
            counts,
            routes,
            self.wrong,
            words_of(*words, staging.weight, experts, slots, begin),
            0 if rows is None else rows.stride // 16,
            *row_strides,
        )

    def cast_into(self, queue: Queue, to: int, staging: Staging, x: Tensor, groups: int, cast: str) -> None:
        """FP8 rows and their scales of x [n, H], as parts of what is staged."""
        if not staging.count:
            return
        packed = cast == "fp8_ue8m0"
        program = self._casts.get((x.dtype, cast))
        if program is None:
            program = self._casts[x.dtype, cast] = self._program(casts(x.dtype, cast != "fp8", packed))
        scales = to + staging.part(1)
        width = staging.scale if packed else staging.scale // 4
        parts = staging.count * groups
        reads = (to, scales, scales, queue.read(x), words_of(x.shape[1], groups, width))
        given = (*reads, parts, x.stride(0))
        self._launched(queue.launch(program, "ep_cast", self._groups(parts), SCALE_GROUP, given))

    def compare(self, queue: Queue, idx: Tensor, routes: int) -> None:
        """See that no choice is another than the dispatch had."""
        if idx.numel():
            groups = -(-idx.numel() // _NARROW)
            reads = (queue.read(idx), routes, self.wrong, words_of(idx.numel()))
            self._start(queue, "stage", "ep_compare", self._groups(min(groups, 256)), _NARROW, *reads)

    def announce(self, queue: Queue, turn: Turn, kind: int, window: int, count: int, fields: Sequence[int]) -> None:
        """Tell all ranks of a call, once the queue has come so far."""
        words = (turn.slot, self.here, self.ranks, turn.call, kind, window, count, *fields)
        reads = (queue.read(self.boards), self.wrong, turn.epoch, words_of(*words, *(0,) * (AGREE - len(fields))))
        self._start(queue, "announce", "ep_announce", 1, _NARROW, *reads)

    def await_all(
        self,
        queue: Queue,
        turn: Turn,
        met: Memory,
        routes: int,
        told: Memory,
        most: int,
        staging: Staging,
        turns: int | None = None,
    ) -> None:
        """Wait a while for all ranks; see ``ep_await_all``."""
        turns = _TURNS if turns is None else turns
        places = (turn.slot, self.here, self.ranks, turn.call, turns, self.windows.shape[1], most)
        sizes = (staging.row, staging.scale, staging.topk, staging.weight)
        reads = (queue.read(self.boards), queue.read(self.windows), met, routes, told, turn.epoch)
        groups, threads = self._groups(self.ranks), self._wide(most * staging.topk)
        self._start(queue, "await_all", "ep_await_all", groups, threads, *reads, words_of(*places, *sizes))

    def begin(self, queue: Queue, turn: Turn, turns: int) -> None:
        """Begin the next round of a captured call's place; see ``ep_turn``."""
        reads = (queue.read(self.boards), turn.epoch, words_of(turn.slot, self.here, self.ranks, turns))
        self._start(queue, "announce", "ep_turn", 1, _NARROW, *reads)

    def done(self, queue: Queue, turn: Turn, met: Memory | int, whatever: bool) -> None:
        """Tell all ranks that this one has read what they staged for a call."""
        words = (turn.slot, self.here, self.ranks, turn.call, whatever)
        reads = (queue.read(self.boards), met, turn.epoch, words_of(*words))
        self._start(queue, "announce", "ep_done", 1, _NARROW, *reads)

    def count(self, queue: Queue, met: Memory | int, ways: Ways) -> None:
        """See ``ep_count``."""
        bins = ways.bins
        words = (self.here, self.ranks, ways.most, ways.topk, bins.local, bins.by_rank, bins.first, bins.experts)
        groups = self._groups(min(self.ranks * bins.all, _MOST_GROUPS))
        # The memory itself, which begins with them, so that the queue keeps it.
        to = (ways.memory, ways.counted, ways.order, ways.listed)
        threads = self._wide(ways.most)
        self._start(queue, "count", "ep_count", groups, threads, met, *to, words_of(*words, bins.expanded, bins.repeat))

    def drop(self, queue: Queue, met: Memory | int, ways: Ways, accepted: Tensor) -> None:
        """See ``ep_drop``."""
        words = words_of(self.here, self.ranks, ways.most, ways.topk, ways.bins.local)
        reads = (met, ways.memory, ways.routes, queue.read(accepted))
        self._start(queue, "count", "ep_drop", self._groups(self.ranks), self._wide(ways.most), *reads, words)

    def places(
        self,
        queue: Queue,
        met: Memory | int,
        ways: Ways,
        ranges: Memory | int,
        received: Memory | int,
        told: Memory | int,
        alignment: int,
        slots: int,
        call: int,
    ) -> None:
        """See ``ep_places``."""
        bins = ways.bins
        words = (self.here, self.ranks, bins.local, bins.by_rank, bins.experts, bins.expanded, alignment, slots)
        found = (met, ways.counted, ways.bases, ways.begins, ways.totals, ranges, received, told)
        self._start(queue, "places", "ep_places", 1, self._wide(bins.spots), *found, words_of(*words, signed(call)))

    def fetch(
        self,
        queue: Queue,
        met: Memory | int,
        ways: Ways,
        to: Sequence[Memory | int],
        staging: Staging,
        wants_routes: bool,
        scales: tuple[int, int, int],
    ) -> None:
        """See ``ep_fetch``; ``to`` are rows, scales, experts, weights, positions and choices."""
        bins, most = ways.bins, ways.most
        pairs, threads = self.ranks * bins.own, self._threads
        # As many rows at once as keep the way to the other devices full, and no more groups than there can be rows.
        slices = max(1, min(-(-8 * self.device.facts.processors // pairs), -(-most * _LANES // threads)))
        words = (self.here, self.ranks, most, ways.topk, bins.local, bins.by_rank, bins.first, bins.experts)
        sizes = (bins.expanded, slices, staging.row, staging.scale, staging.topk, staging.weight, wants_routes)
        counted = (ways.memory, ways.counted, ways.begins, ways.listed)
        reads = (met, *counted, *to, words_of(*words, *sizes), *scales)
        self._start(queue, "fetch", "ep_fetch", self._groups(pairs * slices), threads, *reads)

    def gather(
        self,
        queue: Queue,
        met: Memory | int,
        ways: Ways,
        out: Tensor,
        sums: Tensor | None,
        weight: int,
        biases: Sequence[Tensor] = (),
        idx: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """See ``ep_gather``: ``weights`` are multiplied with, ``sums`` are of those that come back."""
        tokens, columns = out.shape
        if not tokens:
            return
        written, (stride, _) = queue.write(out, partly=True)
        # Few tokens are several groups each, for every processor to fetch something.
        whole = -(-columns * out.itemsize // (16 * WIDE))
        parts = max(1, min(-(-4 * self.device.facts.processors // tokens), whole))
        bias = [(queue.read(one), one.stride(0)) for one in biases] + [(0, 0)] * 2
        aligned = out.data_ptr() % 16 == 0 and stride * out.itemsize % 16 == 0
        flags = (len(biases), weights is not None, idx is not None, aligned)
        sizes = (self.ranks, tokens, ways.topk, ways.bins.local, ways.bins.expanded, parts, columns, weight)
        program = self._gathers.get((out.dtype, ways.topk))
        if program is None:
            program = self._gathers[out.dtype, ways.topk] = self._program(gathers(out.dtype, ways.topk))
        reads = (
            met,
            written,
            0 if sums is None else queue.write(sums, partly=True)[0],
            ways.routes,
            ways.order,
            ways.bases,
            *(0 if one is None else queue.read(one) for one in (idx, weights)),
            bias[0][0],
            bias[1][0],
            words_of(*sizes, *flags),
            stride,
            bias[0][1],
            bias[1][1],
        )
        groups = self._groups(min(tokens * parts, _MOST_GROUPS))
        self._launched(queue.launch(program, "ep_gather", groups, WIDE, reads))

    def _wide(self, count: int) -> int:
        """Threads of a group that goes through so many things: few where there are few."""
        return WIDE if count > WIDE else _NARROW

    def _start(self, queue: Queue, source: str, kernel: str, groups: int, threads: int, *arguments: Any) -> None:
        program = self._built.get((source, threads))
        if program is None:
            program = self._built[source, threads] = self._program(_BY_THREADS[threads][source])
        self._launched(queue.launch(program, kernel, groups, threads, arguments))

    def _launched(self, event: Event) -> None:
        last, self._last = self._last, event
        if last is not None and last.stream != event.stream:
            self._elsewhere[last.stream] = last


def signed(call: int) -> int:
    """The last 32 bits of a call's number, as kernels take them."""
    return (call + 2**31) % 2**32 - 2**31


def words_of(*values: int) -> Words:
    """As kernels take them."""
    return Words(values)


def address_of(memory: Memory) -> int:
    """Where it is for kernels."""
    return memory.data_ptr() if isinstance(memory, Tensor) else int(memory)  # type: ignore[call-overload]
