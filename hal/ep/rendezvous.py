"""How ranks find each other: agreement on the buffer over the group, and window files within a node.

A window is an anonymous file. Its descriptor travels over a unix socket with an unguessable abstract name, so nothing
has a name in any file system and nothing is left when the processes are gone, however they ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from hal.ep.engine import own_failure
from hal.ep.meeting import Meeting
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import DeviceError, RankFailure, SpecError, first_line


class Exchange(Protocol):
    """Gathers one picklable object of every rank, in rank order."""

    def __call__(self, mine: Any) -> list[Any]:
        """What all ranks gave, once they have.

        Raises
        ------
        RankFailure
            A rank does not come within the timeout, or left and told why.
        """

    def leave(self, failure: RankFailure) -> None:
        """Tell the others that this rank does not go on."""

    def told(self) -> RankFailure | None:
        """Why another rank does not go on, if one has told."""

    def store(self, name: str) -> Any:
        """A store that nobody else uses, for a library of torch.distributed; None where the group has none."""

    def communicator(self, timeout: float) -> Any:
        """Something to send and receive with that nobody else uses, and that no earlier timeout has broken."""


def exchange_over(group: Any, timeout: float) -> Exchange:
    """The exchange of a torch.distributed group, within ``timeout`` seconds; begins when it is first used.

    A group without a store has one timeout for everything, its own.
    """
    try:
        has_store = group.get_group_store() is not None
    except RuntimeError:
        has_store = False
    return _OverStore(group, timeout) if has_store else _OverGroup(group)


class _OverStore:
    def __init__(self, group: Any, timeout: float) -> None:
        self._group, self._timeout = group, timeout
        self._meeting: Meeting | None = None

    def __call__(self, mine: Any) -> list[Any]:
        return self._met().exchange(mine)

    def _met(self) -> Meeting:
        self._meeting = self._meeting or Meeting(self._group, self._timeout)
        return self._meeting

    def leave(self, failure: RankFailure) -> None:
        if self._meeting is not None:
            self._meeting.leave(failure)

    def told(self) -> RankFailure | None:
        with contextlib.suppress(RuntimeError):  # the store may be gone too
            return None if self._meeting is None else self._meeting.told()
        return None

    def store(self, name: str) -> Any:
        return PrefixStore(f"hal-ep/{self._met().name}/{name}", self._group.get_group_store())

    def communicator(self, timeout: float) -> Any:
        """Connections of its own over gloo, whatever the group's bytes go over.

        A timeout of gloo breaks all connections there are; and see `hal.ep.posts` of libraries of devices.
        """
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        return dist.ProcessGroupGloo(self.store("gloo"), rank, ranks, timedelta(seconds=timeout))


class _OverGroup:
    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def leave(self, failure: RankFailure) -> None:
        """The others come to it by the group's timeout."""

    def told(self) -> RankFailure | None:
        return None

    def store(self, name: str) -> Any:
        return None

    def communicator(self, timeout: float) -> Any:
        return self._group


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


@contextmanager
def by_all(exchange: Exchange, rank: int) -> Iterator[None]:
    """Do something that all ranks do, or none goes on.

    Raises
    ------
    SpecError
        On every rank, where one lacks memory or its device refuses.
    RankFailure
        What a rank came upon otherwise, on all others.
    """
    wrong: dict[str, Any] = {}
    try:
        yield
    except RankFailure as failure:
        exchange.leave(failure)
        raise
    except SpecError as error:
        wrong = {error.argument: error}
    except (DeviceError, OSError) as error:
        legal = "one whose memory the ranks of a node can share"
        wrong = {"device": SpecError("device", f"{error}, on rank {rank}", legal)}
    except BaseException as error:
        exchange.leave(own_failure(rank, "opening the buffer", error))
        raise
    agree(exchange, wrong)


def connected(args: EpBufferArgs) -> Any:
    """Connections of this buffer alone."""
    exchange = exchange_over(args.group, args.timeout)
    failure: dict[str, RankFailure] = {}
    exchange(None)
    try:
        group = exchange.communicator(args.timeout)
    except RuntimeError as error:
        reason = first_line(error)
        failure["group"] = RankFailure(args.rank, "opening the buffer", f"it cannot connect to all others ({reason})")
    agree(exchange, failure)
    return group


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
        late, end = waiting, time.monotonic() + timeout
        try:
            for peer in sorted(waiting):
                late = {peer}
                call = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                calls[peer] = call
                call.settimeout(timeout)
                call.connect("\0" + names[peer])
                call.sendall(token + struct.pack("<i", rank))
            late = set(waiting)
            while late:
                self._socket.settimeout(max(end - time.monotonic(), 0.001))
                visitor, _ = self._socket.accept()
                with visitor:
                    # Names are secret, yet the kernel lists them: another user is not even listened to.
                    if _credentials(visitor)[1] != os.geteuid():
                        continue
                    visitor.settimeout(timeout)
                    peer_token, peer = _hello(visitor, len(token))
                    if not secrets.compare_digest(peer_token, token):
                        continue
                    socket.send_fds(visitor, [b"w"], [fd])
                    late.discard(peer)
            for peer, call in calls.items():
                late = {peer}
                _, fds, _, _ = socket.recv_fds(call, 1, 1)
                if len(fds) != 1:
                    raise RankFailure(peer, "rendezvous", "it sent no window")
                found[peer] = (fds[0], _pidfd(_credentials(call)[0]))
        except (OSError, RankFailure) as error:
            for window, pidfd in found.values():
                os.close(window)
                if pidfd >= 0:
                    os.close(pidfd)
            if isinstance(error, RankFailure):
                raise
            raise RankFailure(min(late), "rendezvous", f"no window from it ({error})") from error
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
