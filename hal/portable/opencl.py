"""The driver for OpenCL 1.2 devices, on pyopencl; tensors live on the host.

Where device and host share memory, kernels read and write tensors in place. Elsewhere every call moves what it needs,
except for tensors that were adopted: they have a copy on the device.
"""

from __future__ import annotations

import contextlib
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
from hal.portable.runtime import LESS, Argument, Facts, Handle, Program, Source, out_of_memory
from hal.portable.shared import SharedMemory
from hal.spec.errors import BackendUnavailable, DeviceError, SpecError, first_line

PLATFORM_ENV: Final = "HAL_OPENCL_PLATFORM"
"""Part of the name or vendor of the platform to use."""
DEVICE_ENV: Final = "HAL_OPENCL_DEVICE"
"""Number of the device within its platform; 0 if unset."""

_FOLDER: Final = "opencl"
_INSTALL: Final = "pip install pyopencl"
_MOST_LOCAL: Final = 128 << 10
_OTHER_DEVICE: Final = f"release what was adopted, or let {PLATFORM_ENV} or {DEVICE_ENV} name a larger device"

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
    except Exception as error:  # it may fail at its import in any way
        raise BackendUnavailable(f"pyopencl does not import: {first_line(error)}; {_INSTALL}") from error
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
        raise DeviceError(f"{name}: out of device memory: {error}; {LESS}; {_OTHER_DEVICE}") from error
    except pyopencl.Error as error:
        raise DeviceError(f"{name}: {error}") from error
    except OSError as error:
        # pyopencl keeps what calls a kernel in the user's cache folder, and has no other way where there is none.
        fix = "XDG_CACHE_HOME names a folder that can be written, or PYOPENCL_NO_CACHE=1 does without"
        raise DeviceError(f"{name}: {error}; {fix}") from error


