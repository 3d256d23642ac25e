"""What every call of the portable engine stands on: neighbours, letters, flags, windows, and what goes wrong.

A call is one numbered operation on every rank. Ranks write each other letters (`hal.ep.lines`): what the call is, how
many rows go where, which window is for them. Rows move by kernels, through windows; a flag in the receiver's window
tells it that they are there. A rank waits for letters and flags, never for a rank to finish.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from hal.ep.engine import EpEngine, own_failure
from hal.ep.fields import Fields, differing
from hal.ep.lines import Lines, Message
from hal.ep.neighbours import Neighbours
from hal.portable.ep_kernels import EpKernels, before
from hal.portable.ep_windows import Lease, Windows
from hal.portable.runtime import ForeignWindow, SharingDevice, Window
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure, SpecError

FLAG: Final = 16
"""Words from one flag to the next."""
_NAPS: Final = (0.0002, 0.002)
_DOZE: Final = 0.1
"""Seconds after which a wait for letters looks up: the handler of a signal may have closed the buffer meanwhile."""
_SHARE: Final = 0.85
"""Of the timeout, after which a rank is given up: it is to be named within it."""
_RECORDS: Final = 64
MAIN, AGAIN, GRANT = range(3)
"""Rounds of letters: what the call is; fewer rows; a window that was made for it."""


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
    processors : int or None
        See `EpKernels`.
    """

    number: int
    kind: str
    begin: float
    record: dict[str, Any]
    expected: list[int] = field(default_factory=list)
    expert: list[int] = field(default_factory=list)
    processors: int | None = None


class Posting(EpEngine):
    """One rank's letters and flags.

    Parameters
    ----------
    args : EpBufferArgs
    device : SharingDevice
    """

    _lines: Lines
    _flags: Lease
    _peer_flags: list[Window]

    def __init__(self, args: EpBufferArgs, device: SharingDevice) -> None:
        self._args = args
        self._near = Neighbours(args)
        self._kernels = self._kernels_on(device)
        self._windows = Windows(device)
        self._number = 0
        self._letters: dict[tuple[int, int], dict[int, Message]] = {}
        self._failure: RankFailure | None = None
        self._closed = False
        self._records: deque[dict[str, Any]] = deque(maxlen=_RECORDS)

    def _kernels_on(self, device: SharingDevice) -> EpKernels:
        return EpKernels(device)

    @property
    def _peers(self) -> Iterator[int]:
        return (peer for peer in range(self._near.ranks) if peer != self._near.here)

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
        op = Operation(number, kind, time.monotonic(), record, processors=self._args.num_sms)
        self._resume(op)
        return op

    def _resume(self, op: Operation) -> None:
        """What is launched from now on is of this operation."""
        self._kernels.processors = op.processors

    def _done(self, op: Operation) -> None:
        op.record["phase"], op.record["waits_for"] = "done", None
        op.record["microseconds"] = (time.monotonic() - op.begin) * 1e6
        for kind in (MAIN, AGAIN, GRANT):
            self._letters.pop((op.number, kind), None)

    def _void(self, op: Operation) -> None:
        """Take back what was lent for a call that all ranks refuse."""

    def _read_by(self, peer: int, number: int) -> None:
        """Note that a neighbour has fetched what was staged for an operation."""

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
        heard = self._lines.listen(seconds)
        try:
            for peer, message, files in heard:
                try:
                    self._heard(peer, message, files)
                except (KeyError, TypeError, ValueError, ForeignWindow) as error:
                    rank = self._near.first + peer
                    raise self._fail(RankFailure(rank, "message", f"its message is damaged ({error})")) from None
        finally:
            for _, _, files in heard:
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
            self._lines.gone[peer] = str(message["gone"])  # its own words say more than that it hung up
        else:
            raise ValueError("of no kind there is")

    def _await_letters(
        self, op: Operation, kind: int = MAIN, of: Sequence[int] | None = None, waits: Tensor | None = None
    ) -> dict[int, Message]:
        """Letters of a round, once all neighbours (or those) have written."""
        there = self._letters.setdefault((op.number, kind), {})
        wanted = range(self._near.ranks) if of is None else of
        self._wait(op, "post", lambda: [peer for peer in wanted if peer not in there], waits, _DOZE)
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

    def _window_of(self, op: Operation, peer: int, number: int) -> Window:
        if peer == self._near.here:
            return self._windows.own(number)
        found = self._windows.of(peer, number)
        if found is None:
            rank = self._near.first + peer
            raise self._fail(RankFailure(rank, op.kind, f"it speaks of a window {number} that it has not shown"))
        return found

    def _signal(self, queue: Any, op: Operation, only: Sequence[int] | None = None) -> None:
        """Once the queue has come this far, every neighbour's flag of this rank says so."""
        for peer in range(self._near.ranks) if only is None else only:
            self._kernels.signal(queue, self._peer_flags[peer].memory, self._near.here * FLAG, op.number)

    def _await_flags(self, op: Operation, waits: Tensor | None = None) -> None:
        """Until every neighbour has told that its part of the operation is in its place."""

        def missing() -> list[int]:
            seen = self._kernels.seen(self._flags.window.memory, self._near.ranks, FLAG, op.number, self._args.device)
            return [peer for peer, number in enumerate(seen) if before(number, op.number)]

        self._wait(op, "receive", missing, waits, _NAPS[0])

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
            self._require_open()
            if self._failure is not None:
                raise self._failure
            gone = [peer for peer in left if peer in self._lines.gone]
            if gone:
                # It may have told before it went.
                left = missing()
                if gone[0] in left:
                    raise self._fail(self._lost(op, gone[0], self._lines.gone[gone[0]]))
                continue
            now = time.monotonic()
            if now > end:
                # After a stop it may be this rank that was waited for in vain.
                self._listen(0)
                if self._failure is not None:
                    raise self._failure
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

    def _require_open(self) -> None:
        if self._closed:
            raise SpecError("buffer", "a closed buffer", "one that is open")

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
            # Whoever is to blame too: it may only have been slow.
            for peer in self._peers:
                self._try_to_tell(peer, {"failure": [failure.rank, failure.phase, failure.reason]})
        return self._failure

    @contextmanager
    def _blamed(self, phase: str) -> Iterator[None]:
        """Of an error of this rank's own, as of its device, all ranks hear: the others would wait for it in vain."""
        try:
            yield
        except (SpecError, RankFailure):
            raise
        except BaseException as error:
            self._fail(own_failure(self._args.rank, phase, error)).__cause__ = error
            raise

    def _try_to_tell(self, peer: int, message: Message) -> None:
        with contextlib.suppress(RankFailure):
            self._lines.tell(peer, message, timeout=0.0)
