"""How the ranks of a call meet on their devices, and what the host does when they do not."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from hal.ep.engine import Finish
from hal.ep.fields import COMBINE_FIELDS, DISPATCH_FIELDS, PACKED_COMBINE_FIELDS, PACKED_FIELDS, Fields
from hal.ep.lines import Message
from hal.portable.direct.board import (
    COUNT,
    DIFFERS,
    FIELDS,
    KIND,
    LATE,
    MET,
    OUTSIDE,
    UNKNOWN,
    WRONG,
    Addresses,
    Told,
    board_bytes,
    wrong,
)
from hal.portable.direct.kernels import RING, DirectKernels, Staging, address_of, signed
from hal.portable.ep_post import MAIN, Operation
from hal.portable.ep_slots import SlotCalls
from hal.portable.ep_windows import Lease
from hal.portable.runtime import MeetingDevice, Memory, Queue, SharingDevice
from hal.spec.errors import DeviceError, SpecError

_KINDS: Final = ("open", "refuse", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
_FIELDS: Final[Mapping[str, Fields]] = {
    "dispatch": DISPATCH_FIELDS,
    "combine": COMBINE_FIELDS,
    "low_latency_dispatch": PACKED_FIELDS,
    "low_latency_combine": PACKED_COMBINE_FIELDS,
}
_SOON: Final = 0.001
"""Seconds for which the host does nothing but look whether all ranks have met."""
_LONG: Final = 0.1
"""Seconds after which it waits for the kernels themselves."""
_NAP: Final = 0.0002

Follow = Callable[[Queue, int], None]
"""Launches what comes behind a meeting, on its queue; given where kernels are told of the peers."""
Routes = Callable[[int], int]
"""Makes room for the routes of all ranks, each of which has at most so many tokens: where they are to be written."""


class Met:
    """A call whose ranks have met.

    Attributes
    ----------
    at : int
        Where kernels are told of the peers.
    queue : Queue
        On which everything was launched.
    """

    __slots__ = ("_memory", "at", "queue")

    def __init__(self, memory: Memory, at: int, queue: Queue) -> None:
        self._memory, self.at, self.queue = memory, at, queue


class MeetingCalls(SlotCalls):
    """Publishing a call, and meeting the others."""

    _kernels: DirectKernels

    def _kernels_on(self, device: SharingDevice) -> DirectKernels:
        return DirectKernels(cast(MeetingDevice, device))

    def _made(self) -> Message:
        near, device = self._near, self._args.device
        self._board = self._windows.take(board_bytes(near.ranks))
        mail = self._kernels.device.mailbox(RING * Told.size(near.ranks)).view(RING, -1)
        self._told = [Told(words, near.ranks) for words in mail]
        self._reads = np.zeros((RING, near.ranks), np.int32)
        self._addresses = Addresses(near.ranks, device)
        self._counter = self._kernels.device.mailbox(1)
        self._pending: dict[int, weakref.ref[Finish]] = {}
        return {"board": self._board.number}

    def _learned(self, op: Operation, letters: Mapping[int, Message]) -> None:
        windows = [self._window_of(op, peer, letters[peer]["board"]) for peer in range(self._near.ranks)]
        kernels, near = self._kernels, self._near
        kernels.here, kernels.ranks = near.here, near.ranks
        boards = torch.tensor([address_of(window.memory) for window in windows], dtype=torch.int64)
        kernels.boards = boards.to(self._args.device)
        kernels.windows = self._addresses.table
        kernels.wrong = wrong(int(boards[near.here]), near.ranks)

    def _publish(
        self,
        op: Operation,
        staging: Staging,
        fields: Sequence[int],
        stage: Callable[[Queue, int], None],
        argument: str = "x",
    ) -> Queue:
        """Stage what ``stage`` writes to the address it is given, and tell everybody."""
        self._let_go()
        self._see_that_it_fits_the_ring(op)
        lease = self._lease(op, staging, argument)
        queue = self._kernels.device.queue()
        if lease is not None:
            stage(queue, address_of(lease.window.memory))
        number = 0 if lease is None else lease.number
        self._kernels.announce(queue, op.number, _KINDS.index(op.kind), number, staging.count, fields)
        return queue

    def _lease(self, op: Operation, staging: Staging, argument: str) -> Lease | None:
        if not staging.size:
            return None
        try:
            lease = self._windows.take(staging.size)
        except DeviceError as error:
            got = f"{staging.size} bytes to stage on rank {self._args.rank} ({error})"
            raise self._refused(op, SpecError(argument, got, "what fits in memory")) from None
        self._staged[op.number] = (lease, set(range(self._near.ranks)))
        here = self._near.here
        if not self._addresses.knows(here, lease.number):
            self._learn(here, lease.number, address_of(lease.window.memory), lease.size)
        told, files = self._windows.announcement()
        if told:
            for peer in self._peers:
                self._tell(op.kind, peer, {"shown": told}, files)
        return lease

    def _learn(self, peer: int, number: int, address: int, size: int) -> None:
        self._addresses.learn(peer, number, address, size)
        self._kernels.windows = self._addresses.table

    def _heard(self, peer: int, message: Message, files: list[int]) -> None:
        shown: list[Any] = message.get("shown") or message.get("windows") or []
        if "shown" in message:
            self._windows.learn(peer, shown, files)
        else:
            super()._heard(peer, message, files)
        for number, size, *_ in shown:
            window = self._windows.of(peer, number)
            assert window is not None
            self._learn(peer, number, address_of(window.memory), size)

    def _meet(
        self,
        op: Operation,
        staging: Staging,
        most: int,
        follow: Follow,
        routes: Routes | None = None,
        waits: Tensor | None = None,
    ) -> Met:
        """Launch the wait for all ranks and what follows it, again while some are late, until all agree.

        Raises
        ------
        SpecError
            The ranks make different calls; the same on all of them.
        RankFailure
            A rank does not come, or what it says cannot be.
        """
        told, kernels, ranks = self._told[op.number % RING], self._kernels, self._near.ranks
        memory, (met,) = kernels.carved(2 * 3 * ranks)
        launched: list[Queue] = []

        def launch() -> None:
            told.clear()
            queue = kernels.device.queue()
            launched[:] = [queue]
            to = met if routes is None else routes(most)
            seen = queue.write(told.words, partly=True)[0]
            kernels.await_all(queue, op.number, met, to, seen, most, staging)
            follow(queue, met)

        def missing() -> list[int]:
            nonlocal most
            launched[0].finish()
            untold = told.missing(op.number)
            # Of a rank that is gone nothing more will come: what the kernels see now is what there is.
            if untold and time.monotonic() < patience and not self._lines.gone:
                return untold
            if untold:
                # They have had time to end, or have failed, which this would say.
                kernels.finish(launched[0])
            left = [peer for peer, outcome in enumerate(told.outcomes()) if outcome in (LATE, UNKNOWN, OUTSIDE)]
            for peer in left:
                count = told.head(peer)[COUNT]
                if told.outcomes()[peer] == OUTSIDE:
                    if count <= most or self._args.overflow != "grow":
                        raise self._fail(self._lost(op, peer, "its rows lie outside its window"))
                    most = count
            if left:
                launched[0].finish()
                launch()
            return left

        launch()
        end = time.monotonic() + _SOON
        patience = end + _LONG
        while waits is None and not told.complete(op.number) and time.monotonic() < end:
            launched[0].finish()
        if waits is not None or not told.complete(op.number) or any(one != MET for one in told.outcomes()):
            self._wait(op, "receive", missing, waits, _NAP)
            self._look_closer(op, told, met, launched[0])
        elif self._failure is not None:
            raise self._failure
        self._note_reads(told)
        return Met(memory, met, launched[0])

    def _look_closer(self, op: Operation, told: Told, met: int, queue: Queue) -> None:
        """Raise what is wrong with a call that all ranks have made.

        Raises
        ------
        SpecError
            The same on all of them.
        """
        outcomes = told.outcomes()
        if DIFFERS not in outcomes:
            return
        heads = [told.head(peer) for peer in range(self._near.ranks)]
        silent = [peer for peer, head in enumerate(heads) if _KINDS[head[KIND]] == "refuse"]
        letters = dict(self._await_letters(op, MAIN, silent)) if silent else {}
        for peer, head in enumerate(heads):
            if peer in letters:
                continue
            kind = _KINDS[head[KIND]]
            letter: Message = {"kind": kind, "fields": head[FIELDS : FIELDS + len(_FIELDS[kind])]}
            if head[WRONG]:
                letter["refused"] = self._what_is_wrong(head[WRONG], self._near.first + peer)
            letters[peer] = letter
        error = self._disagreement(letters, _FIELDS.get(op.kind, ()))
        # Nobody reads what was staged; all have read what it was for.
        self._unstage(op)
        self._kernels.done(queue, op.number, met, True)
        queue.finish()
        self._done(op)
        assert error is not None, "headers differ in what they do not say"
        raise error

    def _what_is_wrong(self, found: int, rank: int) -> list[str]:
        if found == 1:
            legal = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
            return ["topk_idx", f"an expert out of range on rank {rank}", legal]
        return ["topk_idx", f"other routes on rank {rank}", "what the dispatch of this handle was given, or -1"]

    def _refused(self, op: Operation, error: SpecError) -> SpecError:
        """Take part in the call by saying that it was refused here."""
        self._let_go()
        self._see_that_it_fits_the_ring(op)
        self._post(op, {"refused": [error.argument, str(error.got), str(error.legal)]})
        # No two of these agree, so that nobody takes a call that all refuse for one that all make.
        mine = (self._near.here + 1,)
        self._kernels.announce(self._kernels.device.queue(), op.number, _KINDS.index("refuse"), 0, 0, mine)
        try:
            self._meet(op, Staging(0, 0), 0, nothing_follows)
        except SpecError as agreed:
            return agreed
        return error

    def _until_told(self, queue: Queue, words: Tensor, call: int) -> None:
        """Look until the device has written the call's number, as it does without waiting for anybody."""
        there, end = words.numpy(), time.monotonic() + _LONG
        queue.finish()
        while there[0] != signed(call):
            if time.monotonic() > end:
                self._kernels.finish(queue)
                if there[0] != signed(call):
                    raise DeviceError(f"ep_places: the device has not told what it counted for call {call}")

    def _later(self, op: Operation, body: Callable[[], None]) -> Finish:
        """What completes a call; if it is let go of instead, `_let_go` does what the other ranks need."""

        def whole() -> None:
            self._pending.pop(op.number, None)
            body()

        finish = self._finish(op, whole)
        self._pending[op.number] = weakref.ref(finish)
        return finish

    def _note_reads(self, told: Told) -> None:
        # As it is from now on: later calls that end so tell more.
        self._reads = told.reads()
        for number in list(self._staged):
            if self._all_have_read(number):
                self._windows.give_back(self._staged.pop(number)[0])

    def _all_have_read(self, number: int) -> bool:
        return bool((self._reads[number % RING] == signed(number)).all())

    def _end(self) -> None:
        # What this rank has announced is to be seen by those who hear next that it is gone.
        with contextlib.suppress(DeviceError):
            self._kernels.settle()
        super()._end()

    def _let_go(self) -> None:
        """Of calls that nobody will finish: what was staged for them is not read."""
        for number, finish in list(self._pending.items()):
            if finish() is None:
                del self._pending[number]
                queue = self._kernels.device.queue()
                self._kernels.done(queue, number, 0, True)
                queue.finish()

    def _see_that_it_fits_the_ring(self, op: Operation) -> None:
        """Wait until all ranks have finished the call whose header this one's takes the place of."""
        before = op.number - RING
        if before < 1 or self._all_have_read(before):
            return
        self._wait(op, "post", lambda: self._unfinished_by(before), None, _NAP)

    def _unfinished_by(self, before: int) -> list[int]:
        """Ranks that have not read a call, as the board says now."""
        told, queue = self._told[before % RING], self._kernels.device.queue()
        memory, (met,) = self._kernels.carved(2 * 3 * self._near.ranks)
        told.clear()
        seen = queue.write(told.words, partly=True)[0]
        self._kernels.await_all(queue, before, met, met, seen, 0, Staging(0, 0))
        self._kernels.finish(queue)
        del memory
        self._note_reads(told)
        return [int(rank) for rank in np.flatnonzero(self._reads[before % RING] != signed(before))]


def nothing_follows(queue: Queue, met: int) -> None:
    """A call that was refused."""
