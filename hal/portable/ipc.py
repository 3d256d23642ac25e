"""Memory that several processes address, by the handles that a runtime makes of it for other processes."""

from __future__ import annotations

from typing import Protocol

from hal.portable.runtime import ForeignWindow, Handle


class Ipc(Protocol):
    """What a runtime can do with memory of a device, by its address.

    Attributes
    ----------
    handle_bytes : int
        Of what it makes for other processes.
    """

    handle_bytes: int

    def make(self, size: int) -> int:
        """So many bytes, all zero."""

    def free(self, address: int) -> None:
        """Of what `make` gave."""

    def export(self, address: int) -> bytes:
        """What another process opens it with."""

    def open(self, handle: bytes) -> int:
        """Where another process's memory is for this one."""

    def shut(self, address: int) -> None:
        """Of what `open` gave."""


class IpcWindow(int):
    """See `runtime.Window`: memory of this process, or another's that was opened here, as its address."""

    _ipc: Ipc
    _size: int
    _made: bool
    _there: bool

    @classmethod
    def make(cls, ipc: Ipc, size: int) -> IpcWindow:
        """So many bytes, all zero.

        Raises
        ------
        DeviceError
            There is not so much.
        """
        return cls._of(ipc, ipc.make(size), size, True)

    @classmethod
    def open(cls, ipc: Ipc, handle: Handle) -> IpcWindow:
        """What another process made.

        Raises
        ------
        ForeignWindow
            It is none.
        DeviceError
            The runtime does not open it.
        """
        if len(handle.data) != ipc.handle_bytes:
            raise ForeignWindow(f"a window with {len(handle.data)} bytes of handle, not {ipc.handle_bytes}")
        return cls._of(ipc, ipc.open(handle.data), handle.size, False)

    @classmethod
    def _of(cls, ipc: Ipc, address: int, size: int, made: bool) -> IpcWindow:
        window = cls(address)
        window._ipc, window._size, window._made, window._there = ipc, size, made, True
        return window

    @property
    def memory(self) -> IpcWindow:
        """Itself: an address is all that kernels need."""
        return self

    @property
    def handle(self) -> Handle:
        """See `runtime.Window`."""
        return Handle(self._size, self._ipc.export(int(self)))

    def close(self) -> None:
        """See `runtime.Window`."""
        if self._there:
            self._there = False
            (self._ipc.free if self._made else self._ipc.shut)(int(self))
