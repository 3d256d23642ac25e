"""What a call launches to receive: at once, or beside what its caller computes meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from hal.portable.direct.board import Told
from hal.portable.direct.kernels import DirectKernels, Staging, Turn
from hal.portable.runtime import Fork, MeetingDevice, Memory, Queue
from hal.spec.errors import DeviceError

_LONGER: Final = 8000
"""How often kernels look for a rank while nobody waits for them: some 10 ms. Who comes later is met by the hook."""

Follow = Callable[[Queue, Memory | int], None]
"""Launches what comes behind a meeting, on its queue; given where kernels are told of the peers."""
Routes = Callable[[int], int] | int
"""Where the routes of all ranks are to be written, or what makes room there for so many tokens of each."""


class Receive:
    """The wait for all ranks of a call and what follows it, launched as often as it takes.

    Parameters
    ----------
    kernels : DirectKernels
    turn : Turn
    told : Told
        Where the device tells the host what has become of the call.
    staging : Staging
    most : int
        Rows of a rank that there is room for.
    follow : Follow
        With the tensors it writes, but not what lets go of the call when it is forgotten.
    routes : Routes

    Attributes
    ----------
    memory : Memory
        Where kernels are told of the peers; given to them as it is, so that their queue keeps it.
    met : int
        Its address.
    queue : Queue or None
        On which everything was launched last.
    most : int
        As given; more where a rank was seen to have more, before it is launched again.
    beside : Beside or None
        Where it was launched beside the caller's stream.
    """

    __slots__ = (
        "_follow",
        "_kernels",
        "_routes",
        "_staging",
        "_told",
        "_turn",
        "beside",
        "memory",
        "met",
        "most",
        "queue",
    )

    def __init__(
        self,
        kernels: DirectKernels,
        turn: Turn,
        told: Told,
        staging: Staging,
        most: int,
        follow: Follow,
        routes: Routes = 0,
    ) -> None:
        self._kernels, self._turn, self._told, self._staging = kernels, turn, told, staging
        self.most, self._follow, self._routes = most, follow, routes
        self.memory, (self.met,) = kernels.carved(2 * 3 * kernels.ranks)
        self.queue: Queue | None = None
        self.beside: Beside | None = None

    @property
    def grows(self) -> bool:
        """Whether there is room made for more rows."""
        return callable(self._routes)

    def launch(self, turns: int | None = None) -> Queue:
        """On the current stream, looking for ranks so often."""
        kernels, told, routes = self._kernels, self._told, self._routes
        if not self._turn.epoch:
            told.clear(self._turn.call)
        self.queue = queue = kernels.device.queue()
        to = routes(self.most) if callable(routes) else routes or self.met
        seen = queue.write(told.words, partly=True)[0]
        # The memory itself, so that the queue keeps it until kernels are through with it.
        kernels.await_all(queue, self._turn, self.memory, to, seen, self.most, self._staging, turns)
        self._follow(queue, self.met)
        return queue

    def launch_beside(self, turns: int = _LONGER) -> None:
        """Likewise, beside what the caller's stream is given from now on, where the device can do that."""
        kernels = self._kernels
        # Of the table of windows there may be another by the time that kernels read this one.
        held = (self.memory, self._follow, kernels.windows)
        self.beside = Beside.launched(kernels.device, lambda: self.launch(turns), held)

    def join(self) -> Queue:
        """What was launched beside the caller's stream comes before what that is given now."""
        assert self.queue is not None
        if self.beside is not None:
            self.beside.join()
        return self.queue


class Beside:
    """What is under way beside a caller's stream, and what its kernels write and read.

    Parameters
    ----------
    fork : Fork
    held : object
        Kept until it is joined.
    """

    __slots__ = ("_fork", "_held")

    def __init__(self, fork: Fork, held: object) -> None:
        self._fork: Fork | None = fork
        self._held = held

    @classmethod
    def launched(cls, device: MeetingDevice, launch: Callable[[], object], held: object) -> Beside | None:
        """Launch something there; None, and nothing launched, where the device has no stream for it."""
        fork = device.fork()
        if fork is None:
            return None
        made = cls(fork, held)
        try:
            with fork:
                launch()
        except BaseException:
            # Some of it may be under way.
            made.join()
            raise
        return made

    @property
    def joined(self) -> bool:
        """Whether somebody has waited for it."""
        return self._fork is None

    def join(self) -> None:
        """See `Fork.join`; what it used may be forgotten then."""
        fork, self._fork = self._fork, None
        if fork is not None:
            fork.join()
        self._held = None


def join_all(besides: Iterable[tuple[object, Beside]]) -> None:
    """Of a buffer that is forgotten: memory is freed behind what still uses it."""
    for _, beside in besides:
        with contextlib.suppress(DeviceError):
            beside.join()
