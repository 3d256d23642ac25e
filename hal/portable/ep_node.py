"""What every call of the portable engine stands on: neighbours, letters, flags, windows, and what goes wrong.

A call is one numbered operation on every rank. Ranks write each other letters (`hal.ep.lines`): what the call is, how
many rows go where, which window is for them. Rows move by kernels, through windows; a flag in the receiver's window
tells it that they are there. A rank waits for letters and flags, never for a rank to finish.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from hal.ep.engine import Finish
from hal.ep.fields import OPERATIONS, Fields, differing
from hal.ep.layout import count_layout
from hal.ep.lines import Lines, Message
from hal.ep.neighbours import Neighbours, introduced
from hal.ep.relay import NodeEngine
from hal.ep.rendezvous import agree
from hal.portable.ep_kernels import EpKernels
from hal.portable.ep_windows import Lease, Windows
from hal.portable.runtime import SharingDevice, Window
from hal.spec.ep import EpBufferArgs, EpLayout
from hal.spec.errors import DeviceError, RankFailure, SpecError

_FLAG: Final = 16
"""Words from one flag to the next."""
_NAPS: Final = (0.0002, 0.002)
_SHARE: Final = 0.85
"""Of the timeout, after which a rank is given up: it is to be named within it."""
_RECORDS: Final = 64
MAIN, AGAIN, GRANT = range(3)
"""Rounds of letters: what the call is; fewer rows; a window that was made for it."""


_parting: list[NodeCalls] = []
"""Closed buffers whose windows others may still have open: a driver's IPC memory must not be freed before."""


def _part() -> None:
    _parting[:] = [one for one in _parting if not one._parted()]


@dataclass(slots=True, eq=False)
class Operation:
    """One call under way.

    Attributes
    ----------
    number : int
    kind : str
    begin : float
    expected : list of int
        Rows awaited from each neighbour.
    expert : list of int
        The first expert they are for, -1 where there is none.
    record : dict
        Of the flight recorder.
    """

    number: int
    kind: str
    begin: float
    record: dict[str, Any]
    expected: list[int] = field(default_factory=list)
    expert: list[int] = field(default_factory=list)


