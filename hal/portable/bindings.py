"""The driver for devices whose runtime and run-time compiler have Python bindings: calls of ``(error, *results)``.

The backend gives the bindings (`Bindings`); what is called by which name, what is checked and what is kept is written
here. Tensors of a torch built for the device are used in place, on torch's current stream. Where there is no such
torch, as in simulation, tensors of the host are copied there and back (`hal.portable.staged`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from hal.portable import cache, compiling, sim
from hal.portable.bound_ipc import BoundIpc
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
from hal.spec.errors import BackendUnavailable, DeviceError, first_line

CALLS: Final = (
    "DeviceSynchronize",
    "DriverGetVersion",
    "EventCreate",
    "EventDestroy",
    "EventElapsedTime",
    "EventRecord",
    "EventSynchronize",
    "Free",
    "GetDeviceCount",
    "GetErrorString",
    "IpcCloseMemHandle",
    "IpcGetMemHandle",
    "IpcOpenMemHandle",
    "Malloc",
    "MemcpyAsync",
    "MemsetAsync",
    "ModuleGetFunction",
    "ModuleLaunchKernel",
    "ModuleLoadData",
    "RuntimeGetVersion",
    "SetDevice",
    "StreamCreateWithFlags",
    "StreamSynchronize",
)
"""What is called of the runtime, after its prefix."""
COMPILER_CALLS: Final = (
    "CompileProgram",
    "CreateProgram",
    "DestroyProgram",
    "GetCode",
    "GetCodeSize",
    "GetProgramLog",
    "GetProgramLogSize",
    "Version",
)
"""What is called of the compiler."""


@dataclass(frozen=True, slots=True)
class Bindings:
    """Where a runtime is to be found.

    Attributes
    ----------
    prefix : str
        Of the runtime's functions; also what `hal.portable.sim` knows it as, and the dialect of its kernels.
    package, runtime, compiler : str
        The Python package and its two modules; functions of the second begin with its own name.
    home : str
        The environment variable that names the folder in whose ``lib`` the modules look for libraries.
    names : tuple of str
        The libraries they look for.
    properties : str
        C name of the function behind ``GetDeviceProperties``.
    files : mapping of str to str
        What is to be loaded for these names; empty where the modules find it themselves.
    """

    prefix: str
    package: str
    runtime: str
    compiler: str
    home: str
    names: tuple[str, ...]
    properties: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime with its compiler, loaded; see `load`."""

    bindings: Bindings
    module: Any
    rtc: Any
    simulated: bool

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime: its result, or a tuple of several.

        Raises
        ------
        DeviceError
            Names the call and the runtime's own error.
        """
        error, results = self._called(self.module, self.bindings.prefix + name, arguments)
        if int(error):
            text = self._called(self.module, f"{self.bindings.prefix}GetErrorString", (error,))[1]
            raise DeviceError(f"{self.bindings.prefix}{name}: {error.name} ({int(error)}): {_text(text)}")
        return results

    def lacking(self, call: str, size: int, error: object) -> DeviceError:
        """What to raise where the current device does not give so many bytes."""
        has = ""
        with contextlib.suppress(DeviceError):
            free, whole = self("MemGetInfo")
            has = f"the device has {int(whole)} bytes, {int(free)} of them free"
        return out_of_memory(call, size, has, error)

    def structure(self, name: str) -> Any:
        """A type of the runtime's."""
        return getattr(self.module, self.bindings.prefix + name)

    def compile(self, text: str, source: Source, *options: str) -> bytes:
        """Machine code.

        Raises
        ------
        CompileError
        """
        program = self._compiler("CreateProgram", text.encode(), Path(source.path).name.encode(), 0, None, None)
        try:
            name = f"{self.bindings.compiler}CompileProgram"
            error, _ = self._called(self.rtc, name, (program, len(options), [o.encode() for o in options]))
            if int(error):
                log = self._read(program, "GetProgramLog").rstrip(b"\0").decode(errors="replace")
                message = f"{name}: {error.name} for {' '.join(options)}: the kernels do not build"
                fix = f"the compiler is the one that the package {self.bindings.package} loads"
                raise compiling.refusal(message, log, text, source.path, fix)
            return self._read(program, "GetCode")
        finally:
            self._compiler("DestroyProgram", program.createRef())

    def versions(self) -> str:
        """Of the runtime and of the compiler."""
        major, minor = self._compiler("Version")
        word = self.bindings.prefix.upper()
        return f"{word} {self('RuntimeGetVersion')}, compiler {major}.{minor}" + (
            f", {sim.version()}" if self.simulated else ""
        )

    def _compiler(self, name: str, *arguments: Any) -> Any:
        error, results = self._called(self.rtc, self.bindings.compiler + name, arguments)
        if int(error):
            raise DeviceError(f"{self.bindings.compiler}{name}: {error.name} ({int(error)})")
        return results

    def _read(self, program: Any, what: str) -> bytes:
        content = bytearray(self._compiler(f"{what}Size", program))
        self._compiler(what, program, content)
        return bytes(content)

    def _called(self, module: Any, name: str, arguments: Sequence[Any]) -> tuple[Any, Any]:
        try:
            error, *results = getattr(module, name)(*arguments)
        except (AttributeError, RuntimeError) as problem:
            raise DeviceError(f"{name}: {problem}") from problem
        return error, results[0] if len(results) == 1 else tuple(results)


