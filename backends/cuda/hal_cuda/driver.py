"""Compile, load and launch CUDA C++ through cupy: torch tensors by address, on torch's current stream.

`CudaDevice` is what the portable kernels (`hal.portable`) see of it.
Every call of the driver or the compiler goes through `checked`, which turns its error into one of the HAL's.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from hal.portable import cache, compiling
from hal.portable.ipc import IpcWindow
from hal.portable.runtime import Argument, Facts, Handle, InPlace, Program, Source, Words, out_of_memory
from hal.spec.errors import DeviceError
from hal_cuda.devices import architecture

CACHE_ENV: Final = "HAL_CUDA_CACHE"
"""Folder of what was compiled; `hal.portable.cache` says where it is by default and who may write there."""

_STATIC_SHARED: Final = 48 << 10
_LAZY_PEER_ACCESS: Final = 1
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2
"""``CU_LAUNCH_PARAM_…``"""
_FORMS: Final = {"i": "i", "l": "q", "q": "q", "f": "f", "d": "d"}
"""Of struct, for the types of numpy."""
_RAW_STREAM: Final = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_DEVICE: Final = getattr(torch._C, "_cuda_getDevice", None)
"""What torch's own compilers ask: calls shorter by microseconds than those that make an object of a stream."""

_seen: Final = threading.local()

T = TypeVar("T")


def groups(arch: str) -> int:
    """Of the portable kernels on a processor: one more would wait until another is through with its share.

    As many as it has registers for, or shared memory on Volta and Turing.
    """
    return 1 if arch.startswith("sm_7") else 3


