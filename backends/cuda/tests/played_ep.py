"""A card for every rank of a node, played by the host: memory for other processes in files, kernels on fibres.

What runs is `hal_cuda.driver` with cupy's runtime and torch's streams replaced; no machine code of a chip does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import types
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import portable_backends
import torch
from hal_cuda import driver, launching

from hal import plugins
from hal.backend import Backend
from hal.plugins import hookimpl
from hal.portable.host import HostDevice
from hal.portable.runtime import Source

_HANDLE = struct.Struct("<iiq48x")
_OF = {"q": np.int64, "i": np.int32, "f": np.float32}


class Runtime:
    """The functions of ``cupy.cuda.runtime`` that are called, with the rules of the real ones."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[int, int]] = {}
        self._opened: set[int] = set()
        self._kept: list[Any] = []

    def _mapped(self, file: int, size: int) -> int:
        memory = mmap.mmap(file, size)
        self._kept.append(memory)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def malloc(self, size: int) -> int:
        file = os.memfd_create("played")
        try:
            os.ftruncate(file, size)
            address = self._mapped(file, size)
        except (OSError, OverflowError):
            os.close(file)
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory") from None
        self._made[address] = file, size
        return address

    def memset(self, address: int, value: int, size: int) -> None:
        assert self._made[address][1] >= size
        ctypes.memset(address, value, size)

    def setDevice(self, device: int) -> None:  # noqa: N802
        assert device == 0

    def streamSynchronize(self, stream: int) -> None:  # noqa: N802
        assert stream == 0

    def deviceSynchronize(self) -> None:  # noqa: N802  (the runtime's name)
        pass

    def free(self, address: int) -> None:
        os.close(self._made.pop(address)[0])

    def ipcGetMemHandle(self, address: int) -> bytes:  # noqa: N802
        if address not in self._made:
            raise RuntimeError("cudaErrorInvalidValue: invalid argument")
        return _HANDLE.pack(os.getpid(), *self._made[address])

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:  # noqa: N802
        process, file, size = _HANDLE.unpack(handle)
        if process == os.getpid() or flags != 1:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device context")
        with open(f"/proc/{process}/fd/{file}", "r+b") as there:
            address = self._mapped(there.fileno(), size)
        self._opened.add(address)
        return address

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self._opened.remove(address)


class Event:
    """On which stream it was recorded, and behind how much of what that had waited for."""

    def __init__(self) -> None:
        self.at: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.at = stream, len(stream.waited)


class Stream:
    """What kernels are launched on is done at once: of streams only which is current counts, and who waits for whom."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited: list[Any] = []

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        assert event.at is not None, "an event that was not recorded is waited for by nobody"
        self.waited.append(event.at[0])

    def wait_stream(self, stream: Stream) -> None:
        self.waited.append(stream)


class _Module:
    """`launching.Module` for kernels compiled for the host; windows come as plain addresses, as cupy wants them."""

    def __init__(self, host: HostDevice, source: Source) -> None:
        self._host, self._program = host, host.build(source)

    def launch(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        values = launching.plain(arguments)
        form = struct.Struct(launching.form_of(arguments))
        given = [_OF[letter](value) for letter, value in zip(form.format[1:], values, strict=True)]
        self._host.launch(self._program, kernel, grid[0], block[0], given)


def put_in(patch: Any) -> Runtime:
    """Play a card in this process; ``patch`` sets an attribute of an object or module."""
    import cupy

    host, runtime = HostDevice(subgroup=32), Runtime()
    patch(cupy.cuda, "runtime", runtime)
    patch(torch.cuda, "device", lambda index: contextlib.nullcontext())
    current = [Stream()]

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    patch(torch.cuda, "Stream", Stream)
    patch(torch.cuda, "Event", Event)
    patch(torch.cuda, "stream", within)
    patch(torch.cuda, "current_stream", lambda index=None: current[-1])
    patch(torch.cuda, "get_device_capability", lambda index: (9, 0))
    properties = types.SimpleNamespace(multi_processor_count=2)
    patch(torch.cuda, "get_device_properties", lambda index: properties)
    patch(driver.CudaDevice, "build", lambda device, source: driver.CudaProgram(source, _Module(host, source)))
    patch(driver.CudaDevice, "empty", lambda device, size: host.empty(size))
    patch(driver.CudaDevice, "capturing", lambda device: False)
    patch(driver.CudaDevice, "pinned", False)
    return runtime


class _OnPlayedCard:
    """The plugin of a backend whose driver is CUDA's and whose tensors are the host's."""

    @hookimpl
    def hal_backend(self) -> Backend:
        return portable_backends.OnFibres(driver.CudaDevice(0))


on_played_card = _OnPlayedCard()


def opened(rank: int) -> None:
    """What a rank does before it enters the group."""
    put_in(setattr)
    plugins._registry = plugins.Registry([EntryPoint("played", "played_ep:on_played_card", plugins.GROUP)])