@dataclass(slots=True, eq=False)
class OpenClEvent:
    """See `runtime.Event`."""

    handle: Any

    @property
    def stream(self) -> object:
        """The queue of its device, or of the call."""
        return self.handle.command_queue

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
    """A tensor of the host with a copy on the device, until it is released or its memory becomes another.

    Changes that torch makes are noticed and cost a new copy of the whole at the next call; `update` copies a part. A
    tensor that was given other memory, as by ``resize_`` or ``set_``, is moved with every call again.
    """

    tensor: Tensor
    buffer: Any
    device: OpenClDevice
    version: int
    place: tuple[int, int]
    storage: torch.UntypedStorage

    def update(self, first: int, last: int) -> None:
        """Copy ``tensor[first:last]`` and take the device's copy for the newest: no other element has changed.

        Raises
        ------
        SpecError
            The copy was given up.
        """
        if self not in self.device.current():
            raise SpecError("tensor", "one that is not adopted any more", "one whose memory has stayed; adopt it again")
        start, size = _bytes(self.tensor[first:last])
        if size:
            self._copy(start, size)
        self.version = self.tensor._version

    def release(self) -> None:
        """Forget the copy; the tensor is moved with every call again. Idempotent."""
        if self in self.device.adopted:
            self.device.adopted.remove(self)

    def stays(self) -> bool:
        """Whether the tensor's memory is what it was when it was adopted."""
        same = self.tensor.untyped_storage()._cdata == self.storage._cdata
        return same and _bytes(self.tensor) == self.place

    def fresh(self) -> Any:
        """The buffer, once it holds what the tensor holds."""
        if self.version != self.tensor._version:
            self._copy(*self.place)
            self.version = self.tensor._version
        return self.buffer

    def _copy(self, start: int, size: int) -> None:
        import pyopencl

        offset = start - self.place[0]
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
        self.adopted: list[Adopted] = []
        self._unified = unified
        self._launches: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._process = os.getpid()

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

        self._refuse_fork()
        return self.buffer(pyopencl.mem_flags.READ_WRITE, max(size, 16))

    def buffer(self, flags: int, size: int, start: int | None = None) -> Any:
        """Memory of the device, of or for so many bytes of the host that begin there.

        Raises
        ------
        DeviceError
            There is not so much, in one piece or at all.
        """
        import pyopencl

        given = {"size": size} if start is None else {"hostbuf": _host(start, size)}
        try:
            return pyopencl.Buffer(self.context, flags, **given)
        except pyopencl.Error as error:
            piece, whole = self.handle.max_mem_alloc_size, self.handle.global_mem_size
            has = f"{self.facts.name} has {whole} bytes, at most {piece} of them in one piece"
            raise out_of_memory("clCreateBuffer", size, has, error, _OTHER_DEVICE) from error

    def window(self, size: int) -> OpenClWindow:
        """See `runtime.SharingDevice`."""
        return OpenClWindow(self, SharedMemory.make(size))

    def peer(self, handle: Handle) -> OpenClWindow:
        """See `runtime.SharingDevice`."""
        return OpenClWindow(self, SharedMemory.open(handle))

    def adopt(self, tensor: Tensor) -> Adopted | None:
        """Give a tensor a copy on the device that stays there; None where the device reads the host's memory anyway.

        A tensor that is adopted already has the copy it has.

        Raises
        ------
        SpecError
            It is no tensor of the host; it has memory in common with another that is adopted; or torch does not count
            what is written to it, so a stale copy would go unnoticed.
        """
        kind = f"{tensor.device.type}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        if kind != "cpu, torch.strided":
            raise SpecError("tensor", kind, "a strided tensor of the host")
        if self.unified:
            return None
        if tensor.is_inference():
            raise SpecError("tensor", "an inference tensor", "one whose changes torch counts")
        place = start, size = _bytes(tensor)
        for one in self.current():
            if one.tensor is tensor:
                return one
            if size and start < sum(one.place) and one.place[0] < start + size:
                raise SpecError("tensor", "memory that another adopted tensor has too", "the other one; or release it")
        adopted = Adopted(tensor, self.empty(size), self, tensor._version, place, tensor.untyped_storage())
        if size:
            adopted._copy(*place)
        self.adopted.append(adopted)
        return adopted

    def current(self) -> list[Adopted]:
        """Adopted tensors whose memory is what it was; the others are given up, for theirs may be anybody's by now."""
        self.adopted[:] = [one for one in self.adopted if one.stays()]
        return list(self.adopted)

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
            # Nothing of pyopencl's own cache, which reads pickles from a folder that nobody has looked at.
            return program.build("-cl-std=CL1.2", cache_dir=False)  # type: ignore[arg-type]
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
        self._refuse_fork()
        return OpenClQueue(self)

    def _refuse_fork(self) -> None:
        """Say what would otherwise wait for ever: the driver's threads are not in a child."""
        if os.getpid() != self._process:
            wanted = "start processes by spawn or forkserver, or fork before the HAL is used"
            raise DeviceError(f"{self.platform}: this process was forked from one that had opened it; {wanted}")

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
        self.memory: Any = device.buffer(flags, size, start)
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
        return self._device.buffer(flags.READ_ONLY | how, size, start)

    def write(self, tensor: Tensor, partly: bool = False) -> tuple[Any, tuple[int, ...]]:
        """See `runtime.Queue`."""
        import pyopencl

        if self._device.unified:
            self._held.append(tensor)
            flags = pyopencl.mem_flags.WRITE_ONLY | pyopencl.mem_flags.USE_HOST_PTR
            start, size = _bytes(tensor)
            return self._device.buffer(flags, size, start), tensor.stride()
        # Between the elements of the tensor may lie others', which must not be written: they come back packed.
        packed = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        buffer = self._device.empty(_bytes(packed)[1])
        if partly and packed.numel():
            packed.copy_(tensor)
            commands, content = self._device.commands, _host(*_bytes(packed))
            checked("clEnqueueWriteBuffer", pyopencl.enqueue_copy, commands, buffer, content)
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
        self._results.clear()

    def __del__(self) -> None:
        # Where a call was left half way, kernels may still read and write what is held.
        if self._held or self._results:
            with contextlib.suppress(DeviceError):
                checked("clFinish", self._device.commands.finish)

    def _resident(self, start: int, size: int) -> Any | None:
        """The device's copy of these bytes, if they lie within a tensor that was adopted."""
        for adopted in self._device.current():
            first, length = adopted.place
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
