"""The driver for OpenCL 1.2 devices, on pyopencl; tensors live on the host.

Where device and host share memory, kernels read and write tensors in place. Elsewhere every call moves what it needs,
except for tensors that were adopted: they have a copy on the device.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from hal.portable import cache, compiling
from hal.portable.runtime import Argument, Facts, Handle, Program, Source
from hal.portable.shared import SharedMemory
from hal.spec.errors import BackendUnavailable, DeviceError, SpecError

PLATFORM_ENV: Final = "HAL_OPENCL_PLATFORM"
"""Part of the name or vendor of the platform to use."""
DEVICE_ENV: Final = "HAL_OPENCL_DEVICE"
"""Number of the device within its platform; 0 if unset."""

_FOLDER: Final = "opencl"
_INSTALL: Final = "pip install pyopencl"
_MOST_LOCAL: Final = 128 << 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Platform:
    """One platform of this machine.

    Attributes
    ----------
    name, vendor, version : str
    handle : object
        pyopencl's.
    """

    name: str
    vendor: str
    version: str
    handle: Any = field(repr=False)

    def matches(self, *texts: str) -> bool:
        """Whether its name or vendor holds one of these texts, in whatever case."""
        return any(text.lower() in f"{self.name}\n{self.vendor}".lower() for text in texts)

    def __str__(self) -> str:
        return f"{self.name} ({self.vendor})"


def platforms() -> list[Platform]:
    """Every platform there is.

    Raises
    ------
    BackendUnavailable
        pyopencl does not import, or finds no platform.
    """
    try:
        import pyopencl
    except ImportError as error:
        raise BackendUnavailable(f"pyopencl does not import: {error}; {_INSTALL}") from error
    try:
        found = pyopencl.get_platforms()
    except pyopencl.Error:
        found = []
    if not found:
        raise BackendUnavailable("no OpenCL platform: install the vendor's OpenCL driver (its .icd file is missing)")
    return [Platform(p.name.strip(), p.vendor.strip(), p.version.strip(), p) for p in found]


def choose(*vendors: str) -> Platform:
    """The one platform of these vendors that ``HAL_OPENCL_PLATFORM`` allows; never just the first.

    Parameters
    ----------
    *vendors : str
        Texts of which its name or vendor must hold one; any vendor without.

    Raises
    ------
    BackendUnavailable
        There is none, or more than one; lists all there are.
    """
    there = platforms()
    wanted = os.environ.get(PLATFORM_ENV)
    allowed = [p for p in there if (not vendors or p.matches(*vendors)) and (not wanted or p.matches(wanted))]
    if len(allowed) == 1:
        return allowed[0]
    what = " and ".join(
        [*([f"of {' or '.join(vendors)}"] if vendors else []), *([f"with {PLATFORM_ENV}={wanted}"] if wanted else [])]
    )
    problem = f"no OpenCL platform {what}" if not allowed else f"{len(allowed)} OpenCL platforms {what}".rstrip()
    hint = "" if not allowed else f"; set {PLATFORM_ENV} to part of one's name"
    raise BackendUnavailable(f"{problem}; there are: {', '.join(map(str, there))}{hint}")


def checked(name: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call the driver.

    Raises
    ------
    DeviceError
        It refused; names the call and the driver's own error.
    """
    import pyopencl

    try:
        return function(*arguments, **options)
    except pyopencl.MemoryError as error:
        raise DeviceError(f"{name}: out of device memory: {error}; use smaller batches or caches") from error
    except pyopencl.Error as error:
        raise DeviceError(f"{name}: {error}") from error


@dataclass(slots=True, eq=False)
class OpenClEvent:
    """See `runtime.Event`."""

    handle: Any

    def wait(self) -> None:
        """Return when it is done."""
        checked("clWaitForEvents", self.handle.wait)

    def seconds(self) -> float:
        """By the device's clock."""
        self.wait()
        profile = self.handle.profile
        started: int = checked("clGetEventProfilingInfo", lambda: profile.start)
        ended: int = checked("clGetEventProfilingInfo", lambda: profile.end)
        return (ended - started) * 1e-9


