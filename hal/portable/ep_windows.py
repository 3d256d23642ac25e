"""Windows of this rank, lent call by call, and the windows of its peers."""

from __future__ import annotations

from typing import Any, Final

from hal.portable.runtime import Handle, SharingDevice, Window

_LEAST: Final = 1 << 16


class Lease:
    """A window in use.

    Attributes
    ----------
    number : int
        What peers call it.
    size : int
    window : Window
    """

    __slots__ = ("number", "size", "window")

    def __init__(self, number: int, size: int, window: Window) -> None:
        self.number, self.size, self.window = number, size, window


class Windows:
    """All windows a rank knows.

    Parameters
    ----------
    device : SharingDevice
    """

    def __init__(self, device: SharingDevice) -> None:
        self._device = device
        self._count = 0
        self._free: list[Lease] = []
        self._new: list[Lease] = []
        self._sizes: dict[int, int] = {}
        self._leased: dict[int, Lease] = {}
        self._peers: dict[tuple[int, int], Window] = {}

    def take(self, size: int) -> Lease:
        """A window of at least so many bytes, made where none is free."""
        fitting = [lease for lease in self._free if lease.size >= size]
        if fitting:
            lease = min(fitting, key=lambda one: one.size)
            self._free.remove(lease)
        else:
            whole = max(_LEAST, 1 << (size - 1).bit_length())
            lease = Lease(self._count, whole, self._device.window(whole))
            self._sizes[self._count] = whole
            self._count += 1
            self._new.append(lease)
        self._leased[lease.number] = lease
        return lease

    def largest(self) -> Lease | None:
        """The largest that is free, if there is one."""
        return self.take(max(lease.size for lease in self._free)) if self._free else None

    def give_back(self, lease: Lease | None) -> None:
        """Nobody reads or writes it any more. Once or often."""
        if lease is not None and self._leased.pop(lease.number, None) is not None:
            self._free.append(lease)

    def announcement(self) -> tuple[list[Any], list[int]]:
        """What peers must be told before they hear of a window, and the files to send along."""
        told: list[Any] = []
        files: list[int] = []
        for lease in self._new:
            handle = lease.window.handle
            told.append([lease.number, handle.size, handle.data.hex(), len(handle.files)])
            files += handle.files
        self._new.clear()
        return told, files

    def learn(self, peer: int, told: list[Any], files: list[int]) -> None:
        """Open what a peer has announced.

        Raises
        ------
        ForeignWindow
            It is no window.
        DeviceError
            It cannot be opened here.
        """
        at = 0
        for number, size, data, count in told:
            handle = Handle(size, bytes.fromhex(data), tuple(files[at : at + count]))
            self._peers[peer, number] = self._device.peer(handle)
            at += count

    def of(self, peer: int, number: int) -> Window | None:
        """A window of a peer."""
        return self._peers.get((peer, number))

    def own(self, number: int) -> Window:
        """A window of this rank that is lent."""
        return self._leased[number].window

    def bytes(self) -> dict[str, int]:
        """How much there is, and how much of it is lent."""
        return {"window": sum(self._sizes.values()), "in_use": sum(one.size for one in self._leased.values())}

    def close_peers(self) -> None:
        """Forget what is others'."""
        for window in self._peers.values():
            window.close()
        self._peers.clear()

    def close(self) -> None:
        """Forget all; peers should have done so before."""
        self.close_peers()
        for lease in (*self._free, *self._leased.values()):
            lease.window.close()
        self._free.clear()
        self._leased.clear()
        self._sizes.clear()
