"""What a driver is to the portable kernels: a device that builds programs, holds memory and does work in order.

A driver implements `Device`, `Allocator`, `Program`, `Queue` and `Event` in one module; with `Window` it is a
`SharingDevice`. The host side of an operation (`hal.portable.mla`, `hal.portable.ep`) knows nothing else of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hal.portable.cache import key
from hal.spec.errors import DeviceError

if TYPE_CHECKING:
    from typing_extensions import Self

Number: TypeAlias = np.int32 | np.int64 | np.float32
"""A scalar argument of a kernel, of exactly the kernel's type."""


class Words(tuple[int, ...]):
    """Several 32-bit integers that a kernel takes one after the other; less to do than with an object for each."""

    __slots__ = ()


_HERE: Final = Path(__file__).parent
_INCLUDE: Final = re.compile(r'#include "([\w.]+)"')


LESS: Final = "make the cache, the batch or the buffer smaller, or close other users of the device"
"""What helps where memory is lacking, whatever the device."""


class ForeignWindow(DeviceError):
    """What another process gave is no window: that is its fault, unlike a window that cannot be opened here."""


def out_of_memory(call: str, size: int, has: str, error: object, fix: str = "") -> DeviceError:
    """What to raise where a device does not give so many bytes.

    Parameters
    ----------
    call : str
        Of the driver, that was refused.
    size : int
    has : str
        What there is, in words; empty where the driver does not say.
    error : object
        The driver's own.
    fix : str
        What else than `LESS` helps with this driver.
    """
    return DeviceError(f"{call} of {size} bytes: {'; '.join(filter(None, (str(error), has, LESS, fix)))}")


