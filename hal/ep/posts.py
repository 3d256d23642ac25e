"""Sends and receives over torch.distributed, made all at once and waited for within a time of ours.

A communication library's own timeout is no use here: gloo's breaks every connection there is. So each post is waited
for by a thread, without end; one that never ends keeps its thread and its memory, into which bytes may still arrive.

Bytes of a device go through memory of the host. A device's own library queues what it is given: neither does waiting
for a post say that it is done, nor do two ranks get on that each receive before they send.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.errors import first_line

_FOREVER: Final = timedelta(days=1000)
_Settle = Callable[[Exception | None], None]


class Posts:
    """One rank's posts.

    Parameters
    ----------
    group : ProcessGroup
        Or one backend of one: what has ``send`` and ``recv``.
    """

    def __init__(self, group: Any) -> None:
        self._group: Any = group
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[tuple[Any, Tensor, _Settle] | None] = queue.SimpleQueue()
        self._threads = self._idle = 0

    def trade(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        tag: int,
        timeout: float,
        grace: float | None = None,
    ) -> tuple[dict[int, str], dict[int, float]]:
        """Send and receive, and wait for all of it.

        Parameters
        ----------
        sends, receives : sequence of (int, Tensor)
            Contiguous; to or from which rank. Empty ones are no posts.
        tag : int
        timeout : float
            Seconds.
        grace : float, optional
            Seconds to go on waiting once something has failed; without it nobody's failure matters to the others.

        Returns
        -------
        failed : dict of int to str
            Ranks of posts that did not end well, in the order in which that showed, and why.
        waited : dict of int to float
            Seconds until the last message of each rank was there.
        """
        start = time.monotonic()
        left = Counter(peer for peer, _ in (*receives, *sends))
        failed: dict[int, str] = {}
        waited: dict[int, float] = {}

        def settled(peer: int, receives: bool, error: Exception | None) -> None:
            with self._changed:
                left[peer] -= 1
                if error is not None:
                    failed.setdefault(peer, first_line(error))
                elif receives:
                    waited[peer] = time.monotonic() - start
                self._changed.notify_all()

        landing = [(peer, rows, _room_for(rows)) for peer, rows in receives]
        for peer, _, room in landing:
            self._post(self._group.recv, room, peer, tag, partial(settled, peer, True))
        for peer, rows in sends:
            self._post(self._group.send, rows.cpu(), peer, tag, partial(settled, peer, False))
        end = start + timeout
        with self._changed:
            while any(left.values()):
                if failed and grace is not None:
                    end, grace = min(end, time.monotonic() + grace), None
                remaining = end - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            # What settles after this is nobody's business any more.
            failed, waited = dict(failed), dict(waited)
            for peer, count in left.items():
                if count:
                    failed.setdefault(peer, f"nothing within {timeout:g} s")
        for peer, rows, room in landing:
            # By the caller, in the order of whose stream the rows are used.
            if room is not rows and peer not in failed:
                rows.copy_(room)
        return failed, waited

    def send(self, peer: int, rows: Tensor, tag: int) -> None:
        """Send without waiting, nor minding whether it arrives."""
        self._post(self._group.send, rows.cpu(), peer, tag, lambda error: None)

    def close(self) -> None:
        """Let idle threads end, and connections close once no post needs them."""
        with self._changed:
            self._group = None
            for _ in range(self._threads):
                self._jobs.put(None)
            self._threads = 0

    def _post(self, how: Callable[..., Any], rows: Tensor, peer: int, tag: int, settle: _Settle) -> None:
        if rows.numel() == 0:
            settle(None)
            return
        try:
            work = how([rows], peer, tag)
        except Exception as error:  # each library has its own
            settle(error)
            return
        self._jobs.put((work, rows, settle))
        with self._changed:
            if self._idle:
                self._idle -= 1
                return
            self._threads += 1
        threading.Thread(target=self._wait, name="hal-ep-posts", daemon=True).start()

    def _wait(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, rows, settle = job
            error = None
            try:
                work.wait(_FOREVER)
            except Exception as caught:  # each library has its own
                error = caught
            settle(error)
            del job, work, rows, settle
            with self._changed:
                self._idle += 1


def _room_for(rows: Tensor) -> Tensor:
    """Where to receive rows: themselves, if they are the host's."""
    return rows if rows.device.type == "cpu" else torch.empty(rows.shape, dtype=rows.dtype, device="cpu")
