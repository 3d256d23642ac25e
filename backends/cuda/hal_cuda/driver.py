"""The driver that the portable kernels (`hal.portable`) see of a CUDA device, over cupy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hal.portable.ipc import IpcWindow
from hal.portable.runtime import Argument, Facts, Handle, InPlace, Mailboxes, Program, Source
from hal.spec.errors import DeviceError, first_line
from hal_cuda.calls import checked, current, raw_stream
from hal_cuda.compiler import compile_text, version
from hal_cuda.devices import architecture
from hal_cuda.ipc import CudaIpc, lacking
from hal_cuda.launching import Module

_STATIC_SHARED: Final = 48 << 10


def groups(arch: str) -> int:
    """Of the portable kernels on a processor: one more would wait until another is through with its share.

    As many as it has registers for, or shared memory on Volta and Turing.
    """
    return 1 if arch.startswith("sm_7") else 3


@dataclass(slots=True, eq=False)
class CudaProgram:
    """See `runtime.Program`."""

    source: Source
    module: Module


@dataclass(slots=True, eq=False)
class CudaEvent:
    """See `runtime.Event`: torch's events around a launch, where they were asked for."""

    started: torch.cuda.Event | None
    ended: torch.cuda.Event | None
    stream: int
    device: int = 0

    def wait(self) -> None:
        """Return when it is done, and all that its stream was given before."""
        from cupy.cuda import runtime

        with current(self.device):
            checked("cudaStreamSynchronize", runtime.streamSynchronize, self.stream)

    def seconds(self) -> float:
        """By the device's clock.

        Raises
        ------
        DeviceError
            The device was not made with ``timed``.
        """
        if self.started is None or self.ended is None:
            raise DeviceError("cuEventElapsedTime: the device was opened without timed=True")
        self.wait()
        return float(checked("cuEventElapsedTime", self.started.elapsed_time, self.ended)) * 1e-3


class CudaFork:
    """See `runtime.Fork`.

    Parameters
    ----------
    index : int
    origin : Stream
        Current now.
    side : Stream
        Given work by forks of that one alone.

    Raises
    ------
    DeviceError
    """

    __slots__ = ("_done", "_index", "_origin", "_side", "_within")

    def __init__(self, index: int, origin: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
        self._index, self._origin, self._side, self._done = index, origin, side, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._within = torch.cuda.stream(side)
        checked("cudaStreamWaitEvent", side.wait_stream, origin)

    def __enter__(self) -> None:
        self._within.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        try:
            checked("cudaEventRecord", self._done.record, self._side)
        finally:
            self._within.__exit__(*raised)

    def join(self) -> None:
        """See `runtime.Fork`."""
        here = torch.cuda.current_stream(self._index)
        checked("cudaStreamWaitEvent", here.wait_event, self._done)
        if here != self._origin:
            checked("cudaStreamWaitEvent", self._origin.wait_event, self._done)


class CudaDevice(Mailboxes, InPlace):
    """See `runtime.SharingDevice`; its queue is torch's current stream, so that nothing here waits.

    Parameters
    ----------
    index : int
    timed : bool
        Whether launches can be asked how long they took, which costs two more calls each.
    """

    transport: Final = "ipc"

    def __init__(self, index: int, timed: bool = False) -> None:
        self.index = index
        self.timed = timed
        self._sides: dict[tuple[int, bool], torch.cuda.Stream] = {}
        self._launches: Counter[str] = Counter()

    @cached_property
    def facts(self) -> Facts:
        """Of the architecture: machine code is the same for all its devices."""
        return Facts(
            name=architecture(self.index),
            driver=version(),
            dialect="cuda",
            processors=torch.cuda.get_device_properties(self.index).multi_processor_count,
            groups=groups(architecture(self.index)),
            local_bytes=_STATIC_SHARED,
            subgroup=32,
        )

    def empty(self, size: int) -> Tensor:
        """See `runtime.Allocator`; torch's memory, freed in the order of its stream."""
        try:
            return torch.empty(size, dtype=torch.uint8, device=f"cuda:{self.index}")
        except torch.OutOfMemoryError as error:
            raise lacking(self.index, "torch.empty", size, first_line(error)) from error

    @cached_property
    def _ipc(self) -> CudaIpc:
        return CudaIpc(self.index)

    looks = 750_000

    def capturing(self) -> bool:
        """See `runtime.MeetingDevice`."""
        return torch.cuda.is_current_stream_capturing()

    def fork(self) -> CudaFork:
        """See `runtime.MeetingDevice`."""
        origin = torch.cuda.current_stream(self.index)
        # One for captures, which are not to catch what is launched beside them.
        whose = (origin.cuda_stream, self.capturing())
        if whose not in self._sides:
            # Before what the caller computes, of which there may be enough for all processors.
            self._sides[whose] = torch.cuda.Stream(self.index, priority=-1)  # type: ignore[no-untyped-call]
        return CudaFork(self.index, origin, self._sides[whose])

    def window(self, size: int) -> IpcWindow:
        """See `runtime.SharingDevice`."""
        return IpcWindow.make(self._ipc, size)

    def peer(self, handle: Handle) -> IpcWindow:
        """See `runtime.SharingDevice`."""
        return IpcWindow.open(self._ipc, handle)

    def build(self, source: Source) -> CudaProgram:
        """See `runtime.Device`."""
        cubin = compile_text(source.text("cuda"), Path(source.path), self.facts.name)
        return CudaProgram(source, Module(cubin, self.index))

    def launch(
        self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]
    ) -> CudaEvent:
        """See `runtime.Queue`."""
        assert isinstance(program, CudaProgram)
        event = CudaEvent(self._mark() if self.timed else None, None, raw_stream(self.index), self.index)
        program.module.launch(kernel, (groups, 1, 1), (threads, 1, 1), arguments)
        if self.timed:
            event.ended = self._mark()
        self._launches[kernel] += 1
        return event

    def _mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        checked("cuEventRecord", event.record, torch.cuda.current_stream(self.index))
        return event

    def launches(self) -> Mapping[str, int]:
        """See `runtime.Device`."""
        return {f"cuda:{kernel}@{self.facts.name}": count for kernel, count in self._launches.items()}