class NodeCalls(NodeEngine):
    """One rank's end of a buffer whose ranks, those of a node, are processes of this machine.

    Parameters
    ----------
    args : EpBufferArgs
    device : SharingDevice

    Raises
    ------
    SpecError
        The ranks of the node do not share a machine.
    RankFailure
        A rank did not come to the rendezvous.
    DeviceError
        The device shares no memory.
    """

    def __init__(self, args: EpBufferArgs, device: SharingDevice) -> None:
        _part()
        self._args = args
        self._owner = object()
        self._kernels = EpKernels(device)
        self._near = near = Neighbours(args)
        self._windows = Windows(device)
        self._lock = threading.RLock()
        self._job: Future[None] | None = None
        self._number = 0
        self._letters: dict[tuple[int, int], dict[int, Message]] = {}
        self._staged: dict[int, tuple[Lease, set[int]]] = {}
        self._failure: RankFailure | None = None
        self._closed = False
        self._records: deque[dict[str, Any]] = deque(maxlen=_RECORDS)
        with introduced(args, near) as met:
            self._lines = Lines(near.here, met.trade)
            failure: dict[str, Any] = {}
            try:
                self._open(device, met.exchange)
            except RankFailure as error:
                met.exchange.leave(error)
                raise
            except DeviceError as error:
                failure = {"device": SpecError("device", str(error), "one whose memory the ranks of a node can share")}
            agree(met.exchange, failure)

    def _open(self, device: SharingDevice, exchange: Any) -> None:
        near = self._near
        self._flags = self._windows.take(4 * _FLAG * near.ranks)
        self._opened = opening = self._begin("open")
        self._post(opening, self._opening())
        letters = self._await_letters(opening)
        self._peer_flags: list[Window] = [
            self._window_of(opening, peer, letters[peer]["flags"]) for peer in range(near.ranks)
        ]

    def _opening(self) -> Message:
        """What peers must know before the first call."""
        return {"flags": self._flags.number}

    @property
    def owner(self) -> object:
        """Identity of this engine."""
        return self._owner

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count in torch."""
        return count_layout(self._args, topk_idx)

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Post the error in place of the call."""
        with self._calling():
            op = self._begin("refuse")
            return self._refused(op, error)

    def _refused(self, op: Operation, error: SpecError) -> SpecError:
        self._post(op, {"refused": [error.argument, str(error.got), str(error.legal)]})
        try:
            self._agreed(op, self._await_letters(op), ())
        except SpecError as agreed:
            return agreed
        finally:
            self._done(op)
        return error

    def set_mask(self, rank: int, masked: bool) -> None:
        """Not declared."""
        raise NotImplementedError

    def masked(self) -> Sequence[bool]:
        """Nobody."""
        return [False] * self._args.num_ranks

    def records(self) -> Sequence[Mapping[str, object]]:
        """The last operations of this rank."""
        return list(self._records)

    def memory(self) -> Mapping[str, int]:
        """Of the windows."""
        return self._windows.bytes()

    def close(self) -> None:
        """Tell the peers, and let the windows go."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._windows.close_peers()
            for peer in self._peers:
                self._try_to_tell(peer, {"gone": "it closed its buffer"})
            _parting.append(self)
            _part()

    def _parted(self) -> bool:
        """Whether nobody uses this rank's windows any more; they are freed then."""
        if self._kernels.device.transport == "ipc":
            for peer, message, files in self._lines.listen(0):
                for file in files:
                    os.close(file)
                if "gone" in message:
                    self._lines.gone.setdefault(peer, "")
            if len(self._lines.gone) < self._near.ranks - 1:
                return False
        self._lines.close()
        self._windows.close()
        return True

    def _try_to_tell(self, peer: int, message: Message) -> None:
        with contextlib.suppress(RankFailure):
            self._lines.tell(peer, message, timeout=0.0)

    # Calls

    @property
    def _peers(self) -> Iterator[int]:
        return (peer for peer in range(self._near.ranks) if peer != self._near.here)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """One call at a time, after all that was put off before it."""
        job = self._job
        if job is not None and threading.get_ident() != getattr(self, "_worker", None):
            job.exception()
        with self._lock:
            if self._closed:
                raise SpecError("buffer", "a closed buffer", "one that is open")
            if self._failure is not None:
                raise self._failure
            yield

    def _begin(self, kind: str) -> Operation:
        number, self._number = self._number, self._number + 1
        record: dict[str, Any] = {
            "rank": self._args.rank,
            "operation": number,
            "kind": kind,
            "phase": "post",
            "waits_for": None,
            "expert": None,
            "expected": None,
            "received": None,
            "tokens": 0,
            "begin_ns": time.time_ns(),
            "microseconds": None,
        }
        self._records.append(record)
        return Operation(number, kind, time.monotonic(), record)

    def _done(self, op: Operation) -> None:
        op.record["phase"], op.record["waits_for"] = "done", None
        op.record["microseconds"] = (time.monotonic() - op.begin) * 1e6
        for kind in (MAIN, AGAIN, GRANT):
            self._letters.pop((op.number, kind), None)

    def _finish(self, op: Operation, body: Callable[[], None]) -> Finish:
        """What completes a posted call."""

        def run() -> None:
            with self._calling():
                try:
                    body()
                finally:
                    self._done(op)

        return run

    # Letters

    def _post(
        self, op: Operation, letter: Message, kind: int = MAIN, own: Callable[[int], Message] | None = None
    ) -> None:
        """Write to every neighbour, oneself included; ``own`` adds what is for one alone."""
        told, files = self._windows.announcement()
        letter = {"op": op.number, "round": kind, "kind": op.kind, "windows": told, **letter}
        for peer in range(self._near.ranks):
            mine = letter if own is None else {**letter, **own(peer)}
            if peer == self._near.here:
                self._letters.setdefault((op.number, kind), {})[peer] = mine
            else:
                self._tell(op.kind, peer, mine, files)

    def _tell(self, phase: str, peer: int, message: Message, files: Sequence[int] = ()) -> None:
        try:
            self._lines.tell(peer, message, files, self._args.timeout * _SHARE)
        except RankFailure as failure:
            raise self._fail(RankFailure(self._near.first + peer, phase, failure.reason)) from None

    def _listen(self, seconds: float) -> None:
        """Read what has come, or comes first within some time."""
        for peer, message, files in self._lines.listen(seconds):
            try:
                self._heard(peer, message, files)
            except (KeyError, TypeError, ValueError, DeviceError) as error:
                rank = self._near.first + peer
                raise self._fail(RankFailure(rank, "message", f"its message is damaged ({error})")) from None
            finally:
                for file in files:
                    os.close(file)

    def _heard(self, peer: int, message: Message, files: list[int]) -> None:
        if "op" in message:
            self._windows.learn(peer, message["windows"], files)
            self._letters.setdefault((message["op"], message["round"]), {})[peer] = message
        elif "read" in message:
            self._read_by(peer, message["read"])
        elif "failure" in message:
            rank, phase, reason = message["failure"]
            self._failure = self._failure or RankFailure(rank, phase, reason)
        elif "gone" in message:
            self._lines.gone.setdefault(peer, str(message["gone"]))
        else:
            raise ValueError("of no kind there is")

    def _await_letters(
        self, op: Operation, kind: int = MAIN, of: Sequence[int] | None = None, waits: Tensor | None = None
    ) -> dict[int, Message]:
        """Letters of a round, once all neighbours (or those) have written."""
        there = self._letters.setdefault((op.number, kind), {})
        wanted = range(self._near.ranks) if of is None else of
        self._wait(op, "post", lambda: [peer for peer in wanted if peer not in there], waits, self._args.timeout)
        return there

    def _agreed(self, op: Operation, letters: Mapping[int, Message], fields: Fields) -> None:
        """See that all ranks make the same call.

        Raises
        ------
        SpecError
            The same on all of them.
        """
        wrong = self._disagreement(letters, fields)
        if wrong is not None:
            self._void(op)
            raise wrong

    def _disagreement(self, letters: Mapping[int, Message], fields: Fields) -> SpecError | None:
        first = self._near.first
        for peer in range(self._near.ranks):
            if "refused" in letters[peer]:
                return SpecError(*letters[peer]["refused"])
        one = letters[0]
        for peer in range(1, self._near.ranks):
            other = letters[peer]
            if other["kind"] != one["kind"]:
                got = f"{other['kind']} on rank {first + peer}"
                return SpecError("call", got, f"{one['kind']}, as on rank {first}")
            for i, (value, wanted) in enumerate(zip(other["fields"], one["fields"], strict=True)):
                if value != wanted:
                    return differing(fields, i, value, first + peer, wanted, first)
        return None

    def _void(self, op: Operation) -> None:
        """Take back what was lent for a call that all ranks refuse."""
        self._unstage(op)

    def _window_of(self, op: Operation, peer: int, number: int) -> Window:
        if peer == self._near.here:
            return self._windows.own(number)
        found = self._windows.of(peer, number)
        if found is None:
            rank = self._near.first + peer
            raise self._fail(RankFailure(rank, op.kind, f"it speaks of a window {number} that it has not shown"))
        return found

    # Flags

    def _signal(self, queue: Any, op: Operation, only: Sequence[int] | None = None) -> None:
        """Once the queue has come this far, every neighbour's flag of this rank says so."""
        for peer in range(self._near.ranks) if only is None else only:
            self._kernels.signal(queue, self._peer_flags[peer].memory, self._near.here * _FLAG, op.number)

    def _await_flags(self, op: Operation, waits: Tensor | None = None) -> None:
        """Until every neighbour has told that its part of the operation is in its place."""

        def missing() -> list[int]:
            seen = self._kernels.seen(self._flags.window.memory, self._near.ranks, _FLAG, op.number, self._args.device)
            return [peer for peer, number in enumerate(seen) if number < op.number]

        self._wait(op, "receive", missing, waits, _NAPS[0])

    # Waiting, and failing

    def _wait(
        self, op: Operation, phase: str, missing: Callable[[], list[int]], waits: Tensor | None, nap: float
    ) -> None:
        """Until nobody is missing; ``waits`` counts microseconds for each rank of the group."""
        begin = time.monotonic()
        end = begin + self._args.timeout * _SHARE
        op.record["phase"] = phase
        self._listen(0)
        left = missing()
        while left:
            if self._failure is not None:
                raise self._failure
            gone = [peer for peer in left if peer in self._lines.gone]
            # It may have told before it went.
            if gone and (left := missing()) and gone[0] in left:
                raise self._fail(self._lost(op, gone[0], self._lines.gone[gone[0]]))
            now = time.monotonic()
            if now > end:
                raise self._fail(self._lost(op, left[0], f"nothing from it within {self._args.timeout:g} s"))
            op.record["waits_for"] = self._near.first + left[0]
            self._listen(min(nap, end - now + 0.001))
            nap = min(2 * nap, max(nap, _NAPS[1]))
            still = missing()
            if waits is not None:
                for peer in set(left).difference(still):
                    waits[self._near.first + peer] += round((time.monotonic() - begin) * 1e6)
            left = still
        op.record["waits_for"] = None
        if self._failure is not None:
            raise self._failure

    def _lost(self, op: Operation, peer: int, reason: str) -> RankFailure:
        rank = self._near.first + peer
        if op.record["phase"] != "receive" or not op.expected:
            return RankFailure(rank, op.kind, reason)
        expert = op.expert[peer] if op.expert[peer] >= 0 else None
        return RankFailure(rank, op.kind, reason, expert=expert, expected=op.expected[peer], received=0)

    def _fail(self, failure: RankFailure) -> RankFailure:
        """End this buffer: everybody hears of whose fault it is, at once and at every later call."""
        if self._failure is None:
            self._failure = failure
            for peer in self._peers:
                if self._near.first + peer != failure.rank:
                    self._try_to_tell(peer, {"failure": [failure.rank, failure.phase, failure.reason]})
        return self._failure

    # Staged rows

    def _stage(self, op: Operation, size: int) -> Lease | None:
        """Memory for rows that peers fetch."""
        if not size:
            return None
        lease = self._windows.take(size)
        self._staged[op.number] = (lease, set(range(self._near.ranks)))
        return lease

    def _unstage(self, op: Operation) -> None:
        """Nobody will fetch from it."""
        if op.number in self._staged:
            self._windows.give_back(self._staged.pop(op.number)[0])

    def _read(self, op: Operation) -> None:
        """Tell everybody that this rank has fetched what it needs."""
        for peer in self._peers:
            self._tell(op.kind, peer, {"read": op.number})
        self._read_by(self._near.here, op.number)

    def _read_by(self, peer: int, number: int) -> None:
        if number in self._staged:
            lease, readers = self._staged[number]
            readers.discard(peer)
            if not readers:
                del self._staged[number]
                self._windows.give_back(lease)


__all__ = ["AGAIN", "GRANT", "MAIN", "OPERATIONS", "NodeCalls", "Operation"]