def missing() -> str:
    """Why there is no driver, in words; empty if there is one."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed"
    try:
        import cupy  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        return f"cupy does not import: {str(error).splitlines()[0]}"
    return ""


def checked(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call the driver.

    Raises
    ------
    DeviceError
        It refused; names the call and the driver's own error.
    """
    try:
        return function(*arguments)
    except (RuntimeError, OSError) as error:
        # cupy's driver, runtime and compiler errors are all RuntimeErrors.
        raise DeviceError(f"{name}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def current(device: int) -> Iterator[None]:
    """Make a device this thread's, and its context too.

    The runtime's calls bring a context to a thread by themselves, and torch counts on that. The driver's launches do
    not: in a thread that has only taken memory from torch's cache they fail with ``CUDA_ERROR_INVALID_CONTEXT``.
    """
    from cupy.cuda import runtime

    with torch.cuda.device(device):
        checked("cudaSetDevice", runtime.setDevice, device)
        _seen.device = device
        yield


def raw_stream(device: int) -> int:
    """Address of torch's current stream of a device."""
    if _RAW_STREAM is None:
        return torch.cuda.current_stream(device).cuda_stream
    return int(_RAW_STREAM(device))


def is_current(device: int) -> bool:
    """Whether this thread has been at `current` before, and has not gone to another device since."""
    return _DEVICE is not None and getattr(_seen, "device", None) == device == _DEVICE()


def compile_source(
    source: Path, arch: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> bytes:
    """Compile one file with NVRTC, or find it compiled already. Needs no device.

    Parameters
    ----------
    source : Path
    arch : str
        For instance ``sm_90a``.
    options : sequence of str
        Of the compiler.
    headers : mapping of str to str, optional
        Texts of included files, by the name they are included as.

    Returns
    -------
    bytes
        A cubin.

    Raises
    ------
    CompileError
        Carries the compiler's log and the path of the source.
    """
    return compile_text(source.read_text(), source, arch, options, headers)


def compile_text(
    text: str, source: Path, arch: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> bytes:
    """As `compile_source`, of a text that was put together; ``source`` is what errors name."""
    flags, headers = (f"-arch={arch}", "-std=c++17", *options), dict(headers or {})
    parts = (version(), *flags, source.name, text, *(part for item in sorted(headers.items()) for part in item))
    folder = cache.private_folder("cuda", arch, variable=CACHE_ENV)
    return cache.kept(folder, f"{cache.key(*parts)}.bin", lambda: _compile(text, source, flags, headers))


def version() -> str:
    """Of the compiler."""
    from cupy.cuda import nvrtc

    return "NVRTC " + ".".join(map(str, checked("nvrtcVersion", nvrtc.getVersion)))


def _compile(text: str, source: Path, flags: tuple[str, ...], headers: dict[str, str]) -> bytes:
    from cupy.cuda import nvrtc

    names, texts = (tuple(part.encode() for part in parts) for parts in (headers, headers.values()))
    program = checked("nvrtcCreateProgram", nvrtc.createProgram, text, source.name, texts, names)
    try:
        nvrtc.compileProgram(program, flags)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        message, fix = f"NVRTC: {error} for {' '.join(flags)}", "the compiler is the NVRTC that cupy loads"
        raise compiling.refusal(message, log, text, str(source), fix) from error
    cubin: bytes = checked("nvrtcGetCUBIN", nvrtc.getCUBIN, program)
    checked("nvrtcDestroyProgram", nvrtc.destroyProgram, program)
    # cupy leaves out the last byte, as it does with the zero that ends a text; here it is the last of a program header.
    return cubin + b"\0"


@dataclass(slots=True)
class Module:
    """Loaded code on one device.

    Parameters
    ----------
    cubin : bytes
    device : int
    """

    cubin: bytes
    device: int
    _module: Any = field(default=None, init=False)
    _functions: dict[str, Any] = field(default_factory=dict, init=False)
    _calls: dict[str, Call] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False)

    def launch(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Queue a kernel on torch's current stream of the device; tensors and windows are passed by address.

        ``arguments`` other than those must be of the kernel's own types: `Words`, numpy scalars, or ints for 64-bit
        integers. They are of the same types at every launch of a kernel.

        Raises
        ------
        DeviceError
        """
        if is_current(self.device):
            self._queue(kernel, grid, block, arguments)
        else:
            with current(self.device):
                self._queue(kernel, grid, block, arguments)

    def _queue(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        values, stream = plain(arguments), raw_stream(self.device)
        with self._lock:
            call = self._calls.get(kernel)
            if call is None:
                call = self._calls[kernel] = Call(self.function(kernel).ptr, arguments)
            call.form.pack_into(call.values, 0, *values)
            try:
                call.launch(call.function, *grid, *block, 0, stream, 0, call.extra)
            except RuntimeError as error:
                raise DeviceError(f"cuLaunchKernel({kernel}): {type(error).__name__}: {error}") from error

    def function(self, kernel: str) -> Any:
        """One of its kernels, loaded once; the device must be `current`.

        Raises
        ------
        DeviceError
        """
        from cupy.cuda import function as cupy_function

        if self._module is None:
            module = cupy_function.Module()
            checked("cuModuleLoadData", module.load, self.cubin)
            self._module = module
        if kernel not in self._functions:
            self._functions[kernel] = checked(f"cuModuleGetFunction({kernel})", self._module.get_function, kernel)
        return self._functions[kernel]


def plain(arguments: Sequence[Any]) -> list[Any]:
    """Numbers that a launch's arguments come to."""
    values: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            values.append(argument)
        elif kind is Words:
            values += argument
        elif kind is Tensor:
            values.append(argument.data_ptr())
        else:
            values.append(_plain(argument))
    return values


def _plain(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return int(argument) if isinstance(argument, IpcWindow) else argument.item()


def form_of(arguments: Sequence[Any]) -> str:
    """How they lie one after the other, as struct has it."""
    form = "@"
    for argument in arguments:
        if isinstance(argument, Words):
            form += "i" * len(argument)
        else:
            form += "q" if isinstance(argument, (Tensor, int)) else _FORMS[argument.dtype.char]
    return form


class Call:
    """Arguments of a kernel in one piece of memory, as the driver takes them: laid out like the members of a C struct.

    Parameters
    ----------
    function : int
        The driver's.
    arguments : sequence
        Of any launch, for their types.

    Attributes
    ----------
    form : Struct
    values : ctypes array
        Where it is to be packed; the driver reads it during the call.
    extra : int
        Address of what ``cuLaunchKernel`` is given.
    launch : callable
        That.
    """

    __slots__ = ("_extra", "_size", "extra", "form", "function", "launch", "values")

    def __init__(self, function: int, arguments: Sequence[Any]) -> None:
        from cupy.cuda import driver

        self.launch, self.function, self.form = driver.launchKernel, function, struct.Struct(form_of(arguments))
        self.values = (ctypes.c_char * max(self.form.size, 1))()
        self._size = ctypes.c_size_t(self.form.size)
        given = (_BUFFER_POINTER, ctypes.addressof(self.values), _BUFFER_SIZE, ctypes.addressof(self._size), 0)
        self._extra = (ctypes.c_void_p * 5)(*given)
        self.extra = ctypes.addressof(self._extra)


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


def lacking(device: int, call: str, size: int, error: object) -> DeviceError:
    """What to raise where a device does not give so many bytes."""
    has = ""
    with contextlib.suppress(RuntimeError, AssertionError):
        free, whole = torch.cuda.mem_get_info(device)
        has = f"the device has {whole} bytes, {free} of them free"
    return out_of_memory(call, size, has, error, "torch.cuda.empty_cache() frees what torch keeps")


class CudaIpc:
    """The runtime's calls, on one device.

    Not torch's memory: a handle is of a whole allocation, of which torch's cache gives pieces to many.

    Parameters
    ----------
    device : int
    """

    handle_bytes = 64

    def __init__(self, device: int) -> None:
        self._device = device

    def _call(self, name: str, *arguments: Any) -> Any:
        from cupy.cuda import runtime

        # Not torch's device alone: where the two brought a runtime each, this one has a current device of its own.
        with current(self._device):
            return checked(f"cuda{name[0].upper()}{name[1:]}", getattr(runtime, name), *arguments)

    def make(self, size: int) -> int:
        """See `Ipc`."""
        try:
            address = int(self._call("malloc", size))
        except DeviceError as error:
            raise lacking(self._device, "cudaMalloc", size, error) from error
        self._call("memset", address, 0, size)
        self._call("deviceSynchronize")
        return address

    def free(self, address: int) -> None:
        """See `Ipc`."""
        self._call("free", address)

    def export(self, address: int) -> bytes:
        """See `Ipc`."""
        return bytes(self._call("ipcGetMemHandle", address))

    def open(self, handle: bytes) -> int:
        """See `Ipc`."""
        return int(self._call("ipcOpenMemHandle", handle, _LAZY_PEER_ACCESS))

    def shut(self, address: int) -> None:
        """See `Ipc`."""
        self._call("ipcCloseMemHandle", address)


class CudaDevice(InPlace):
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
            raise lacking(self.index, "torch.empty", size, str(error).splitlines()[0]) from error

    @cached_property
    def _ipc(self) -> CudaIpc:
        return CudaIpc(self.index)

    def mailbox(self, words: int) -> Tensor:
        """See `runtime.MeetingDevice`: memory of the host that the device addresses too."""
        return torch.zeros(words, dtype=torch.int32, pin_memory=True)

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
