"""Short messages between the ranks of a node, and who of them is gone.

Every rank reads one socket; whoever holds its other end, handed over by `hal.ep.neighbours`, can write there. A message
comes whole or not at all, those of one rank in the order in which it sent them.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from hal.spec.errors import RankFailure

Message = dict[str, Any]
_LARGEST: Final = 1 << 20
_MOST_FILES: Final = 8


class Lines:
    """One rank's end.

    Parameters
    ----------
    rank : int
        Among its neighbours.
    trade : callable
        Gives a file to every neighbour; theirs, and their processes, by rank. See `Introduction.trade`.
    """

    def __init__(self, rank: int, trade: Callable[[int], dict[int, tuple[int, int]]]) -> None:
        self._rank = rank
        self._mine, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end:
            found = trade(end.fileno())
        self._ends = {peer: socket.socket(fileno=file) for peer, (file, _) in found.items()}
        self._processes = {process: peer for peer, (_, process) in found.items() if process >= 0}
        self.gone: dict[int, str] = {}
        self._over = False
        self._poll = select.poll()
        self._poll.register(self._mine, select.POLLIN)
        for process in self._processes:
            self._poll.register(process, select.POLLIN)
        for one in (self._mine, *self._ends.values()):
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)

    def tell(self, peer: int, message: Message, files: Sequence[int] = (), timeout: float = 1.0) -> None:
        """Send; what can no longer be read is nobody's loss.

        Raises
        ------
        RankFailure
            The peer, by its number among the neighbours, has not read what came before within ``timeout`` seconds, or
            the message is too long.
        """
        data = json.dumps([self._rank, message]).encode()
        sent = array.array("i", files).tobytes()
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)] if files else []
        end = time.monotonic() + timeout
        while True:
            try:
                self._ends[peer].sendmsg([data], extra)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RankFailure(peer, "message", "it does not read what it is told") from None
                select.select([], [self._ends[peer]], [], 0.05)
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as error:
                raise RankFailure(peer, "message", f"{len(data)} bytes for it cannot be sent ({error})") from error

    def listen(self, seconds: float) -> list[tuple[int, Message, list[int]]]:
        """What has come, or comes first within some time: from whom, what, and files that are the caller's to close."""
        found: list[tuple[int, Message, list[int]]] = []
        ready = self._poll.poll(max(0, round(1000 * seconds)))
        for file, _ in ready:
            if file in self._processes:
                self._poll.unregister(file)
                self.gone.setdefault(self._processes[file], "its process ended")
        # Whoever is gone may have said something before.
        while (one := self._next()) is not None:
            found.append(one)
        return found

    def _next(self) -> tuple[int, Message, list[int]] | None:
        if self._over:
            return None
        try:
            data, ancillary, _, _ = self._mine.recvmsg(_LARGEST, socket.CMSG_SPACE(4 * _MOST_FILES))
        except BlockingIOError:
            return None
        files = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                files.frombytes(content[: len(content) - len(content) % files.itemsize])
        if not data:
            # Nobody holds the other end any more.
            self._poll.unregister(self._mine)
            self._over = True
            for peer in self._ends:
                self.gone.setdefault(peer, "it hung up")
            return None
        rank, message = json.loads(data)
        return rank, message, list(files)

    def close(self) -> None:
        """Hang up. Idempotent."""
        for one in (self._mine, *self._ends.values()):
            one.close()
        for process in self._processes:
            os.close(process)
        self._ends, self._processes = {}, {}
