"""The driver for MUSA: its driver API by ctypes, kernels compiled by mcc, torch_musa's tensors by address.

The names of the API are those of CUDA's with ``mu`` for ``cu``. Written from public sources and executed against a
simulated library only; see the README.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from hal.portable import cache, compiling, sim
from hal.portable.ipc import IpcWindow
from hal.portable.runtime import (
    Argument,
    Facts,
    Handle,
    InPlace,
    Mailboxes,
    Program,
    Source,
    StreamEvent,
    out_of_memory,
    packed,
)
from hal.spec.errors import BackendUnavailable, DeviceError, HalError, first_line

LIBRARY_ENV: Final = "HAL_MUSA_LIBRARY"
"""The driver's library; ``libmusa.so`` if unset."""
HOME_ENV: Final = "MUSA_HOME"
"""Folder of the MUSA toolkit; ``/usr/local/musa`` if unset."""

_SHARED_PER_BLOCK, _WARP_SIZE, _PROCESSORS, _MAJOR, _MINOR = 8, 10, 16, 75, 76
"""Numbers of device attributes."""
_MOST_LANES: Final = 32
"""What the mask of a shuffle can name. Wider subgroups do without, as ``dialects/musa.h`` says."""
_LAZY_PEER_ACCESS: Final = 1
"""How memory of another process is opened: of another device only where the two reach each other."""
_FIX: Final = f"{HOME_ENV} names the toolkit whose mcc is used, before PATH"
_FLAGS: Final = ("-std=c++17", "-O2", "-x", "musa", "--cuda-device-only")
_GROUPS: Final = 3


