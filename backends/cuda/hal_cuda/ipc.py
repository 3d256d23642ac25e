"""Memory that several processes address, by the runtime's handles."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import torch

from hal.portable.runtime import out_of_memory
from hal.spec.errors import DeviceError
from hal_cuda.calls import checked, current

_LAZY_PEER_ACCESS: Final = 1


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
