"""Low-latency calls while a graph is captured: nothing that the host would have to look at when it is replayed.

Which round it is only the device counts. Two places on the boards and two windows serve all dispatches that are
captured, two all combines, in turns; before a window is written again all ranks have read what was in it, which the
device waits for. So graphs may be replayed in any order, the same on all ranks, on one stream. A rank that does not
come is waited for within the timeout; then the rows are not there, and the next call that is not captured raises,
whatever was replayed since.

A captured call tells nobody of itself, nor does its refusal: ranks that stay alike do so by making the same calls. What
a rank counts of them it counts from the last call that was not captured, which all have made.

Windows are put aside by the first call that is not captured, since a captured one cannot make any.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from hal.ep.engine import Finish, Untimely
from hal.ep.lines import Message
from hal.portable.direct.board import DIFFERS, LATE, MET, epoch, wrong
from hal.portable.direct.kernels import RING, Staging, Turn, address_of
from hal.portable.direct.meeting import KINDS, NAP, MeetingCalls
from hal.portable.direct.receive import Follow, Receive
from hal.portable.ep_post import Operation
from hal.portable.ep_windows import Lease
from hal.portable.runtime import Queue
from hal.spec.errors import DeviceError, RankFailure, SpecError

_KINDS: Final = ("low_latency_dispatch", "low_latency_combine")
_EACH: Final = 2
_NO_NUMBER: Final = -1


@dataclass(slots=True)
class Channel:
    """What captured calls of one kind share.

    Attributes
    ----------
    turn : Turn
    lease : Lease
    used : bool
        Whether any was captured.
    open : bool
        Whether one was captured whose rows nothing captured yet fetches.
    """

    turn: Turn
    lease: Lease
    used: bool = False
    open: bool = False


class CapturedCalls(MeetingCalls):
    """Publishing and pulling without the host."""

    def _made(self) -> Message:
        self._channels: dict[str, list[Channel]] = {}
        self._aside: dict[str, set[int]] = {kind: set() for kind in _KINDS}
        self._captured: Counter[str] = Counter()
        self._baked: list[Tensor] = []
        return super()._made()

    def _begin(self, kind: str) -> Operation:
        op = super()._begin(kind)
        if self._capturing:
            # Others may not make it: it is none of the calls that all count.
            self._number = op.number
            op.record["operation"] = _NO_NUMBER
            return replace(op, number=_NO_NUMBER)
        self._captured.clear()
        for channels in self._channels.values():
            for channel in channels:
                channel.open = False
        return op

    def _finish(self, op: Operation, body: Callable[[], None]) -> Finish:
        finish = super()._finish(op, body)

        def run() -> None:
            captured = op.number == _NO_NUMBER
            if self._capturing != captured:
                got = "run after the capture of its call" if captured else "run while a graph is captured"
                raise Untimely(f"{op.kind}: hook or event", got, "within the capture that its call is in, or in none")
            finish()

        return run

    @property
    def _capturing(self) -> bool:
        return self._kernels.device.capturing()

    def _put_aside(self, op: Operation, size: int) -> None:
        """Make what captured calls of this kind will need, once, and show it to the others."""
        kind = op.kind
        if kind in self._channels or not self._kernels.device.looks:
            return
        self._channels[kind] = []
        with contextlib.suppress(DeviceError):
            for one in range(_EACH):
                number = _KINDS.index(kind) * _EACH + one
                word = epoch(address_of(self._board.window.memory), self._near.ranks, number)
                lease = self._windows.take(size)
                self._know(lease)
                self._channels[kind].append(Channel(Turn(RING + number, 0, word), lease))
        self._show(op, aside=kind)

    def _heard(self, peer: int, message: Message, files: list[int]) -> None:
        super()._heard(peer, message, files)
        if message.get("aside"):
            self._aside[message["aside"]].add(peer)

    def _unshown(self, kind: str) -> list[int]:
        """Others that have not shown theirs."""
        return [peer for peer in self._peers if peer not in self._aside[kind]]

    def _see_all_aside(self, op: Operation) -> None:
        """Until all others have shown theirs, as each does before it makes the call."""
        if self._kernels.device.looks and self._unshown(op.kind):
            self._wait(op, "post", lambda: self._unshown(op.kind), None, NAP)

    def _require_not_captured(self, call: str) -> None:
        """Refuse what a graph cannot do, on this rank alone: a call that is captured tells nobody anything."""
        if self._capturing:
            legal = "low-latency calls alone: the host looks at what comes of others"
            raise SpecError(call, "a stream that is being captured", legal)

    def _begin_captured(self, op: Operation, staging: Staging, waits: Tensor | None) -> Channel:
        """The channel whose turn it is.

        Raises
        ------
        SpecError
            There is none: no call has put windows aside, or two are under way. It is too small. Or somebody wants to
            know who is waited for, which only a host can tell.
        """
        if waits is not None:
            raise SpecError(f"{op.kind}: wait_recv_cost_stats", "a tensor", "None while a graph is captured")
        channels = self._channels.get(op.kind, [])
        if len(channels) < _EACH:
            legal = f"{op.kind} once before, not captured: it puts aside the memory that captured calls share"
            scarce = "a captured call where there is no memory to put aside"
            raise SpecError(op.kind, scarce if op.kind in self._channels else "a captured call before any other", legal)
        self._listen(0)
        if self._unshown(op.kind):
            got = "a captured call before all ranks have shown the memory that they have put aside"
            raise SpecError(op.kind, got, "the call before it, not captured, finished: its hook or event first")
        channel = channels[self._captured[op.kind] % _EACH]
        if channel.open:
            got = f"a captured call while the one {_EACH} before it is not finished"
            raise SpecError(op.kind, got, "the hook or event of that one first, within the capture")
        if staging.size > channel.lease.size:
            raise SpecError(op.kind, f"{staging.size} bytes of rows", f"at most {channel.lease.size}")
        self._captured[op.kind] += 1
        channel.used = channel.open = True
        return channel

    def _publish_captured(
        self,
        op: Operation,
        channel: Channel,
        staging: Staging,
        fields: Sequence[int],
        stage: Callable[[Queue, int], None],
    ) -> None:
        """Wait for the window, stage, and tell everybody, all on the device."""
        kernels, queue = self._kernels, self._kernels.device.queue()
        kernels.wrong = wrong(address_of(self._board.window.memory), self._near.ranks, channel.turn.slot)
        kernels.begin(queue, channel.turn, self._turns)
        if staging.size:
            stage(queue, address_of(channel.lease.window.memory))
        kernels.announce(queue, channel.turn, KINDS.index(op.kind), channel.lease.number, staging.count, fields)
        queue.finish()

    def _receive_captured(
        self, channel: Channel, staging: Staging, most: int, follow: Follow, routes: int = 0
    ) -> Receive:
        """What is to be launched for a call, all of it on the device."""
        # A graph has the table's address in it for good, whatever newer one is made for windows that come.
        if not self._baked or self._baked[-1] is not self._kernels.windows:
            self._baked.append(self._kernels.windows)
        told = self._told[channel.turn.slot]
        return Receive(self._kernels, channel.turn, told, staging, most, follow, routes)

    def _meet_captured(self, channel: Channel, receive: Receive) -> None:
        """Wait for all ranks and do what follows, all on the device."""
        channel.open = False
        queue = receive.launch(self._turns) if receive.queue is None else receive.join()
        queue.finish()

    @property
    def _turns(self) -> int:
        return min(2**31 - 1, int(self._args.timeout * self._kernels.device.looks))

    def _look_at_replays(self) -> None:
        """Raise what went wrong when a graph was replayed.

        Raises
        ------
        RankFailure
        """
        for kind, channels in self._channels.items():
            for channel in channels:
                outcomes = self._told[channel.turn.slot].outcomes() if channel.used else []
                for peer, outcome in enumerate(outcomes):
                    if outcome not in (0, MET):
                        said = {LATE: f"nothing from it within {self._args.timeout:g} s", DIFFERS: "another call"}
                        reason = f"{said.get(outcome, 'rows outside its window')}, in a replayed graph"
                        raise self._fail(RankFailure(self._near.first + peer, kind, reason))
