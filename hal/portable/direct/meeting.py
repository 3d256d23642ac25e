"""How the ranks of a call meet on their devices, and what the host does when they do not."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    SLOTS,
    UNKNOWN,
    WINDOW,
    WRONG,
    Addresses,
    Told,
    board_bytes,
    wrong,
)
from hal.portable.direct.kernels import AGREE, RING, DirectKernels, Staging, Turn, address_of, signed
from hal.portable.direct.receive import Beside, Follow, Receive, Routes, join_all
from hal.portable.ep_post import MAIN, Operation
from hal.portable.ep_slots import SlotCalls
from hal.portable.ep_windows import Lease
from hal.portable.runtime import MeetingDevice, Memory, Queue, SharingDevice
from hal.spec.errors import DeviceError, RankFailure, SpecError

KINDS: Final = ("open", "refuse", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
"""What headers say that a call is, by number."""
_FIELDS: Final[Mapping[str, Fields]] = {
    "dispatch": DISPATCH_FIELDS,
    "combine": COMBINE_FIELDS,
    "low_latency_dispatch": PACKED_FIELDS,
    "low_latency_combine": PACKED_COMBINE_FIELDS,
}
_DAMAGED: Final = "its header is damaged"
_SOON: Final = 0.001
"""Seconds for which the host does nothing but look whether all ranks have met."""
_LONG: Final = 0.1
"""Seconds after which it waits for the kernels themselves."""
NAP: Final = 0.0002
_MOST_UNFINISHED: Final = RING - 8
"""Calls after one that this rank has not finished. That so many were made is said as calls say what is wrong, for which
there must be places in the ring."""


class MeetingCalls(SlotCalls):
    """Publishing a call, and meeting the others."""

    _kernels: DirectKernels

    def _kernels_on(self, device: SharingDevice) -> DirectKernels:
        return DirectKernels(cast(MeetingDevice, device))

    def _made(self) -> Message:
        near, device = self._near, self._args.device
        self._board = self._windows.take(board_bytes(near.ranks))
        mail = self._kernels.device.mailbox(SLOTS * Told.size(near.ranks)).view(SLOTS, -1)
        self._told = [Told(words, near.ranks) for words in mail]
        self._reads = np.zeros((RING, near.ranks), np.int32)
        self._addresses = Addresses(near.ranks, device)
        self._counter = self._kernels.device.mailbox(1)
        self._pending: dict[int, weakref.ref[Finish]] = {}
        self._besides: list[tuple[weakref.ref[Finish], Beside]] = []
        # A buffer may be forgotten without being closed.
        weakref.finalize(self, join_all, self._besides).atexit = False
        self._places: list[int | None] = [None] * RING
        return {"board": self._board.number}

    def _learned(self, op: Operation, letters: Mapping[int, Message]) -> None:
        windows = [self._window_of(op, peer, letters[peer]["board"]) for peer in range(self._near.ranks)]
        kernels, near = self._kernels, self._near
        kernels.here, kernels.ranks = near.here, near.ranks
        boards = torch.tensor([address_of(window.memory) for window in windows], dtype=torch.int64, device="cpu")
        kernels.boards = boards.to(self._args.device)
        kernels.windows = self._addresses.table

    def _publish(
        self,
        op: Operation,
        staging: Staging,
        fields: Sequence[int],
        stage: Callable[[Queue, int], None],
        argument: str = "x",
    ) -> Queue:
        """Stage what ``stage`` writes to the address it is given, and tell everybody."""
        self._look_at_replays()
        self._let_go()
        oldest = next(iter(self._pending), op.number)
        if op.number - oldest >= _MOST_UNFINISHED:
            got = f"{op.number - oldest} calls after one that rank {self._args.rank} has not finished"
            legal = "that one finished first: wait for its event, run its hook, or let go of its result"
            raise self._refused(op, SpecError(op.kind, got, legal))
        self._take_place(op)
        lease = self._lease(op, staging, argument)
        queue = self._kernels.device.queue()
        if lease is not None:
            stage(queue, address_of(lease.window.memory))
        number = 0 if lease is None else lease.number
        self._kernels.announce(queue, Turn.of(op.number), KINDS.index(op.kind), number, staging.count, fields)
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
        self._know(lease)
        self._show(op)
        return lease

    def _know(self, lease: Lease) -> None:
        here = self._near.here
        if self._addresses.size(here, lease.number) is None:
            self._learn(here, lease.number, address_of(lease.window.memory), lease.size)

    def _show(self, op: Operation, **more: str) -> None:
        """Tell all others of windows that were made since."""
        told, files = self._windows.announcement()
        if told or more:
            for peer in self._peers:
                self._tell(op.kind, peer, {"shown": told, **more}, files)

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

    def _receive(self, op: Operation, staging: Staging, most: int, follow: Follow, routes: Routes = 0) -> Receive:
        """What is to be launched for a call."""
        told = self._told[op.number % RING]
        return Receive(self._kernels, Turn.of(op.number), told, staging, most, follow, routes)

    def _meet(self, op: Operation, receive: Receive, staging: Staging, waits: Tensor | None = None) -> Queue:
        """Launch the wait for all ranks and what follows it, again while some are late, until all agree.

        Raises
        ------
        SpecError
            The ranks make different calls; the same on all of them.
        RankFailure
            A rank does not come, or what it says cannot be.
        """
        told, kernels = self._told[op.number % RING], self._kernels
        queue = receive.launch() if receive.queue is None else receive.join()

        def missing() -> list[int]:
            nonlocal queue
            queue.finish()
            untold = told.missing(op.number)
            # Of a rank that is gone nothing more will come: what the kernels see now is what there is.
            if untold and time.monotonic() < patience and not self._lines.gone:
                return untold
            if untold:
                # They have had time to end, or have failed, which this would say.
                kernels.finish(queue)
            left = [peer for peer, outcome in enumerate(told.outcomes()) if outcome in (LATE, UNKNOWN, OUTSIDE)]
            for peer in left:
                if told.outcomes()[peer] != LATE:
                    most = None if receive.grows else receive.most
                    receive.most = max(receive.most, self._promised(op, peer, told.head(peer), staging, most))
            if left:
                queue.finish()
                queue = receive.launch()
            return left

        end = time.monotonic() + _SOON
        patience = end + _LONG
        while waits is None and not told.complete(op.number) and time.monotonic() < end:
            queue.finish()
        if waits is not None or not told.complete(op.number) or any(one != MET for one in told.outcomes()):
            self._wait(op, "receive", missing, waits, NAP)
            self._look_closer(op, told, receive.met, queue)
        elif self._failure is not None:
            raise self._failure
        self._note_reads(told)
        return queue

    def _promised(self, op: Operation, peer: int, head: list[int], staging: Staging, most: int | None) -> int:
        """How many rows a rank has, whose window is not known to kernels yet or which has more than there is room for.

        Raises
        ------
        RankFailure
            It says what cannot be.
        """
        number, count = head[WINDOW], head[COUNT]
        if self._addresses.size(peer, number) is None:
            # It has told of its windows before it spoke of them.
            self._listen(0)
        size = self._addresses.size(peer, number)
        if size is None:
            raise self._fail(self._lost(op, peer, f"it speaks of a window {number} that it has not shown"))
        outside = count < 0 or replace(staging, count=count).size > size
        if outside or (most is not None and count > most):
            raise self._fail(self._lost(op, peer, f"its {count} rows lie outside its window, or are too many"))
        return count

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
        silent = [peer for peer, head in enumerate(heads) if head[KIND] == KINDS.index("refuse")]
        letters = dict(self._await_letters(op, MAIN, silent)) if silent else {}
        for peer, head in enumerate(heads):
            if peer not in letters:
                letters[peer] = self._letter_of(op, peer, head)
        error = self._disagreement(letters, _FIELDS.get(op.kind, ()))
        self._kernels.done(queue, Turn.of(op.number), met, True)
        queue.finish()
        self._done(op)
        assert error is not None, "headers differ in what they do not say"
        raise error

    def _letter_of(self, op: Operation, peer: int, head: list[int]) -> Message:
        """What a header says.

        Raises
        ------
        RankFailure
            No rank says so.
        """
        kind = KINDS[head[KIND]] if 0 <= head[KIND] < len(KINDS) else ""
        try:
            shown = [show for _, show in _FIELDS[kind]]
            fields, more = head[FIELDS : FIELDS + len(shown)], head[FIELDS + len(shown) : FIELDS + AGREE]
            for show, value in zip(shown, fields, strict=True):
                show(value)
            if any(more):
                raise LookupError("words of no meaning")
            letter: Message = {"kind": kind, "fields": fields}
            if head[WRONG]:
                letter["refused"] = self._what_is_wrong(head[WRONG], self._near.first + peer)
        except LookupError:
            raise self._fail(self._lost(op, peer, _DAMAGED)) from None
        return letter

    def _what_is_wrong(self, found: int, rank: int) -> list[str]:
        experts = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
        routes = "what the dispatch of this handle was given, or -1"
        return {
            1: ["topk_idx", f"an expert out of range on rank {rank}", experts],
            2: ["topk_idx", f"other routes on rank {rank}", routes],
        }[found]

    def _refused(self, op: Operation, error: SpecError) -> SpecError:
        """Take part in the call by saying that it was refused here."""
        self._let_go()
        self._take_place(op)
        self._post(op, {"refused": [error.argument, str(error.got), str(error.legal)]})
        # No two of these agree, so that nobody takes a call that all refuse for one that all make.
        mine = (self._near.here + 1,)
        self._kernels.announce(self._kernels.device.queue(), Turn.of(op.number), KINDS.index("refuse"), 0, 0, mine)

        def alone(queue: Queue, met: Memory | int) -> None:
            self._kernels.done(queue, Turn.of(op.number), met, False)

        nothing = Staging(0, 0)
        try:
            self._meet(op, self._receive(op, nothing, 0, alone), nothing).finish()
        except SpecError as agreed:
            return agreed
        self._done(op)
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

    def _later(self, op: Operation, body: Callable[[], None], ahead: Receive | None = None) -> Finish:
        """What completes a call; if it is let go of instead, `_let_go` does what the other ranks need.

        What is to be received ahead of it is launched now, beside the caller's stream.
        """
        begun = self._kernels.stream

        def whole() -> None:
            self._pending.pop(op.number, None)
            last = self._kernels.last
            body()
            if self._kernels.last is not last and self._kernels.stream != begun:
                # The call's memory is freed in the order of the stream that was current then.
                self._kernels.settle()

        finish = self._finish(op, whole)
        self._pending[op.number] = weakref.ref(finish)
        if ahead is not None:
            ahead.launch_beside()
            self._keep(finish, ahead.beside)
        return finish

    def _keep(self, finish: Finish, beside: Beside | None) -> None:
        """Keep what is under way beside the caller's stream until it was waited for, if only by `_let_go`."""
        if beside is not None:
            self._besides.append((weakref.ref(finish), beside))

    def _note_reads(self, told: Told) -> None:
        # As it is from now on: later calls that end so tell more.
        self._reads = told.reads()
        for number in list(self._staged):
            if self._all_have_read(number):
                self._windows.give_back(self._staged.pop(number)[0])

    def _all_have_read(self, number: int) -> bool:
        # Whoever lets go of the call that has the place next may do so before this rank has made it.
        there = (signed(number), signed(number + RING))
        return all(read in there for read in self._reads[number % RING].tolist())

    def _end(self) -> None:
        # What this rank has announced is to be seen by those who hear next that it is gone.
        with contextlib.suppress(DeviceError):
            self._kernels.settle()
        self._besides.clear()
        super()._end()

    def _look_at_replays(self) -> None:
        """Raise what went wrong where no host looked."""

    def _let_go(self) -> None:
        """Of calls that nobody will finish: what was staged for them is not read, and what is under way is let end."""
        for finish, beside in self._besides:
            if finish() is None:
                beside.join()
        self._besides[:] = [one for one in self._besides if not one[1].joined]
        for number, finish in list(self._pending.items()):
            if finish() is None:
                del self._pending[number]
                queue = self._kernels.device.queue()
                self._kernels.done(queue, Turn.of(number), 0, True)
                queue.finish()

    def _take_place(self, op: Operation) -> None:
        """Wait until all ranks have finished the call whose header this one's takes the place of.

        Raises
        ------
        RankFailure
            It is this rank that has not, whatever it was told.
        """
        before = self._places[op.number % RING]
        if before is not None and before != op.number and not self._all_have_read(before):
            unfinished = self._pending.get(before)
            if unfinished is not None and unfinished() is not None:
                reason = f"it has made {op.number - before} calls after one that it has not finished"
                raise self._fail(RankFailure(self._args.rank, op.kind, reason))
            self._wait(op, "post", lambda: self._unfinished_by(before), None, NAP)
        self._places[op.number % RING] = op.number
        board = address_of(self._board.window.memory)
        self._kernels.wrong = wrong(board, self._near.ranks, op.number % RING)

    def _unfinished_by(self, before: int) -> list[int]:
        """Ranks that have not read a call, as the board says now."""
        self._let_go()
        told, queue = self._told[before % RING], self._kernels.device.queue()
        memory, (met,) = self._kernels.carved(2 * 3 * self._near.ranks)
        told.clear(before)
        seen = queue.write(told.words, partly=True)[0]
        self._kernels.await_all(queue, Turn.of(before), memory, met, seen, 0, Staging(0, 0))
        self._kernels.finish(queue)
        self._note_reads(told)
        later = signed(before + RING)
        reads = self._reads[before % RING].tolist()
        return [rank for rank, read in enumerate(reads) if read not in (signed(before), later)]