def host_has() -> str:
    """How much memory the host has, in words."""
    page, free, whole = (os.sysconf(f"SC_{name}") for name in ("PAGE_SIZE", "AVPHYS_PAGES", "PHYS_PAGES"))
    return f"the host has {page * whole} bytes, {page * free} of them free"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is to be known of a device.

    Attributes
    ----------
    name : str
    driver : str
        With version: what was compiled for one is not run by another.
    dialect : str
        Which of ``hal/portable/dialects`` its compiler understands.
    processors : int
        How many groups of threads run at once without sharing anything.
    groups : int
        How many groups a processor is to be given, so that it has something to do while one of them waits.
    local_bytes : int
        Local memory that one group may have.
    subgroup : int
        Threads that can shuffle; 1 where there is no such thing.
    """

    name: str
    driver: str
    dialect: str
    processors: int
    groups: int
    local_bytes: int
    subgroup: int


@dataclass(frozen=True, slots=True)
class Source:
    """Kernels to compile: their files in ``hal/portable/kernels``, in order, and what is defined before them."""

    files: tuple[str, ...]
    flags: tuple[tuple[str, int], ...]

    def text(self, dialect: str) -> str:
        """The one file a compiler is given; its errors name the files it came from, and the lines there."""
        paths = [_HERE / "dialects" / f"{dialect}.h", *(_HERE / "kernels" / name for name in self.files)]
        defined = "".join(f"#define {name} {value}\n" for name, value in self.flags)
        return defined + "".join(map(_text, paths))

    def key(self, facts: Facts, *options: str) -> str:
        """What compiled code is kept under."""
        flags = (f"{name}={value}" for name, value in self.flags)
        return key(self.text(facts.dialect), *flags, *options, facts.dialect, facts.name, facts.driver)

    @property
    def path(self) -> str:
        """The file an error is looked for in first."""
        return str(_HERE / "kernels" / self.files[-1])


@cache
def _text(path: Path) -> str:
    """A file with what it includes, since not every compiler is given a folder to look in."""
    text = f'#line 1 "{path}"\n'
    for number, line in enumerate(path.read_text().splitlines(), 1):
        included = _INCLUDE.fullmatch(line)
        text += f'{_text(path.parent / included[1])}#line {number + 1} "{path}"\n' if included else f"{line}\n"
    return text


class Memory(Protocol):
    """Bytes that kernels can address; freed when it is forgotten."""


Argument: TypeAlias = Memory | Number | Words


class Allocator(Protocol):
    """Where memory comes from."""

    def empty(self, size: int) -> Memory:
        """So many bytes of the device, of any content.

        Raises
        ------
        DeviceError
            There is not so much.
        """


class Program(Protocol):
    """Compiled kernels."""

    source: Source


class Event(Protocol):
    """The end of something that was queued."""

    @property
    def stream(self) -> object:
        """Where it was queued: one waits in order for what is behind it in the same, and not for what is elsewhere."""

    def wait(self) -> None:
        """Return when it is done.

        Raises
        ------
        DeviceError
            It failed.
        """

    def seconds(self) -> float:
        """How long it ran on the device, once it is done."""


class Queue(Protocol):
    """Work of one call, done in the order in which it is given.

    Whoever gave memory to it may forget that at once: what kernels still use stays. See `HoldingQueue`.
    """

    def read(self, tensor: Tensor) -> Memory:
        """The elements of a tensor where kernels of this queue can read them, for as long as the queue lives."""

    def write(self, tensor: Tensor, partly: bool = False) -> tuple[Memory, tuple[int, ...]]:
        """Where kernels of this queue are to write the elements of a tensor, and the strides to use there.

        They write all of them or, with ``partly``, leave some as they are.
        """

    def launch(self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]) -> Event:
        """Queue a kernel.

        Raises
        ------
        DeviceError
        """

    def finish(self) -> None:
        """See to it that what was written is where whoever owns the tensors looks for it.

        Tensors of the host must be there when this returns; tensors of the device are when its stream says so.
        """


class Device(Protocol):
    """One device, as its driver shows it."""

    @property
    def facts(self) -> Facts:
        """What it is."""

    @property
    def allocator(self) -> Allocator:
        """Where its memory comes from; often the device itself."""

    def build(self, source: Source) -> Program:
        """Compile, or find compiled in the cache on disk.

        Raises
        ------
        CompileError
            Carries path, line and the compiler's log.
        """

    def queue(self) -> Queue:
        """A queue for one call."""

    def launches(self) -> Mapping[str, int]:
        """How often each kernel was launched, by ``driver:kernel@device``."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What a window is opened with elsewhere on the machine.

    Attributes
    ----------
    size : int
    data : bytes
        The driver's own.
    files : tuple of int
        Descriptors, which only a socket can hand to another process.
    """

    size: int
    data: bytes = b""
    files: tuple[int, ...] = ()


class Window(Protocol):
    """Memory of one process that others of its machine can address too."""

    @property
    def memory(self) -> Memory:
        """What kernels are given."""

    @property
    def handle(self) -> Handle:
        """To be sent to others, by whoever made it; its files belong to the window."""

    def close(self) -> None:
        """Forget it, on this side; nothing that uses it may be under way. Idempotent."""


class SharingDevice(Device, Protocol):
    """A device whose memory several processes can address, each through a device of its own."""

    @property
    def transport(self) -> str:
        """How, as capabilities name it: ``"shm"`` or ``"ipc"``."""

    def window(self, size: int) -> Window:
        """Make a window of so many bytes, all zero.

        Raises
        ------
        DeviceError
            There is not so much.
        """

    def peer(self, handle: Handle) -> Window:
        """Open the window of another process; the files of the handle stay the caller's.

        Raises
        ------
        ForeignWindow
            It is none, or not of that size.
        DeviceError
            This process cannot open it, as where it lacks memory.
        """


class Fork(Protocol):
    """A stream beside the one that was current when it was made, and behind what that had been given by then.

    ``with`` it, that other stream is current.
    """

    def __enter__(self) -> object: ...

    def __exit__(self, *raised: object) -> object: ...

    def join(self) -> None:
        """What was launched within comes before what two streams are given from now on.

        They are the one that is current now and the one it was made beside.
        """


class MeetingDevice(SharingDevice, Protocol):
    """One whose windows are addresses, so that kernels find their way to those of all processes by themselves."""

    @property
    def looks(self) -> int:
        """How often a second a kernel can look whether another rank has written; 0 where launches are not captured."""

    def capturing(self) -> bool:
        """Whether it is now."""

    def fork(self) -> Fork | None:
        """A stream beside the current one, captured where that is; None where there are none."""

    def used_here(self, memory: Memory) -> None:
        """Keep memory, which was given while another stream was current, until this one is through with it too."""

    def mailbox(self, words: int) -> Tensor:
        """So many 32-bit words, all zero, that kernels write and the host reads.

        As soon as they are written or, where a queue brings results back, once that is finished.
        """


def packed(arguments: Sequence[Argument]) -> tuple[Any, list[Any]]:
    """Addresses of a launch's arguments, as drivers of C take them, and what they point to, to be held meanwhile.

    Memory of the device is given by its own address. A null ends them: some drivers can tell when they are too few.
    """
    cells = [cell for argument in arguments for cell in _cells(argument)]
    return (ctypes.c_void_p * (len(cells) + 1))(*(ctypes.addressof(cell) for cell in cells)), cells


def _cells(argument: Any) -> list[Any]:
    if isinstance(argument, Words):
        return [ctypes.c_int32(word) for word in argument]
    if isinstance(argument, Tensor):
        return [ctypes.c_void_p(argument.data_ptr())]
    if isinstance(argument, int):
        return [ctypes.c_void_p(argument)]
    return [ctypes.create_string_buffer(argument.tobytes())]


class InPlace(ABC):
    """The half of a `Device` that is the same wherever kernels address torch's own memory, in torch's own order."""

    @property
    def allocator(self) -> Self:
        """The device itself."""
        return self

    def queue(self) -> Queue:
        """The device itself, on whatever stream is current."""
        return self

    def read(self, tensor: Tensor) -> Tensor:
        """See `Queue`."""
        return tensor

    def write(self, tensor: Tensor, partly: bool = False) -> tuple[Tensor, tuple[int, ...]]:
        """See `Queue`."""
        return tensor, tensor.stride()

    @abstractmethod
    def launch(self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]) -> Event:
        """See `Queue`."""

    def finish(self) -> None:  # noqa: B027 - nothing to do, unless the tensors are the host's
        """Results are where torch looks for them: on its stream."""


class Mailboxes:
    """The half of a `MeetingDevice` that is the same wherever kernels address memory of the host that torch makes.

    Attributes
    ----------
    looks : int
        See `MeetingDevice`; a driver whose launches are captured has its own, and its own `capturing`.
    pinned : bool
        Whether that memory is to be made so that a device can address it, which that of a host playing one is anyway.
    """

    looks: int = 0
    pinned: bool = True

    def capturing(self) -> bool:
        """See `MeetingDevice`."""
        return False

    def fork(self) -> Fork | None:
        """See `MeetingDevice`: not written for most."""
        return None

    def used_here(self, memory: Memory) -> None:
        """See `MeetingDevice`."""
        if isinstance(memory, Tensor) and memory.device.type != "cpu":
            memory.record_stream(torch.get_device_module(memory.device).current_stream(memory.device))

    def mailbox(self, words: int) -> Tensor:
        """See `MeetingDevice`."""
        # It lasts longer than a mode of torch that the buffer may be opened in, and is written to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(words, dtype=torch.int32, pin_memory=self.pinned, device="cpu")


class HoldingQueue:
    """A queue of a device that addresses the host's memory and runs behind the host, as a simulator does.

    Torch keeps memory of its devices until their streams are through with it. That of the host it frees at once, so
    what kernels were given is kept here until the device was waited for.

    Parameters
    ----------
    device : InPlace
        Whose `finish` waits for all that was launched.
    """

    def __init__(self, device: InPlace) -> None:
        self._device = device
        self._held: list[Argument] = []

    def read(self, tensor: Tensor) -> Tensor:
        """See `Queue`."""
        return self._device.read(tensor)

    def write(self, tensor: Tensor, partly: bool = False) -> tuple[Tensor, tuple[int, ...]]:
        """See `Queue`."""
        return self._device.write(tensor, partly)

    def launch(self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]) -> Event:
        """See `Queue`."""
        self._held += arguments
        return self._device.launch(program, kernel, groups, threads, arguments)

    def finish(self) -> None:
        """Wait, and let go: of a call that failed too, which is waited for all the same."""
        try:
            self._device.finish()
        finally:
            self._held.clear()

    def __del__(self) -> None:
        # Where a call was left half way, kernels may still read and write what is held.
        if self._held:
            with contextlib.suppress(DeviceError):
                self._device.finish()


class StreamEvent(ABC):
    """The half of an `Event` that is the same wherever a stream takes marks: one before a launch and one after it.

    Parameters
    ----------
    timed : bool
        Whether there are any: they cost two more calls for each launch.
    clock : str
        The driver's function that measures between two of them, for errors.
    """

    def __init__(self, timed: bool, clock: str) -> None:
        self._marks: list[Any] = []
        self._timed, self._clock = timed, clock
        self.mark()

    def mark(self) -> None:
        """Note that the stream has come this far."""
        if self._timed:
            self._marks.append(self._made())
            self._record(self._marks[-1])

    def seconds(self) -> float:
        """By the device's clock.

        Raises
        ------
        DeviceError
            The device was not made with ``timed``.
        """
        if not self._timed:
            raise DeviceError(f"{self._clock}: the device was opened without timed=True")
        self.wait()
        return self._milliseconds(*self._marks) * 1e-3

    def __del__(self) -> None:
        for mark in self._marks:
            self._destroy(mark)

    @property
    @abstractmethod
    def stream(self) -> object:
        """By the driver's own name."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the stream has done all it was given."""

    @abstractmethod
    def _made(self) -> Any: ...

    @abstractmethod
    def _record(self, mark: Any) -> None: ...

    @abstractmethod
    def _milliseconds(self, begun: Any, ended: Any) -> float: ...

    @abstractmethod
    def _destroy(self, mark: Any) -> None: ...