def load(bindings: Bindings, compiles_only: bool = False) -> Runtime:
    """Import the bindings and let them load their libraries, or the simulator's where ``HAL_SIM`` asks for it.

    Parameters
    ----------
    bindings : Bindings
    compiles_only : bool
        Whether the compiler alone will be used, for which no device is needed.

    Raises
    ------
    BackendUnavailable
        Says what is missing: the bindings, a library, or functions of it.
    CompileError
        The simulator does not build.
    """
    try:
        package = importlib.import_module(bindings.package)
        module, rtc = getattr(package, bindings.runtime), getattr(package, bindings.compiler)
    except Exception as error:  # it may fail at its import in any way
        raise BackendUnavailable(f"the package {bindings.package} does not import: {first_line(error)}") from error
    files = bindings.files
    simulates = bool(sim.asked(bindings.prefix))
    if simulates:
        simulator = str(sim.library(bindings.prefix, bindings.names[0]))
        # Bindings that found nothing before look for the bare name from then on.
        ctypes.CDLL(simulator)
        files = dict.fromkeys(bindings.names, simulator)
    _load_libraries(bindings, files, module, rtc)
    simulated = bool(module.has_symbol(sim.MARK))
    if simulates and not simulated:
        raise BackendUnavailable(
            f"{sim.ENV}={os.environ[sim.ENV]}: {bindings.package} has loaded another library before"
        )
    prefix, word = bindings.prefix, bindings.compiler
    wanted = () if compiles_only else (*(prefix + call for call in CALLS), bindings.properties)
    absent = [name for name in wanted if not module.has_symbol(name)]
    absent += [word + call for call in COMPILER_CALLS if not rtc.has_symbol(word + call)]
    if absent:
        raise BackendUnavailable(f"the runtime's library lacks {', '.join(absent)}")
    return Runtime(bindings, module, rtc, simulated)


def _load_libraries(bindings: Bindings, files: Mapping[str, str], module: Any, rtc: Any) -> None:
    """Bindings load a library when a function of it is first called, and keep it."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get(bindings.home)
        if files:
            Path(folder, "lib").mkdir()
            for name, path in files.items():
                Path(folder, "lib", name).symlink_to(path)
            os.environ[bindings.home] = folder
        try:
            getattr(module, f"{bindings.prefix}GetDeviceCount")()
            getattr(rtc, bindings.compiler + "Version")()
        except RuntimeError as error:
            raise BackendUnavailable(f"{bindings.package}: {first_line(error)}") from error
        finally:
            if before is not None:
                os.environ[bindings.home] = before
            elif files:
                del os.environ[bindings.home]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a chip is given to do.

    Attributes
    ----------
    groups : int
        Work groups a processor has at once, so that one works while another waits.
    local_bytes : int
        Local memory of one of them; the tile of query rows and tokens is the largest that fits.
    """

    groups: int
    local_bytes: int


@dataclass(frozen=True, slots=True)
class Torch:
    """What a torch for such devices calls them: the type, and the attribute of a stream that holds its address."""

    device: str
    stream: str


@dataclass(slots=True, eq=False)
class BoundProgram:
    """See `runtime.Program`."""

    source: Source
    module: Any
    functions: dict[str, Any] = field(default_factory=dict)


class BoundEvent(StreamEvent):
    """See `runtime.StreamEvent`."""

    def __init__(self, runtime: Runtime, stream: Any, timed: bool) -> None:
        self._runtime, self._stream = runtime, stream
        super().__init__(timed, f"{runtime.bindings.prefix}EventElapsedTime")

    @property
    def stream(self) -> object:
        """See `runtime.Event`."""
        return self._stream

    def wait(self) -> None:
        """See `runtime.StreamEvent`."""
        self._runtime("StreamSynchronize", self._stream)

    def _made(self) -> Any:
        return self._runtime("EventCreate")

    def _record(self, mark: Any) -> None:
        self._runtime("EventRecord", mark, self._stream)

    def _milliseconds(self, begun: Any, ended: Any) -> float:
        return float(self._runtime("EventElapsedTime", begun, ended))

    def _destroy(self, mark: Any) -> None:
        self._runtime("EventDestroy", mark)


