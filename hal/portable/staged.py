"""Devices whose torch is not there: tensors of the host, copied to the device for a call and their results back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hal.portable.bindings import BoundDevice, BoundEvent, Runtime
from hal.portable.runtime import Argument, Program
from hal.spec.errors import DeviceError

_ANYWHERE, _NON_BLOCKING = 4, 1


class Buffer(int):
    """Memory of the device, as its address; freed when it is forgotten."""

    _runtime: Runtime
    _memory: Any

    @classmethod
    def of(cls, runtime: Runtime, size: int) -> Buffer:
        """So many bytes.

        Raises
        ------
        DeviceError
            There is not so much.
        """
        try:
            memory = runtime("Malloc", size)
        except DeviceError as error:
            raise runtime.lacking("memory", size, error) from error
        made = cls(int(memory))
        made._runtime, made._memory = runtime, memory
        return made

    def __del__(self) -> None:
        # What went wrong before is said by whoever waits for it.
        with contextlib.suppress(DeviceError):
            self._runtime("Free", self._memory)


class StagedDevice(BoundDevice):
    """See `runtime.Device`, with a stream of its own."""

    pinned = False  # brought back like other results

    @cached_property
    def _stream(self) -> Any:
        self.runtime("SetDevice", self.index)
        return self.runtime("StreamCreateWithFlags", _NON_BLOCKING)

    def stream(self) -> Any:
        """The device's own."""
        return self._stream

    def empty(self, size: int) -> Buffer:
        """See `runtime.Allocator`."""
        self.runtime("SetDevice", self.index)
        return Buffer.of(self.runtime, max(size, 16))

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy; neither side may go away before the stream was waited for."""
        kind = self.runtime.structure("MemcpyKind")(_ANYWHERE)
        self.runtime("MemcpyAsync", to, source, size, kind, self.stream())

    def queue(self) -> StagedQueue:
        """A queue that knows what to bring back."""
        return StagedQueue(self)


class StagedQueue:
    """See `runtime.Queue`."""

    def __init__(self, device: StagedDevice) -> None:
        self._device = device
        self._held: list[Any] = []
        self._results: list[tuple[Tensor, Tensor, Buffer]] = []

    def read(self, tensor: Tensor) -> Buffer:
        """A copy of all bytes from the first element of the tensor to its last."""
        size = span(tensor)
        buffer = self._device.empty(size)
        self._held += [tensor, buffer]
        if size:
            self._device.copy(int(buffer), tensor.data_ptr(), size)
        return buffer

    def write(self, tensor: Tensor, partly: bool = False) -> tuple[Buffer, tuple[int, ...]]:
        """Room for the elements alone: what lies between them is others'."""
        packed = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        buffer = self._device.empty(span(packed))
        if partly and packed.numel():
            packed.copy_(tensor)
            self._device.copy(int(buffer), packed.data_ptr(), span(packed))
        self._results.append((tensor, packed, buffer))
        return buffer, packed.stride()

    def launch(
        self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]
    ) -> BoundEvent:
        """See `runtime.Queue`."""
        self._held += arguments
        return self._device.launch(program, kernel, groups, threads, arguments)

    def finish(self) -> None:
        """Wait, and bring results back."""
        for _, packed, buffer in self._results:
            if packed.numel():
                self._device.copy(packed.data_ptr(), int(buffer), span(packed))
        self._device.runtime("StreamSynchronize", self._device.stream())
        for tensor, packed, _ in self._results:
            tensor.copy_(packed)
        self._held.clear()
        self._results.clear()

    def __del__(self) -> None:
        # Where a call was left half way, kernels may still read and write what is held. Freeing a buffer waits for them
        # and leaves it to others' waits to say what went wrong; so buffers go first, and memory of the host last.
        held = [held for held in self._held if isinstance(held, Tensor)]
        packed = [packed for _, packed, _ in self._results]
        self._held.clear()
        self._results.clear()
        del held, packed


def span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
