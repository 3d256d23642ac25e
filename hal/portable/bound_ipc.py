"""Memory that several processes address, over the bindings of a runtime: see `hal.portable.ipc`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from hal.spec.errors import DeviceError

if TYPE_CHECKING:
    from hal.portable.bindings import Runtime

_LAZY_PEER_ACCESS: Final = 1


class BoundIpc:
    """The runtime's calls, on one device.

    Parameters
    ----------
    runtime : Runtime
    device : int
    """

    handle_bytes = 64

    def __init__(self, runtime: Runtime, device: int) -> None:
        self._runtime, self._device = runtime, device

    def make(self, size: int) -> int:
        """See `Ipc`."""
        runtime = self._on_device()
        try:
            address = int(runtime("Malloc", size))
        except DeviceError as error:
            raise runtime.lacking("a window", size, error) from error
        runtime("MemsetAsync", address, 0, size, None)
        runtime("StreamSynchronize", None)
        return address

    def free(self, address: int) -> None:
        """See `Ipc`."""
        self._on_device()("Free", address)

    def export(self, address: int) -> bytes:
        """See `Ipc`."""
        made = self._on_device()("IpcGetMemHandle", address)
        return ctypes.string_at(made.as_c_void_p().value, self.handle_bytes)

    def open(self, handle: bytes) -> int:
        """See `Ipc`."""
        runtime = self._on_device()
        given = runtime.structure("IpcMemHandle_st")()
        ctypes.memmove(given.as_c_void_p().value, handle, self.handle_bytes)
        return int(runtime("IpcOpenMemHandle", given, _LAZY_PEER_ACCESS))

    def shut(self, address: int) -> None:
        """See `Ipc`."""
        self._on_device()("IpcCloseMemHandle", address)

    def _on_device(self) -> Runtime:
        self._runtime("SetDevice", self._device)
        return self._runtime