@dataclass(slots=True, eq=False)
class OpenClProgram:
    """See `runtime.Program`."""

    source: Source
    handle: Any
    kernels: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Adopted:
    """A tensor of the host with a copy on the device, for as long as it is not released.

    Changes that torch makes are noticed and cost a new copy of the whole at the next call; `update` copies a part.
    """

    tensor: Tensor
    buffer: Any
    device: OpenClDevice
    version: int

    def update(self, first: int, last: int) -> None:
        """Copy ``tensor[first:last]`` and take the device's copy for the newest: no other element has changed."""
        start, size = _bytes(self.tensor[first:last])
        if size:
            self._copy(start, size)
        self.version = self.tensor._version

    def release(self) -> None:
        """Forget the copy; the tensor is moved with every call again."""
        self.device.adopted.pop(self.tensor.data_ptr(), None)

    def fresh(self) -> Any:
        """The buffer, once it holds what the tensor holds."""
        if self.version != self.tensor._version:
            self._copy(*_bytes(self.tensor))
            self.version = self.tensor._version
        return self.buffer

    def _copy(self, start: int, size: int) -> None:
        import pyopencl

        offset = start - self.tensor.data_ptr()
        copy = pyopencl.enqueue_copy
        checked("clEnqueueWriteBuffer", copy, self.device.commands, self.buffer, _host(start, size), dst_offset=offset)


