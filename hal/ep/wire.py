"""Messages between nodes over torch.distributed: headers that all ranks compare, then rows.

Every call between nodes begins with a header from every rank to every other. It carries what must agree, how many
tokens will come, and, where a call was refused or a rank failed, what to raise instead.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure, SpecError

KINDS: Final = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "refused", "failed")
FIELDS: Final = (
    "call",
    "topk_weights",
    "topk_idx",
    "x",
    "x",
    "x",
    "expand",
    "expert_alignment",
    "num_worst_tokens",
    "handle",
)
_LAST_WAIT: Final = timedelta(seconds=1)
_PARTING: Final = 5.0
_HEADERS, ROWS = 1, 2  # tags: a header is never taken for rows
_WORDS: Final = 64
_T = TypeVar("_T")


class Wire:
    """One rank's end of the network between nodes.

    Parameters
    ----------
    args : EpBufferArgs
    """

    def __init__(self, args: EpBufferArgs) -> None:
        self._args = args
        self._group: Any = args.group
        self._timeout = timedelta(seconds=args.timeout)
        self._calls = 0
        self._broken: RankFailure | None = None

    def agree(
        self,
        kind: str,
        fields: Sequence[int],
        counts: Sequence[int],
        error: SpecError | None = None,
        waits: Tensor | None = None,
    ) -> list[list[int]]:
        """Exchange headers with every rank.

        Parameters
        ----------
        kind : str
            Member of `KINDS`.
        fields : sequence of int
            What must agree, as the rest of `FIELDS` names it; missing ones are 0.
        counts : sequence of int
            Tokens for each node, then for each rank; none where nothing is sent.
        error : SpecError, optional
            What every rank is to raise instead of making the call.
        waits : Tensor, optional
            [R] int64, to which the microseconds waited for each rank are added.

        Returns
        -------
        list of list of int
            Of every rank its counts.

        Raises
        ------
        SpecError
            What anyone's header says is wrong, the same on every rank.
        RankFailure
            A rank does not answer, or another rank told that one failed.
        """
        if self._broken is not None:
            raise self._broken
        self._calls += 1
        text = () if error is None else (error.argument, error.got, error.legal)
        mine = self._header(kind, fields, counts, text)
        landing = {r: torch.zeros_like(mine) for r in range(self._args.num_ranks) if r != self._args.rank}
        failure = self._attempt([(r, mine) for r in landing], list(landing.items()), kind, _HEADERS, waits)
        landing[self._args.rank] = mine
        headers = [landing[r].tolist() for r in range(self._args.num_ranks)]
        for header in headers:
            if header[0] == KINDS.index("failed"):
                # Whoever told of it may be gone by now; the one he named is to blame.
                rank, where, reason = _text(header)
                failure = RankFailure(int(rank), where, reason)
        if failure is not None:
            self._broken = failure
            raise failure
        for header in headers:
            if header[-1 - _WORDS]:
                raise SpecError(*_text(header))
        for r, header in enumerate(headers):
            for name, value, other in zip(FIELDS, header, headers[0], strict=False):
                if value != other:
                    shown = (KINDS[value], KINDS[other]) if name == "call" else (value, other)
                    raise SpecError(name, f"{shown[0]} on rank {r}", f"{shown[1]}, as on rank 0")
        return [header[len(FIELDS) + 1 : -1 - _WORDS] for header in headers]

    def trade(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], phase: str) -> None:
        """Send and receive rows, all at once.

        Raises
        ------
        RankFailure
            The first peer that does not answer.
        """
        self._broken = self._attempt(sends, receives, phase, ROWS)
        if self._broken is not None:
            raise self._broken

    def inside(self, call: Callable[[], _T]) -> _T:
        """Run a call inside the node; a rank that fails there is told to the other nodes, who cannot see it."""
        try:
            return call()
        except RankFailure as failure:
            self._broken = failure
            self._tell(failure)
            raise

    def _tell(self, failure: RankFailure) -> None:
        text = (str(failure.rank), failure.phase, failure.reason)
        header = self._header("failed", (), (), text).view(torch.uint8)
        per_node = self._args.ranks_per_node
        works = []
        for rank in range(self._args.num_ranks):
            if rank // per_node != self._args.rank // per_node:
                with contextlib.suppress(Exception):  # whoever is gone need not be told
                    works.append(dist.isend(header, group=self._group, group_dst=rank, tag=_HEADERS))
        # A message leaves when its receiver asks for it; whoever is still computing will not be waited for long.
        end = time.monotonic() + min(self._args.timeout, _PARTING)
        for work in works:
            with contextlib.suppress(Exception):
                if work is not None:
                    work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))

    def _header(self, kind: str, fields: Sequence[int], counts: Sequence[int], text: Sequence[str]) -> Tensor:
        """Kind, fields, the number of the call, counts, and a text of up to 512 bytes."""
        said = "\0".join(text).encode()[: 8 * _WORDS].ljust(8 * _WORDS, b"\0")
        filled = [KINDS.index(kind), *fields, *[0] * (len(FIELDS) - 1 - len(fields))]
        tokens = [*counts, *[0] * (self._args.num_nodes + self._args.num_ranks - len(counts))]
        words = struct.unpack(f"<{_WORDS}q", said)
        return torch.tensor([*filled, self._calls, *tokens, len(text), *words], device=self._args.device)

    def _attempt(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        phase: str,
        tag: int,
        waits: Tensor | None = None,
    ) -> RankFailure | None:
        works = []
        failure = None
        start = time.monotonic()

        def attempt(peer: int, step: Callable[[], _T]) -> _T | None:
            nonlocal failure
            try:
                return step()
            except Exception as error:
                reason = str(error).split("\n")[0][:200]
                failure = failure or RankFailure(peer, f"{phase} (between nodes)", f"no answer from it ({reason})")
                return None

        # Bytes, because every communication library moves those.
        for peer, rows in receives:
            if rows.numel():
                into = rows.view(torch.uint8)
                step = partial(dist.irecv, into, group=self._group, group_src=peer, tag=tag)
                works.append((peer, attempt(peer, step), waits))
        for peer, rows in sends:
            if rows.numel():
                out_of = rows.view(torch.uint8)
                sent = partial(dist.isend, out_of, group=self._group, group_dst=peer, tag=tag)
                works.append((peer, attempt(peer, sent), None))
        for peer, work, counter in works:
            if work is not None:
                attempt(peer, partial(work.wait, self._timeout if failure is None else _LAST_WAIT))
            if counter is not None:
                counter[peer] += int((time.monotonic() - start) * 1e6)
        return failure


def _text(header: Sequence[int]) -> tuple[str, str, str]:
    said = struct.pack(f"<{_WORDS}q", *header[-_WORDS:]).rstrip(b"\0").decode(errors="replace")
    first, second, third = (*said.split("\0"), "", "")[:3]
    return first, second, third
