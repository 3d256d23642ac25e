"""Opening and closing the portable engine, and what both modes' calls have in common."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from torch import Tensor

from hal.ep.engine import Finish
from hal.ep.layout import count_layout
from hal.ep.lines import Lines, Message
from hal.ep.neighbours import introduced
from hal.ep.rendezvous import by_all
from hal.portable.ep_post import FLAG, Operation, Posting
from hal.portable.ep_windows import Lease
from hal.portable.runtime import SharingDevice
from hal.spec.ep import EpBufferArgs, EpLayout
from hal.spec.errors import DeviceError, RankFailure, SpecError, UnsupportedError

_parting: list[NodeCalls] = []
"""Closed buffers whose windows others may still have open: a driver's IPC memory must not be freed before."""


def _part() -> None:
    _parting[:] = [one for one in _parting if not one._parted()]


class NodeCalls(Posting):
    """One rank's end of a buffer whose ranks, those of a node, are processes of this machine.

    Parameters
    ----------
    args : EpBufferArgs
    device : SharingDevice

    Raises
    ------
    SpecError
        The ranks of the node do not share a machine, or a device not its memory.
    RankFailure
        A rank did not come to the rendezvous.
    """

    def __init__(self, args: EpBufferArgs, device: SharingDevice) -> None:
        _part()
        super().__init__(args, device)
        self._owner = object()
        self._lock = threading.RLock()
        self._job: Future[None] | None = None
        self._worker = 0
        self._staged: dict[int, tuple[Lease, set[int]]] = {}
        self._calls = 0
        with introduced(args, self._near) as met:
            self._lines = Lines(self._near.here, met.trade)
            try:
                with by_all(met.exchange, args.rank):
                    mine = self._made()
                with by_all(met.exchange, args.rank):
                    op = self._begin("open")
                    self._post(op, mine)
                    self._learned(op, self._await_letters(op))
                    self._done(op)
                self._records.clear()
            except BaseException:
                self._lines.close()
                self._windows.close()
                raise

    def _made(self) -> Message:
        """Make what calls need; what peers must know of it."""
        self._flags = self._windows.take(4 * FLAG * self._near.ranks)
        return {"flags": self._flags.number}

    def _learned(self, op: Operation, letters: Mapping[int, Message]) -> None:
        """Open what the peers have made."""
        order = range(self._near.ranks)
        self._peer_flags = [self._window_of(op, peer, letters[peer]["flags"]) for peer in order]

    @property
    def owner(self) -> object:
        """Identity of this engine."""
        return self._owner

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count in torch."""
        return count_layout(self._args, topk_idx)

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Post the error in place of the call."""
        with self._calling(phase):
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

    def fail(self, failure: RankFailure) -> None:
        """See `NodeEngine.fail`."""
        with self._lock:
            self._fail(failure)

    def set_mask(self, rank: int, masked: bool) -> None:
        """Not written, and not declared."""
        raise UnsupportedError("portable", "mask_ranks", True, False)

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
            # From a signal's handler: the call that it interrupts ends first.
            if not self._calls:
                self._end()

    def _end(self) -> None:
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

    @contextmanager
    def _calling(self, phase: str) -> Iterator[None]:
        """One call at a time, after all that was put off before it; what goes wrong in it ends the buffer."""
        job = self._job
        if job is not None and threading.get_ident() != self._worker:
            job.exception()
        with self._lock:
            self._require_open()
            if self._failure is not None:
                raise self._failure
            self._calls += 1
            try:
                with self._blamed(phase):
                    yield
            finally:
                self._calls -= 1
                if self._closed and not self._calls:
                    self._end()

    def _finish(self, op: Operation, body: Callable[[], None]) -> Finish:
        """What completes a posted call."""

        def run() -> None:
            with self._calling(op.kind):
                self._resume(op)
                try:
                    body()
                finally:
                    self._done(op)

        return run

    def _stage(self, op: Operation, size: int) -> Lease | None:
        """Memory for rows that peers fetch."""
        if not size:
            return None
        try:
            lease = self._windows.take(size)
        except DeviceError as error:
            got = f"{size} bytes to stage on rank {self._args.rank} ({error})"
            raise self._refused(op, SpecError("x", got, "what fits in memory")) from None
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

    def _void(self, op: Operation) -> None:
        """Take back what was lent for a call that all ranks refuse."""
        super()._void(op)
        self._unstage(op)