class OpenClDevice:
    """See `runtime.Device`. Nothing is opened before it is needed.

    Parameters
    ----------
    platform : Platform
        From `choose`.
    unified : bool, optional
        Whether device and host share memory; by default what the device says.
    """

    transport: Final = "shm"

    def __init__(self, platform: Platform, unified: bool | None = None) -> None:
        self.platform = platform
        self.adopted: dict[int, Adopted] = {}
        self._unified = unified
        self._launches: Counter[str] = Counter()
        self._lock = threading.Lock()

    @cached_property
    def handle(self) -> Any:
        """The device, as pyopencl knows it.

        Raises
        ------
        BackendUnavailable
            The platform has no such device.
        """
        import pyopencl

        number = os.environ.get(DEVICE_ENV) or "0"
        try:
            found = self.platform.handle.get_devices()
        except pyopencl.Error:
            found = []
        if number not in map(str, range(len(found))):
            names = ", ".join(f"{i}: {device.name}" for i, device in enumerate(found)) or "none"
            raise BackendUnavailable(f"{DEVICE_ENV}={number}: {self.platform} has these devices: {names}")
        return found[int(number)]

    @cached_property
    def context(self) -> Any:
        """The context, as pyopencl knows it."""
        import pyopencl

        return checked("clCreateContext", pyopencl.Context, [self.handle])

    @cached_property
    def commands(self) -> Any:
        """The queue, as pyopencl knows it; it keeps order, and times."""
        import pyopencl

        properties = pyopencl.command_queue_properties.PROFILING_ENABLE
        return checked("clCreateCommandQueue", pyopencl.CommandQueue, self.context, properties=properties)

    @cached_property
    def unified(self) -> bool:
        """Whether kernels can read and write memory of the host in place."""
        return bool(self.handle.host_unified_memory) if self._unified is None else self._unified

    @cached_property
    def facts(self) -> Facts:
        """What the driver says of the device."""
        import pyopencl

        is_processor = bool(self.handle.type & pyopencl.device_type.CPU)
        return Facts(
            name=self.handle.name.strip(),
            driver=f"{self.platform.version} {self.handle.driver_version}",
            dialect="opencl",
            processors=self.handle.max_compute_units,
            groups=2 if is_processor else 4,
            local_bytes=min(self.handle.local_mem_size, _MOST_LOCAL),
            subgroup=1,
        )

    @property
    def allocator(self) -> OpenClDevice:
        """The device itself."""
        return self

    def empty(self, size: int) -> Any:
        """See `runtime.Allocator`."""
        import pyopencl

        flags = pyopencl.mem_flags.READ_WRITE
        return checked(f"clCreateBuffer of {size} bytes", pyopencl.Buffer, self.context, flags, max(size, 16))

    def window(self, size: int) -> OpenClWindow:
        """See `runtime.SharingDevice`."""
        return OpenClWindow(self, SharedMemory.make(size))

    def peer(self, handle: Handle) -> OpenClWindow:
        """See `runtime.SharingDevice`."""
        return OpenClWindow(self, SharedMemory.open(handle))

    def adopt(self, tensor: Tensor) -> Adopted | None:
        """Give a tensor a copy on the device that stays there; None where the device reads the host's memory anyway.

        Raises
        ------
        SpecError
            torch does not count what is written to it, so a stale copy would go unnoticed.
        """
        if self.unified:
            return None
        if tensor.is_inference():
            raise SpecError("tensor", "an inference tensor", "one whose changes torch counts")
        start, size = _bytes(tensor)
        adopted = Adopted(tensor, self.empty(size), self, tensor._version - 1)
        adopted.fresh()
        self.adopted[start] = adopted
        return adopted

    @cached_property
    def keeps(self) -> bool:
        """Whether the driver keeps what it compiled on disk by itself; asking it for the code may then be slow."""
        from pyopencl.characterize import has_src_build_cache

        return bool(has_src_build_cache(self.handle))

    def build(self, source: Source) -> OpenClProgram:
        """See `runtime.Device`."""
        import pyopencl

        if self.keeps:
            return OpenClProgram(source, self._compiled(source))
        folder, name = cache.private_folder(_FOLDER), f"{source.key(self.facts)}.bin"
        program = cache.loaded(
            folder,
            name,
            lambda: self._code(source),
            lambda code: checked(
                "clBuildProgram", lambda: pyopencl.Program(self.context, [self.handle], [code]).build()
            ),
            DeviceError,
        )
        return OpenClProgram(source, program)

    def _compiled(self, source: Source) -> Any:
        import pyopencl

        text = source.text("opencl")
        program = pyopencl.Program(self.context, text)
        try:
            return program.build("-cl-std=CL1.2")
        except pyopencl.Error as error:
            message = f"the OpenCL compiler of {self.platform} does not build the kernels"
            fix = f"{PLATFORM_ENV} and {DEVICE_ENV} choose the device, whose driver has the compiler"
            raise compiling.refusal(message, str(error), text, source.path, fix) from error

    def _code(self, source: Source) -> bytes:
        import pyopencl

        (code,) = self._compiled(source).get_info(pyopencl.program_info.BINARIES)
        return bytes(code)

    def queue(self) -> OpenClQueue:
        """See `runtime.Device`."""
        return OpenClQueue(self)

    def launches(self) -> Mapping[str, int]:
        """See `runtime.Device`."""
        return {f"opencl:{kernel}@{self.facts.name}": count for kernel, count in self._launches.items()}

    def launch(self, program: OpenClProgram, kernel: str, groups: int, threads: int, arguments: Sequence[Any]) -> Any:
        """Queue a kernel; its arguments belong to the program, hence one thread at a time."""
        import pyopencl

        with self._lock:
            if kernel not in program.kernels:
                program.kernels[kernel] = checked(f"clCreateKernel({kernel})", pyopencl.Kernel, program.handle, kernel)
            found = program.kernels[kernel]
            checked(f"clSetKernelArg({kernel})", found.set_args, *arguments)
            started = checked(
                f"clEnqueueNDRangeKernel({kernel})",
                pyopencl.enqueue_nd_range_kernel,
                self.commands,
                found,
                (groups * threads,),
                (threads,),
            )
            self._launches[kernel] += 1
        return started