class BoundDevice(Mailboxes, InPlace):
    """See `runtime.Device`; its queue is torch's current stream, so that nothing here waits.

    Parameters
    ----------
    runtime : Runtime
    index : int
    torch_words : Torch
    tunings : mapping of str to Tuning
        By architecture.
    timed : bool
        Whether launches can be asked how long they took, which costs two more calls each.
    """

    transport: Final = "ipc"

    def __init__(
        self, runtime: Runtime, index: int, torch_words: Torch, tunings: Mapping[str, Tuning], timed: bool = False
    ) -> None:
        self.runtime, self.index = runtime, index
        self._torch, self._tunings, self._timed = torch_words, tunings, timed
        self._launches: Counter[str] = Counter()

    @cached_property
    def properties(self) -> Any:
        """What the runtime says of the device."""
        return self.runtime("GetDeviceProperties", self.index)

    @cached_property
    def target(self) -> str:
        """What is compiled for: the architecture with its features."""
        return _text(self.properties.gcnArchName)

    @cached_property
    def facts(self) -> Facts:
        """What the runtime says of the device, and how much of it is to be used."""
        architecture = self.target.partition(":")[0]
        tuning = self._tunings[architecture]
        return Facts(
            name=architecture,
            driver=self.runtime.versions(),
            dialect=self.runtime.bindings.prefix,
            processors=self.properties.multiProcessorCount,
            groups=tuning.groups,
            local_bytes=min(tuning.local_bytes, self.properties.sharedMemPerBlock),
            subgroup=self.properties.warpSize,
        )

    def empty(self, size: int) -> Any:
        """See `runtime.Allocator`; torch's memory, freed in the order of its stream."""
        try:
            return torch.empty(max(size, 16), dtype=torch.uint8, device=f"{self._torch.device}:{self.index}")
        except RuntimeError as error:
            raise self.runtime.lacking("torch.empty", size, first_line(error)) from error

    @cached_property
    def _ipc(self) -> BoundIpc:
        return BoundIpc(self.runtime, self.index)

    def window(self, size: int) -> IpcWindow:
        """See `runtime.SharingDevice`."""
        return IpcWindow.make(self._ipc, size)

    def peer(self, handle: Handle) -> IpcWindow:
        """See `runtime.SharingDevice`."""
        return IpcWindow.open(self._ipc, handle)

    def build(self, source: Source) -> BoundProgram:
        """See `runtime.Device`."""
        facts = self.facts
        flags = (f"--gpu-architecture={self.target}", "-std=c++17", "-O3")
        folder, name = cache.private_folder(facts.dialect, facts.name), f"{source.key(facts, *flags)}.bin"
        text = source.text(facts.dialect)
        code = cache.kept(folder, name, lambda: self.runtime.compile(text, source, *flags))
        self.runtime("SetDevice", self.index)
        return BoundProgram(source, self.runtime("ModuleLoadData", bytearray(code)))

    def stream(self) -> Any:
        """Where work is queued: torch's current stream of the device."""
        current = torch.get_device_module(self._torch.device).current_stream(self.index)
        return getattr(current, self._torch.stream)

    def launch(
        self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]
    ) -> BoundEvent:
        """See `runtime.Queue`."""
        assert isinstance(program, BoundProgram)
        runtime, stream = self.runtime, self.stream()
        runtime("SetDevice", self.index)
        if kernel not in program.functions:
            program.functions[kernel] = runtime("ModuleGetFunction", program.module, kernel.encode())
        given, _held = packed(arguments)
        event = BoundEvent(runtime, stream, self._timed)
        shape = (groups, 1, 1, threads, 1, 1)
        runtime("ModuleLaunchKernel", program.functions[kernel], *shape, 0, stream, ctypes.addressof(given), None)
        event.mark()
        self._launches[kernel] += 1
        return event

    def launches(self) -> Mapping[str, int]:
        """See `runtime.Device`."""
        prefix, name = self.runtime.bindings.prefix, self.facts.name
        return {f"{prefix}:{kernel}@{name}": count for kernel, count in self._launches.items()}


def _text(found: Any) -> str:
    return found.decode() if isinstance(found, bytes) else str(found)
