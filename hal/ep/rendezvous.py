"""How ranks find each other: agreement on the buffer over the group, and window files within a node.

A window is an anonymous file. Its descriptor travels over a unix socket with an unguessable abstract name, so nothing
has a name in any file system and nothing is left when the processes are gone, however they ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from hal.spec.errors import RankFailure, SpecError

_OPENING: Final = "opening the buffer"
_POLL: Final = 2e-4

Exchange = Callable[[Any], list[Any]]
"""Gather one picklable object of every rank, in rank order."""


def exchange_over(group: Any, timeout: float) -> Exchange:
    """The exchange of a torch.distributed group.

    On the host a rank that does not come within ``timeout`` seconds is named in a RankFailure. A group that moves only
    device memory has one timeout for everything, its own.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    def from_each(mine: torch.Tensor, landing: list[torch.Tensor]) -> None:
        # One scatter from every rank rather than one gather of all, so that it shows whose is missing.
        end = time.monotonic() + timeout
        works: dict[int, Any] = {}
        for source, into in enumerate(landing):
            given = [mine] * ranks if source == rank else None
            try:
                works[source] = dist.scatter(into, given, group=group, group_src=source, async_op=True)
            except RuntimeError as error:
                raise _absent(source, error) from None
        own = works.pop(rank)
        # The first that fails is to blame: others may have left on its account by the time they are asked.
        while works:
            for source, work in list(works.items()):
                if work.is_completed():
                    _require(source, works.pop(source))
            if works and time.monotonic() > end:
                raise RankFailure(min(works), _OPENING, f"no answer from it within {timeout:g} s")
            time.sleep(_POLL if works else 0)
        with contextlib.suppress(RuntimeError):  # whoever did not take it has been named, or will be
            own.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))

    def exchange(mine: Any) -> list[Any]:
        said = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        from_each(torch.tensor([len(said)]), sizes)
        found = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
        from_each(said, found)
        return [pickle.loads(one.numpy().tobytes()) for one in found]

    def exchange_on_device(mine: Any) -> list[Any]:
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, mine, group=group)
        return found

    return exchange if "cpu:gloo" in str(dist.get_backend_config(group)) else exchange_on_device


def _require(rank: int, work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise _absent(rank, error) from None


def _absent(rank: int, error: RuntimeError) -> RankFailure:
    reason = str(error).split("\n")[0][:200]
    return RankFailure(rank, _OPENING, f"no answer from it ({reason})")


def agree(exchange: Exchange, fields: dict[str, Any]) -> None:
    """Compare the arguments of all ranks, so that they all go on or all raise the same error.

    ``fields`` maps argument names to values, or one name to a SpecError for arguments that were wrong by themselves, or
    to the RankFailure that this rank came upon.

    Raises
    ------
    SpecError
        The first wrong or differing argument, the same on every rank.
    RankFailure
        What a rank came upon.
    """
    everyone = exchange(fields)
    for found in everyone:
        for value in found.values():
            if isinstance(value, (SpecError, RankFailure)):
                raise value
    first = everyone[0]
    for rank, found in enumerate(everyone):
        for name, value in first.items():
            if found.get(name) != value:
                raise SpecError(name, f"{found.get(name)!r} on rank {rank}", f"{value!r}, as on rank 0")


def host_identity() -> str:
    """Equal for processes that can reach each other's abstract sockets: one kernel, one network namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}:{os.stat('/proc/self/ns/net').st_ino}"


class Doorbell:
    """A listening socket under a secret name, through which peers of the node fetch this rank's window."""

    def __init__(self, ranks: int) -> None:
        self.name = "hal-ep-" + secrets.token_hex(24)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.name)
        self._socket.listen(ranks + 8)

    def trade(
        self, fd: int, rank: int, names: Sequence[str], token: bytes, timeout: float
    ) -> dict[int, tuple[int, int]]:
        """Send ``fd`` to every peer and receive theirs.

        Parameters
        ----------
        fd : int
            This rank's window.
        rank : int
            This rank's number in ``names``.
        names : sequence of str
            Every rank's doorbell.
        token : bytes
            The group's secret; a visitor without it, or of another user, is turned away.
        timeout : float
            Seconds to wait for any peer.

        Returns
        -------
        dict of int to (int, int)
            For every other rank its window and its pidfd (-1 where there is none); the caller closes both.

        Raises
        ------
        RankFailure
            A peer did not answer.
        """
        calls: dict[int, socket.socket] = {}
        found: dict[int, tuple[int, int]] = {}
        waiting = set(range(len(names))) - {rank}
        try:
            for peer in sorted(waiting):
                call = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                calls[peer] = call
                call.settimeout(timeout)
                call.connect("\0" + names[peer])
                call.sendall(token + struct.pack("<i", rank))
            self._socket.settimeout(timeout)
            served: set[int] = set()
            while served != waiting:
                visitor, _ = self._socket.accept()
                with visitor:
                    visitor.settimeout(timeout)
                    peer_token, peer = _hello(visitor, len(token))
                    if _credentials(visitor)[1] != os.geteuid() or not secrets.compare_digest(peer_token, token):
                        continue
                    socket.send_fds(visitor, [b"w"], [fd])
                    served.add(peer)
            for peer, call in calls.items():
                _, fds, _, _ = socket.recv_fds(call, 1, 1)
                if len(fds) != 1:
                    raise RankFailure(peer, "rendezvous", "it sent no window")
                found[peer] = (fds[0], _pidfd(_credentials(call)[0]))
        except OSError as error:
            for window, pidfd in found.values():
                os.close(window)
                if pidfd >= 0:
                    os.close(pidfd)
            missing = sorted(waiting - set(found)) or sorted(waiting)
            raise RankFailure(missing[0], "rendezvous", f"no window from it ({error})") from error
        finally:
            for call in calls.values():
                call.close()
        return found

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _hello(visitor: socket.socket, size: int) -> tuple[bytes, int]:
    data = b""
    while len(data) < size + 4:
        part = visitor.recv(size + 4 - len(data))
        if not part:
            return b"", -1
        data += part
    return data[:size], struct.unpack("<i", data[size:])[0]


def _credentials(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # another pid namespace: only timeouts tell
