"""Memory that several processes address, over a runtime's handles for other processes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

from hal.portable.runtime import Handle
from hal.spec.errors import DeviceError

if TYPE_CHECKING:
    from hal.portable.bindings import Runtime

_BYTES: Final = 64
"""Of a handle."""
_LAZY_PEER_ACCESS: Final = 1


class BoundWindow(int):
    """See `runtime.Window`: memory of this process, or another's that was opened here, as its address."""

    _runtime: Runtime
    _memory: Any
    _size: int
    _free: str

    @classmethod
    def make(cls, runtime: Runtime, size: int) -> BoundWindow:
        """So many bytes, all zero.

        Raises
        ------
        DeviceError
            There is not so much.
        """
        made = cls._of(runtime, runtime("Malloc", size), size, "Free")
        runtime("MemsetAsync", int(made), 0, size, None)
        runtime("StreamSynchronize", None)
        return made

    @classmethod
    def open(cls, runtime: Runtime, handle: Handle) -> BoundWindow:
        """What another process made.

        Raises
        ------
        DeviceError
            It is none.
        """
        if len(handle.data) != _BYTES:
            raise DeviceError(f"a window with {len(handle.data)} bytes of handle, not {_BYTES}")
        given = runtime.structure("IpcMemHandle_st")()
        ctypes.memmove(given.as_c_void_p().value, handle.data, _BYTES)
        memory = runtime("IpcOpenMemHandle", given, _LAZY_PEER_ACCESS)
        return cls._of(runtime, memory, handle.size, "IpcCloseMemHandle")

    @classmethod
    def _of(cls, runtime: Runtime, memory: Any, size: int, free: str) -> BoundWindow:
        made = cls(int(memory))
        made._runtime, made._memory, made._size, made._free = runtime, memory, size, free
        return made

    @property
    def memory(self) -> BoundWindow:
        """Itself: an address is all that kernels need."""
        return self

    @property
    def handle(self) -> Handle:
        """See `runtime.Window`."""
        made = self._runtime("IpcGetMemHandle", int(self))
        return Handle(self._size, ctypes.string_at(made.as_c_void_p().value, _BYTES))

    def close(self) -> None:
        """See `runtime.Window`."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            self._runtime(self._free, memory)
