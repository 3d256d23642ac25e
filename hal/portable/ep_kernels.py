"""The kernels of expert parallelism as calls on tensors: what is compiled, and how it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hal.portable.mla import ELEMENTS
from hal.portable.runtime import Event, Memory, Number, Program, Queue, SharingDevice, Source
from hal.spec.ep import FP8, SCALE_GROUP

_THREADS: Final = 64
WIDE: Final = 256
"""Threads of a group that is to use a processor alone; no device has less room for a group."""

_FEW_GROUPS: Final = 4096
_TURNS: Final = 2000
"""How often a kernel looks at a flag before it ends, whatever it saw."""

_built: WeakKeyDictionary[SharingDevice, dict[Source, Program]] = WeakKeyDictionary()
"""What was compiled, by device: buffers come and go."""

LAYOUT: Final = Source(("ep.h", "ep_layout.h"), (("THREADS", _THREADS),))
FLAGS: Final = Source(("ep_flags.h",), ())


def copies(word: int, threads: int = _THREADS) -> Source:
    """``ep_copy`` for words of 16 or 4 bytes."""
    return Source(("ep_copy.h",), (("THREADS", threads), ("LANES", _THREADS), ("WORD", word)))


def sums(dtype: torch.dtype, partial: bool, threads: int = _THREADS) -> Source:
    """``ep_reduce`` of rows of a dtype, left in float32 or rounded."""
    flags = (("ELEMENT", ELEMENTS[dtype]), ("THREADS", threads), ("PARTIAL", int(partial)))
    return Source(("elements.h", "ep_reduce.h"), flags)


def casts(dtype: torch.dtype, powers: bool, packed: bool) -> Source:
    """``ep_cast`` and ``ep_dequantise`` of rows of a dtype."""
    flags = (("ELEMENT", ELEMENTS[dtype]), ("GROUP", SCALE_GROUP), ("POWERS", int(powers)), ("PACKED", int(packed)))
    return Source(("elements.h", "ep_cast.h"), flags)


def every(*dtypes: torch.dtype) -> list[Source]:
    """All there is to compile, for rows of some dtypes or any."""
    casting = ((False, False), (True, False), (True, True))
    return [
        LAYOUT,
        FLAGS,
        *(copies(word, threads) for word in (16, 4) for threads in (_THREADS, WIDE)),
        *(
            sums(dtype, partial, threads)
            for dtype in dtypes or ELEMENTS
            for partial in (False, True)
            for threads in (_THREADS, WIDE)
        ),
        *(casts(dtype, *how) for dtype in dtypes or ELEMENTS for how in casting),
    ]


class Rows:
    """Rows in memory, as ``ep_copy`` takes them.

    Parameters
    ----------
    memory : Memory
    row_bytes : int
        Bytes of a row, of which the next begins as many later.
    at : int
        Byte of the first.
    """

    __slots__ = ("at", "memory", "row_bytes", "stride")

    def __init__(self, memory: Memory, row_bytes: int, at: int = 0, stride: int = 0) -> None:
        self.memory, self.row_bytes, self.at, self.stride = memory, row_bytes, at, stride or row_bytes


class EpKernels:
    """The kernels on one device.

    Parameters
    ----------
    device : SharingDevice

    Attributes
    ----------
    processors : int or None
        How many of the device's what is launched may take; None for all. A group of threads runs on one of them, so
        there are no more groups then, of more threads each.
    """

    def __init__(self, device: SharingDevice) -> None:
        self.device = device
        self.processors: int | None = None
        self._programs = _built.setdefault(device, {})
        self._last: Event | None = None

    def finish(self, queue: Queue) -> None:
        """Wait until all that was launched is done, so that others may have the memory it used."""
        queue.finish()
        self.settle()

    def settle(self) -> None:
        """Wait for what was launched last, and so for all before it."""
        if self._last is not None:
            self._last.wait()

    def rows_of(self, queue: Queue, tensor: Tensor) -> Rows:
        """The rows of a tensor [n, …] to read, in a copy if they do not lie where words can be read."""
        flat = tensor.flatten(1) if tensor.dim() > 2 else tensor
        row = flat.shape[1] * flat.itemsize
        word = _word(row)
        if flat.stride(1) != 1 or flat.stride(0) * flat.itemsize % word or flat.data_ptr() % word:
            flat = flat.clone(memory_format=torch.contiguous_format)
        return Rows(queue.read(flat), row, stride=flat.stride(0) * flat.itemsize)

    def layout(
        self, queue: Queue, idx: Tensor, starts: Tensor, room: int, base: int, span: int, bins: int, repeat: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts [bins], places [n, K] and lists [room] of the tokens that chose each bin; see ``ep_layout.h``."""
        tokens, topk = idx.shape
        counts = torch.zeros(bins, dtype=torch.int32, device=idx.device)
        order = torch.full((tokens, topk), -1, dtype=torch.int32, device=idx.device)
        found = torch.full((max(room, 1),), -1, dtype=torch.int32, device=idx.device)
        if tokens:
            sizes = _int32(tokens, topk, base, span, bins, repeat)
            written = (queue.write(one, partly=True)[0] for one in (counts, order, found))
            self._launch(
                queue,
                LAYOUT,
                "ep_layout",
                self._groups(bins),
                _THREADS,
                queue.read(idx),
                queue.read(starts),
                *written,
                *sizes,
            )
        return counts, order, found

    def copy(
        self, queue: Queue, to: Rows, source: Rows, rows: Tensor, begin: int, count: int, most: int, clear: bool
    ) -> None:
        """Row i of ``count`` becomes row ``rows[begin + i]`` of the source, if it is below ``most``."""
        if not count or not to.row_bytes:
            return
        word = _word(to.row_bytes)
        places = (begin, to.at // word, to.stride // word, source.at // word, source.stride // word)
        self._launch(
            queue,
            copies(word, self._threads),
            "ep_copy",
            self._groups(min(count, _FEW_GROUPS)),
            self._threads,
            to.memory,
            source.memory,
            queue.read(rows),
            *_int32(count, most, to.row_bytes // word),
            *(np.int64(one) for one in places),
            np.int32(clear),
        )

    def reduce(
        self,
        queue: Queue,
        out: Tensor,
        table: Tensor,
        place: Tensor,
        weights: Tensor | None = None,
        biases: Sequence[Tensor] = (),
    ) -> None:
        """Sum a table [n, K, H] over K into out [n, H], of the table's dtype or float32."""
        tokens, topk = place.shape
        if not tokens:
            return
        partial = out.dtype != table.dtype
        written, (stride, _) = queue.write(out)
        rows = queue.read(table)
        bias = [(queue.read(one), one.stride(0)) for one in biases] + [(rows, 0)] * 2
        self._launch(
            queue,
            sums(table.dtype, partial, self._threads),
            "ep_reduce",
            self._groups(min(tokens, _FEW_GROUPS)),
            self._threads,
            written,
            rows,
            queue.read(place),
            rows if weights is None else queue.read(weights),
            bias[0][0],
            bias[1][0],
            *_int32(tokens, topk, table.shape[2], len(biases), weights is not None),
            *(np.int64(one) for one in (stride, bias[0][1], bias[1][1])),
        )

    def cast(self, queue: Queue, x: Tensor, cast: str) -> tuple[Tensor, Tensor]:
        """FP8 rows [n, H] and their scales [n, words] of 32 bits: floats, or four exponents each."""
        n, columns = x.shape
        groups, packed = -(-columns // SCALE_GROUP), cast == "fp8_ue8m0"
        rows = torch.empty(n, columns, dtype=torch.uint8, device=x.device)
        width = -(-groups // 4) if packed else groups
        scales = torch.zeros(n, width, dtype=torch.int32, device=x.device)
        if n:
            to, scales_to = queue.write(rows)[0], queue.write(scales, partly=True)[0]
            sizes = _int32(columns, groups, 4 * width if packed else width)
            source = casts(x.dtype, cast != "fp8", packed)
            reads = (to, scales_to, scales_to, queue.read(x))
            strides = (np.int64(n * groups), np.int64(x.stride(0)))
            self._launch(queue, source, "ep_cast", self._groups(n * groups), SCALE_GROUP, *reads, *sizes, *strides)
        return rows.view(FP8), scales

    def dequantise(self, queue: Queue, x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Elements of FP8 rows [n, H] with float32 scales [n, ceil(H / 128)], both contiguous."""
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        if len(x):
            groups = scales.shape[1]
            reads = (queue.write(out)[0], queue.read(x), queue.read(scales))
            source = casts(dtype, False, False)
            sizes = _int32(x.shape[1], groups)
            self._launch(queue, source, "ep_dequantise", len(x) * groups, SCALE_GROUP, *reads, *sizes)
        return out

    def signal(self, queue: Queue, flags: Memory, at: int, value: int) -> None:
        """Set a flag once everything before it in the queue is done; of the value the last 32 bits."""
        self._launch(queue, FLAGS, "ep_signal", 1, 1, flags, *_int32(at, _signed(value)))

    def seen(self, flags: Memory, count: int, stride: int, value: int, device: torch.device) -> list[int]:
        """Flags as they are after looking for ``value`` a while; `before` compares them."""
        queue = self.device.queue()
        found = torch.zeros(count, dtype=torch.int32, device=device)
        written = queue.write(found)[0]
        self._launch(queue, FLAGS, "ep_await", count, 1, flags, written, *_int32(stride, _signed(value), _TURNS))
        queue.finish()
        return found.tolist()

    @property
    def _threads(self) -> int:
        return _THREADS if self.processors is None else WIDE

    def _groups(self, wanted: int) -> int:
        return wanted if self.processors is None else min(wanted, self.processors)

    def _launch(
        self, queue: Queue, source: Source, kernel: str, groups: int, threads: int, *arguments: Memory | Number
    ) -> None:
        self._last = queue.launch(self._program(source), kernel, groups, threads, arguments)

    def _program(self, source: Source) -> Program:
        if source not in self._programs:
            self._programs[source] = self.device.build(source)
        return self._programs[source]


def _word(row_bytes: int) -> int:
    return 16 if row_bytes % 16 == 0 else 4


def before(flag: int, value: int) -> bool:
    """Whether a flag has not come to a value yet; of both the last 32 bits count."""
    return _signed(flag - value) < 0


def _signed(value: int) -> int:
    """The last 32 bits, as a kernel takes them."""
    return (value + 2**31) % 2**32 - 2**31


def _int32(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)