class Library:
    """The driver API. Every call is checked.

    Raises
    ------
    BackendUnavailable
        The library does not load.
    """

    def __init__(self) -> None:
        name = os.environ.get(LIBRARY_ENV) or "libmusa.so"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise BackendUnavailable(f"no MUSA driver: {error}") from error
        self("muInit", 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises
        ------
        DeviceError
            Names the call and the driver's own error.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise DeviceError(f"{name}: {self._library._name} has no such function")
        code = function(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.muGetErrorName(code, ctypes.byref(text))
            raise DeviceError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    @property
    def simulated(self) -> bool:
        """Whether it is no driver but `hal.portable.sim`, by whatever way it was found."""
        return hasattr(self._library, sim.MARK)

    def number(self, name: str, *arguments: Any) -> int:
        """What a function writes to the integer it is given first."""
        found = ctypes.c_int()
        self(name, ctypes.byref(found), *arguments)
        return found.value

    def handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function writes to the handle it is given first."""
        found = ctypes.c_void_p()
        self(name, ctypes.byref(found), *arguments)
        return found


def compiler() -> str:
    """Where mcc is.

    Raises
    ------
    BackendUnavailable
        Nowhere.
    """
    home = Path(os.environ.get(HOME_ENV) or "/usr/local/musa")
    found = shutil.which("mcc", path=f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise BackendUnavailable(f"no mcc on PATH nor in {home / 'bin'}: install the MUSA toolkit, or set {HOME_ENV}")
    return found


def _compiler_version() -> str:
    return compiling.version(compiler(), _FIX)


def missing() -> str:
    """Why this runtime cannot be used, in words; empty if it can."""
    try:
        Library().number("muDeviceGet", 0)
        _compiler_version()
    except HalError as error:
        return first_line(error)
    try:
        import torch_musa  # noqa: F401  (registers torch's device type)
    except Exception as error:  # it may fail at its import in any way
        return f"torch_musa does not import: {first_line(error)}"
    return ""


@dataclass(slots=True, eq=False)
class MusaProgram:
    """See `runtime.Program`."""

    source: Source
    module: ctypes.c_void_p
    functions: dict[str, ctypes.c_void_p] = field(default_factory=dict)


class MusaEvent(StreamEvent):
    """See `runtime.StreamEvent`."""

    def __init__(self, library: Library, stream: ctypes.c_void_p, timed: bool) -> None:
        self._library, self._stream = library, stream
        super().__init__(timed, "muEventElapsedTime")

    @property
    def stream(self) -> object:
        """See `runtime.Event`."""
        return self._stream.value

    def wait(self) -> None:
        """See `runtime.StreamEvent`."""
        self._library("muStreamSynchronize", self._stream)

    def _made(self) -> ctypes.c_void_p:
        return self._library.handle("muEventCreate", 0)

    def _record(self, mark: ctypes.c_void_p) -> None:
        self._library("muEventRecord", mark, self._stream)

    def _milliseconds(self, begun: ctypes.c_void_p, ended: ctypes.c_void_p) -> float:
        found = ctypes.c_float()
        self._library("muEventElapsedTime", ctypes.byref(found), begun, ended)
        return found.value

    def _destroy(self, mark: ctypes.c_void_p) -> None:
        self._library("muEventDestroy_v2", mark)


class _IpcHandle(ctypes.Structure):
    """What the driver makes of memory for other processes; given to it by value."""

    _fields_: ClassVar = [("reserved", ctypes.c_ubyte * 64)]


class MusaIpc:
    """The driver's calls; see `hal.portable.ipc`.

    Parameters
    ----------
    device : MusaDevice
    """

    handle_bytes = ctypes.sizeof(_IpcHandle)

    def __init__(self, device: MusaDevice) -> None:
        self._device = device

    def make(self, size: int) -> int:
        """See `Ipc`."""
        library, address = self._device.library, ctypes.c_void_p()
        try:
            library("muMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        except DeviceError as error:
            raise self._device.lacking("a window", size, error) from error
        library("muMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        library("muStreamSynchronize", ctypes.c_void_p())
        return address.value or 0

    def free(self, address: int) -> None:
        """See `Ipc`."""
        self._device.library("muMemFree_v2", ctypes.c_void_p(address))

    def export(self, address: int) -> bytes:
        """See `Ipc`."""
        made = _IpcHandle()
        self._device.library("muIpcGetMemHandle", ctypes.byref(made), ctypes.c_void_p(address))
        return bytes(made.reserved)

    def open(self, handle: bytes) -> int:
        """See `Ipc`."""
        address, given = ctypes.c_void_p(), _IpcHandle.from_buffer_copy(handle)
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        self._device.library("muIpcOpenMemHandle_v2", ctypes.byref(address), given, flags)
        return address.value or 0

    def shut(self, address: int) -> None:
        """See `Ipc`."""
        self._device.library("muIpcCloseMemHandle", ctypes.c_void_p(address))


class MusaDevice(Mailboxes, InPlace):
    """See `runtime.Device`; its queue is torch_musa's current stream, so that nothing here waits.

    Parameters
    ----------
    index : int
    memory : str
        Where torch makes tensors that the device can address.
    timed : bool
        Whether launches can be asked how long they took, which costs two more calls each.
    """

    transport: Final = "ipc"

    def __init__(self, index: int, memory: str = "musa", timed: bool = False) -> None:
        self.index = index
        self._timed = timed
        self._memory = f"musa:{index}" if memory == "musa" else memory
        self.pinned = memory != "cpu"
        self._launches: Counter[str] = Counter()

    @cached_property
    def _entered(self) -> tuple[Library, ctypes.c_void_p, threading.local]:
        library = Library()
        context = library.handle("muDevicePrimaryCtxRetain", self._number(library))
        return library, context, threading.local()

    @property
    def library(self) -> Library:
        """The driver, with torch_musa's context current: every thread has its own."""
        library, context, seen = self._entered
        if not hasattr(seen, "context"):
            library("muCtxSetCurrent", context)
            seen.context = context
        return library

    def _number(self, library: Library) -> int:
        return library.number("muDeviceGet", self.index)

    @cached_property
    def facts(self) -> Facts:
        """What the driver says of the device."""
        library = self.library
        device = self._number(library)

        def attribute(which: int) -> int:
            return library.number("muDeviceGetAttribute", which, device)

        return Facts(
            name=f"mp_{attribute(_MAJOR)}{attribute(_MINOR)}",
            driver=f"MUSA {library.number('muDriverGetVersion')}",
            dialect="musa",
            processors=attribute(_PROCESSORS),
            groups=_GROUPS,
            local_bytes=attribute(_SHARED_PER_BLOCK),
            subgroup=width if (width := attribute(_WARP_SIZE)) <= _MOST_LANES else 1,
        )

    def empty(self, size: int) -> Tensor:
        """See `runtime.Allocator`; torch's memory, freed in the order of its stream."""
        try:
            return torch.empty(max(size, 16), dtype=torch.uint8, device=self._memory)
        except RuntimeError as error:
            raise self.lacking("torch.empty", size, first_line(error)) from error

    def lacking(self, call: str, size: int, error: object) -> DeviceError:
        """What to raise where the device does not give so many bytes."""
        free, whole, has = ctypes.c_size_t(), ctypes.c_size_t(), ""
        with contextlib.suppress(DeviceError):
            self.library("muMemGetInfo_v2", ctypes.byref(free), ctypes.byref(whole))
            has = f"{self.facts.name} has {whole.value} bytes, {free.value} of them free"
        return out_of_memory(call, size, has, error, "torch.musa.empty_cache() frees what torch keeps")

    @cached_property
    def _ipc(self) -> MusaIpc:
        return MusaIpc(self)

    def window(self, size: int) -> IpcWindow:
        """See `runtime.SharingDevice`."""
        return IpcWindow.make(self._ipc, size)

    def peer(self, handle: Handle) -> IpcWindow:
        """See `runtime.SharingDevice`; the driver knows the size."""
        opened = IpcWindow.open(self._ipc, handle)
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        address = ctypes.c_void_p(opened)
        self.library("muMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        if size.value < handle.size:
            opened.close()
            raise DeviceError(f"a window of {handle.size} bytes: there are {size.value}")
        return opened

    def build(self, source: Source) -> MusaProgram:
        """See `runtime.Device`."""
        facts = self.facts
        text, library = source.text("musa"), self.library
        name = f"{cache.key(text, facts.name, _compiler_version(), *_FLAGS)}.bin"
        module = cache.loaded(
            cache.private_folder("musa"),
            name,
            lambda: _compile(text, facts.name, source),
            lambda code: library.handle("muModuleLoadData", code),
            DeviceError,
        )
        return MusaProgram(source, module)

    def launch(
        self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]
    ) -> MusaEvent:
        """See `runtime.Queue`."""
        assert isinstance(program, MusaProgram)
        library, stream = self.library, self._stream()
        if kernel not in program.functions:
            program.functions[kernel] = library.handle("muModuleGetFunction", program.module, kernel.encode())
        given, _held = packed(arguments)
        event = MusaEvent(library, stream, self._timed)
        shape = (groups, 1, 1, threads, 1, 1)
        library("muLaunchKernel", program.functions[kernel], *shape, 0, stream, given, None)
        event.mark()
        self._launches[kernel] += 1
        return event

    def _stream(self) -> ctypes.c_void_p:
        if not self._memory.startswith("musa"):
            return ctypes.c_void_p()
        return ctypes.c_void_p(torch.musa.current_stream(self.index).musa_stream)  # type: ignore[attr-defined]

    def launches(self) -> Mapping[str, int]:
        """See `runtime.Device`."""
        return {f"musa:{kernel}@{self.facts.name}": count for kernel, count in self._launches.items()}


def _compile(text: str, arch: str, source: Source) -> bytes:
    line = [compiler(), *_FLAGS, f"--offload-arch={arch}"]
    return compiling.compiled(line, text, ".mu", f"mcc for {arch}: the kernels do not build", source.path, _FIX)
