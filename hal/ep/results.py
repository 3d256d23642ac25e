"""What the calls of `hal.EpBuffer` return."""

from __future__ import annotations

import threading
from typing import NamedTuple

from torch import Tensor

from hal.ep.engine import Finish, Untimely
from hal.spec.ep import EpHandle, EpLowLatencyHandle


class EpCompletion:
    """Completion of a call: ``wait()`` it as an event, or call it as a receive hook; once or often, on any thread."""

    __slots__ = ("_error", "_finish", "_lock")

    def __init__(self, finish: Finish | None) -> None:
        self._finish = finish
        self._error: BaseException | None = None
        # Of two threads that wait neither may return before the rows are there. One that comes again while it waits, as
        # a signal's handler, is not to wait for itself.
        self._lock = threading.RLock()

    def wait(self) -> None:
        """Return when the call's results are complete; raise what it failed with."""
        with self._lock:
            finish, self._finish = self._finish, None
            if finish is not None:
                try:
                    finish()
                except Untimely:
                    self._finish = finish
                    raise
                except BaseException as error:
                    self._error = error
                    raise
            elif self._error is not None:
                raise self._error

    __call__ = wait

    @property
    def done(self) -> bool:
        """Whether `wait` has run."""
        return self._finish is None


DONE = EpCompletion(None)
"""Of a call that was complete when it returned."""


class EpDispatchResult(NamedTuple):
    """What `EpBuffer.dispatch` returns.

    Attributes
    ----------
    recv_x : Tensor or (Tensor, Tensor)
        Received rows, with their scales where the sent ones had some.
    recv_topk_idx, recv_topk_weights : Tensor, Tensor or None
        Local expert ids (-1 elsewhere) and weights of each row.
    num_recv_tokens_per_expert : tuple of int
        L counts rounded up to the alignment; empty with ``num_worst_tokens``.
    handle : EpHandle
    event : EpCompletion
        To wait for with ``async_finish``.
    hook : EpCompletion or None
        To call with ``return_recv_hook``.
    """

    recv_x: Tensor | tuple[Tensor, Tensor]
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor | None
    num_recv_tokens_per_expert: tuple[int, ...]
    handle: EpHandle
    event: EpCompletion
    hook: EpCompletion | None

    @property
    def recv_src_rank(self) -> Tensor:
        """[rows] int32: source rank of each received row, -1 for padding and for rows that never came."""
        return self.handle.recv_src_rank

    @property
    def recv_src_position(self) -> Tensor:
        """[rows] int32: position at its source of each received row, -1 likewise. Complete when the rows are."""
        return self.handle.recv_src_position

    @property
    def recv_counts(self) -> Tensor:
        """[R, L] int32: how many tokens of each rank came for each local expert."""
        return self.handle.recv_counts


class EpCombineResult(NamedTuple):
    """What `EpBuffer.combine` returns: the sums [n, H], the summed weights [n, K] or None, event and hook."""

    combined_x: Tensor
    combined_topk_weights: Tensor | None
    event: EpCompletion
    hook: EpCompletion | None


class EpLowLatencyDispatchResult(NamedTuple):
    """What `EpBuffer.low_latency_dispatch` returns: packed rows (with scales), counts [L], handle, event and hook."""

    recv_x: Tensor | tuple[Tensor, Tensor]
    recv_count: Tensor
    handle: EpLowLatencyHandle
    event: EpCompletion
    hook: EpCompletion | None


class EpLowLatencyCombineResult(NamedTuple):
    """What `EpBuffer.low_latency_combine` returns: the weighted sums [n, H], event and hook."""

    combined_x: Tensor
    event: EpCompletion
    hook: EpCompletion | None
