"""The driver for the host itself: kernels as C++, every thread of a group a fibre.

For tests: it is slow and looks closely. Subgroups may have any width; threads that do not meet at the same barrier are
an error; memory is NaN until it is written.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from hal.portable import cache, compiling
from hal.portable.runtime import Argument, Facts, Handle, InPlace, Program, Source, host_has, out_of_memory, packed
from hal.portable.shared import SharedMemory
from hal.spec.errors import BackendUnavailable, DeviceError, first_line

FIX: Final = "CXX names the C++ compiler"
"""What decides which one is used."""
_FLAGS: Final = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off")
_SIMULATOR: Final = Path(__file__).parent / "dialects" / "host.cpp"
_KERNEL: Final = re.compile(r"HAL_KERNEL\(\w+\)\s*void (\w+)\(")


def compiler() -> str:
    """The C++ compiler: ``CXX``, else the usual names.

    Raises
    ------
    BackendUnavailable
        There is none.
    """
    chosen = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, (chosen,) if chosen else ("c++", "g++", "clang++"))), None)
    if found is None and chosen:
        raise BackendUnavailable(f"CXX={chosen}: no such program; name one, without options, or unset it")
    if found is None:
        raise BackendUnavailable("no C++ compiler: install g++, or set CXX")
    return found


@dataclass(slots=True, eq=False)
class HostProgram:
    """See `runtime.Program`; its local memory and fibres are the library's, so that one launch runs at a time."""

    source: Source
    library: ctypes.CDLL
    alone: threading.Lock = field(default_factory=threading.Lock)


class HostEvent:
    """See `runtime.Event`: over before it is there."""

    stream: Final = None

    def wait(self) -> None:
        """Nothing to wait for."""

    def seconds(self) -> float:
        """Not measured."""
        return 0.0


class HostDevice(InPlace):
    """See `runtime.Device`.

    Parameters
    ----------
    subgroup : int
        Width of subgroups; 1 is a device without.
    processors : int
    local_bytes : int
    """

    transport: Final = "shm"

    def __init__(self, subgroup: int = 1, processors: int = 2, local_bytes: int = 48 << 10) -> None:
        self._shape = (subgroup, processors, local_bytes)
        self._launches: Counter[str] = Counter()

    @cached_property
    def facts(self) -> Facts:
        """As given; the driver is the compiler."""
        subgroup, processors, local_bytes = self._shape
        version = compiling.version(compiler(), FIX)
        return Facts("fibres", version.split("\n")[0], "host", processors, 2, local_bytes, subgroup)

    def empty(self, size: int) -> Any:
        """See `runtime.Allocator`. What was never written is NaN wherever a float is read."""
        try:
            return torch.full((max(size // 4, 4),), float("nan"), dtype=torch.float32, device="cpu")
        except RuntimeError as error:
            raise out_of_memory("torch.full", size, host_has(), first_line(error)) from error

    def window(self, size: int) -> SharedMemory:
        """See `runtime.SharingDevice`."""
        return SharedMemory.make(size)

    def peer(self, handle: Handle) -> SharedMemory:
        """See `runtime.SharingDevice`."""
        return SharedMemory.open(handle)

    def build(self, source: Source) -> HostProgram:
        """See `runtime.Device`."""
        text = source.text("host")
        kernels = _KERNEL.findall(text)
        calls = (f'extern "C" void call_{k}(void **given) {{ Call<{k}>::by_address(given); }}\n' for k in kernels)
        text += f'#line 1 "{_SIMULATOR}"\n{_SIMULATOR.read_text()}{"".join(calls)}'
        folder, name = cache.private_folder("host"), f"{cache.key(text, self.facts.driver, *_FLAGS)}.so"
        line, message = [compiler(), *_FLAGS], f"{compiler()}: the kernels do not build"
        try:
            library = cache.loaded(
                folder,
                name,
                lambda: compiling.compiled(line, text, ".cpp", message, source.path, FIX),
                _library,
                OSError,
            )
        except OSError as error:
            message = f"{line[0]}: what it has written does not load"
            raise compiling.refusal(message, str(error), text, source.path, FIX) from error
        return HostProgram(source, library)

    def launch(
        self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]
    ) -> HostEvent:
        """See `runtime.Queue`.

        Raises
        ------
        DeviceError
            Threads of a group parted at a barrier.
        """
        assert isinstance(program, HostProgram)
        given, _held = packed(arguments)
        parted = (ctypes.c_int * 2)()
        called = getattr(program.library, f"call_{kernel}")
        with program.alone:
            done: int = program.library.hal_host_run(called, given, groups, threads, self.facts.subgroup, parted)
        if done:
            lines = " and ".join(str(abs(line)) if line else "the end" for line in parted)
            files = ", ".join(program.source.files)
            raise DeviceError(f"{kernel}: threads of a group wait at different places: lines {lines} of {files}")
        self._launches[kernel] += 1
        return HostEvent()

    def launches(self) -> Mapping[str, int]:
        """See `runtime.Device`."""
        return {f"host:{kernel}@fibres": count for kernel, count in self._launches.items()}


def _library(code: bytes) -> ctypes.CDLL:
    # From a copy of its own: the entry may be replaced, and two programs must not share local memory.
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(code)
        file.flush()
        return ctypes.CDLL(file.name)