class OpenClWindow:
    """See `runtime.Window`: memory of the host that the device works in, which it must share.

    Raises
    ------
    DeviceError
        The device has memory of its own: nothing would be seen by other processes.
    """

    def __init__(self, device: OpenClDevice, shared: SharedMemory) -> None:
        import pyopencl

        if not device.unified:
            raise DeviceError(f"{device.facts.name} has memory of its own, which OpenCL cannot share with processes")
        flags = pyopencl.mem_flags.READ_WRITE | pyopencl.mem_flags.USE_HOST_PTR
        start, size = _bytes(shared.memory)
        name = f"clCreateBuffer of {size} bytes"
        self.memory: Any = checked(name, pyopencl.Buffer, device.context, flags, hostbuf=_host(start, size))
        self._shared = shared

    @property
    def handle(self) -> Handle:
        """See `runtime.Window`."""
        return self._shared.handle

    def close(self) -> None:
        """See `runtime.Window`."""
        self.memory = None
        self._shared.close()


class OpenClQueue:
    """See `runtime.Queue`: the device's own queue, and what this call gave it to hold."""

    def __init__(self, device: OpenClDevice) -> None:
        self._device = device
        self._held: list[Any] = []
        self._results: list[tuple[Tensor, Tensor, Any]] = []

    def read(self, tensor: Tensor) -> Any:
        """See `runtime.Queue`."""
        import pyopencl

        flags = pyopencl.mem_flags
        self._held.append(tensor)
        start, size = _bytes(tensor)
        if not size:
            return self._device.empty(0)
        if not self._device.unified:
            resident = self._resident(start, size)
            if resident is not None:
                return resident
        how = flags.USE_HOST_PTR if self._device.unified else flags.COPY_HOST_PTR
        return self._buffer(flags.READ_ONLY | how, start, size)

    def write(self, tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
        """See `runtime.Queue`."""
        import pyopencl

        if self._device.unified:
            self._held.append(tensor)
            flags = pyopencl.mem_flags.WRITE_ONLY | pyopencl.mem_flags.USE_HOST_PTR
            return self._buffer(flags, *_bytes(tensor)), tensor.stride()
        # Between the elements of the tensor may lie others', which must not be written: they come back packed.
        packed = torch.empty(tensor.shape, dtype=tensor.dtype)
        buffer = self._device.empty(_bytes(packed)[1])
        self._results.append((tensor, packed, buffer))
        return buffer, packed.stride()

    def launch(self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]) -> Any:
        """See `runtime.Queue`."""
        assert isinstance(program, OpenClProgram)
        self._held.extend(arguments)
        return OpenClEvent(self._device.launch(program, kernel, groups, threads, arguments))

    def finish(self) -> None:
        """Wait, and bring results back."""
        import pyopencl

        for tensor, packed, buffer in self._results:
            checked("clEnqueueReadBuffer", pyopencl.enqueue_copy, self._device.commands, _host(*_bytes(packed)), buffer)
            tensor.copy_(packed)
        checked("clFinish", self._device.commands.finish)
        self._held.clear()

    def _buffer(self, flags: int, start: int, size: int) -> Any:
        import pyopencl

        name = f"clCreateBuffer of {size} bytes"
        return checked(name, pyopencl.Buffer, self._device.context, flags, hostbuf=_host(start, size))

    def _resident(self, start: int, size: int) -> Any | None:
        """The device's copy of these bytes, if they lie within a tensor that was adopted."""
        for first, adopted in self._device.adopted.items():
            length = _bytes(adopted.tensor)[1]
            if first <= start and start + size <= first + length:
                whole = adopted.fresh()
                if (start, size) == (first, length):
                    return whole
                if (start - first) * 8 % self._device.handle.mem_base_addr_align == 0:
                    return checked("clCreateSubBuffer", whole.get_sub_region, start - first, size)
        return None


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Where the elements of a tensor begin, and how many bytes they span."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _host(start: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(start)
