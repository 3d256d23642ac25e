"""Rooms of the low-latency mode.

Every rank has two rooms for each neighbour, lent to it in turn: whoever has sent into one has to hear that its rows
were taken out before it sends there again. Rooms are of fixed size, so that nothing is asked before rows are sent.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from hal.ep.lines import Message
from hal.ep.streams import current_stream
from hal.portable.ep_normal import NormalCalls
from hal.portable.ep_post import GRANT, MAIN, Operation
from hal.portable.ep_routes import Routes
from hal.portable.ep_rows import Place
from hal.portable.ep_slots import ROOMS
from hal.portable.runtime import Memory
from hal.spec.ep import SCALE_GROUP


class Rooms(NormalCalls):
    """Who may send where."""

    def _made(self) -> Message:
        self._free_rooms = [list(range(ROOMS)) for _ in range(self._near.ranks)]
        self._unread: set[int] = set()
        self._unfinished: dict[int, weakref.ref[object]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._rooms = []
        if "low_latency" in self._args.modes:
            self._rooms = [self._windows.take(self._near.ranks * self._room_size) for _ in range(ROOMS)]
        return super()._made() | {"rooms": [room.number for room in self._rooms]}

    def _learned(self, op: Operation, letters: Mapping[int, Message]) -> None:
        super()._learned(op, letters)
        self._rooms_at = [
            [self._window_of(op, peer, number) for number in letters[peer]["rooms"]] for peer in range(self._near.ranks)
        ]

    @property
    def _capacity(self) -> int:
        """Rows that one neighbour sends at most."""
        return self._near.sources * self._args.max_tokens_per_rank

    @property
    def _room_size(self) -> int:
        """Bytes for one neighbour, whatever it sends: calls that differ are to end in an error and nothing worse."""
        args = self._args
        words = -(-args.hidden // SCALE_GROUP) + 1 + args.topk
        return Place.size(self._capacity, args.hidden * args.dtype.itemsize, words)

    def _place(self, memory: Memory, sender: int, row: int, aux: int) -> Place:
        return Place(memory, self._capacity, row, aux, at=sender * self._room_size)

    def _send_rows(self, op: Operation, routes: Routes, x: Tensor, aux: Tensor, rooms: list[int | None]) -> None:
        """Send into the rooms; wait first for those that are not free yet."""
        self._resume(op)
        late = [peer for peer, room in enumerate(rooms) if room is None]
        self._wait(op, "post", lambda: [peer for peer in late if not self._free_rooms[peer]], None, self._args.timeout)
        for peer in late:
            rooms[peer] = self._free_rooms[peer].pop(0)
        if late:
            for peer in late:
                letter = {"op": op.number, "round": GRANT, "windows": [], "room": rooms[peer]}
                if peer == self._near.here:
                    self._heard(peer, letter, [])
                else:
                    self._tell(op.kind, peer, letter)
        row, width = x.shape[1] * x.itemsize, aux.shape[1]
        into = [
            self._place(self._rooms_at[peer][room or 0].memory, self._near.here, row, width)
            for peer, room in enumerate(rooms)
        ]
        queue = self._kernels.device.queue()
        self._push(queue, op, routes, x, aux, into)
        queue.finish()

    def _put_off(self, job: Callable[[], None]) -> Future[None]:
        stream = current_stream(self._args.device)

        def run() -> None:
            self._worker = threading.get_ident()
            with self._lock, self._blamed("low_latency_dispatch"), stream:
                job()

        self._pool = self._pool or ThreadPoolExecutor(1, "hal-ep-rows")
        return self._pool.submit(run)

    def _empty(self, op: Operation, peer: int, room: int) -> None:
        """Let a neighbour have its room again."""
        if peer == self._near.here:
            self._free_rooms[peer].append(room)
        else:
            self._tell(op.kind, peer, {"free": room})

    def _heard(self, peer: int, message: Message, files: list[int]) -> None:
        if "free" in message:
            self._free_rooms[peer].append(int(message["free"]))
        else:
            super()._heard(peer, message, files)

    def _void(self, op: Operation) -> None:
        super()._void(op)
        self._unread.add(op.number)
        self._return_rooms()

    def _return_rooms(self) -> None:
        """Of calls that nobody will finish: what was sent to them is not read."""
        for number, state in list(self._unfinished.items()):
            if state() is None:
                del self._unfinished[number]
                self._unread.add(number)
        for number in sorted(self._unread):
            for kind in (MAIN, GRANT):
                for peer, letter in list(self._letters.get((number, kind), {}).items()):
                    room = letter.pop("room", None)
                    if room is not None:
                        self._empty(Operation(number, "low_latency_dispatch", 0.0, {}), peer, room)

    def close(self) -> None:
        """End what was put off, too."""
        super().close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
