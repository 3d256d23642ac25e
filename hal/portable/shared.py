"""Windows in the host's memory: anonymous files, for devices that work there.

A file without a name cannot be guessed, and goes with the last process that holds it, however that ends. It is sealed,
so that nobody can take away under a reader what its size promised.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

import torch
from torch import Tensor

from hal.portable.runtime import ForeignWindow, Handle, host_has, out_of_memory
from hal.spec.errors import DeviceError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """See `runtime.Window`; kernels that take torch's memory take this.

    Attributes
    ----------
    memory : Tensor
        [size] uint8.
    """

    def __init__(self, file: int, size: int) -> None:
        try:
            self.memory: Tensor = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            os.close(file)
            raise out_of_memory("mmap", size, host_has(), error) from error
        # From here on its own to close: twice would close what somebody else has opened meanwhile.
        self._file = file
        self._size = size

    @staticmethod
    def make(size: int) -> SharedMemory:
        """A window of this process.

        Raises
        ------
        DeviceError
        """
        try:
            file = os.memfd_create("hal-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise out_of_memory("memfd", size, host_has(), error) from error
        try:
            os.ftruncate(file, size)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        except (OSError, OverflowError) as error:
            os.close(file)
            raise out_of_memory("memfd", size, host_has(), error) from error
        return SharedMemory(file, size)

    @staticmethod
    def open(handle: Handle) -> SharedMemory:
        """A window of another process.

        Raises
        ------
        ForeignWindow
            What came is no window of that size.
        DeviceError
            This process lacks memory or files for it.
        """
        if len(handle.files) != 1 or handle.size < 1:
            raise ForeignWindow(f"a window of {handle.size} bytes in {len(handle.files)} files, not in one")
        try:
            sealed = fcntl.fcntl(handle.files[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False
        there = os.fstat(handle.files[0]).st_size
        if not sealed or there != handle.size:
            said = f"the file has {there}, {'' if sealed else 'un'}sealed"
            raise ForeignWindow(f"a window of {handle.size} bytes: {said}")
        try:
            file = os.dup(handle.files[0])
        except OSError as error:
            raise DeviceError(f"a window of {handle.size} bytes: {error}") from error
        return SharedMemory(file, handle.size)

    @property
    def handle(self) -> Handle:
        """See `runtime.Window`."""
        return Handle(self._size, files=(self._file,))

    def close(self) -> None:
        """See `runtime.Window`; the memory goes with the last tensor that shows it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
