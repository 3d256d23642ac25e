"""Messages between nodes over torch.distributed: headers that all ranks compare, then rows.

Every call between nodes begins with a header from every rank to every other. It carries what must agree, how many
tokens will come, and, where a call was refused or a rank failed, what to raise instead.

Where failed ranks are masked, a rank takes no part from the first header on that does not come in time; each rank
decides that for itself.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from hal.ep.carrier import Carrier
from hal.ep.engine import own_failure
from hal.ep.fields import PACKED_FIELDS, differing
from hal.ep.posts import Posts
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
_GRACE: Final = 1.0
"""Seconds in which others may tell who is to blame, once something has failed."""

_PARTING: Final = 5.0
_SHARE: Final = 0.5
"""Of the timeout, after which a carrier is given up: who is to blame is to be found and told within the rest."""
_TAGS: Final = 1 << 30
_WORDS: Final = 64
_T = TypeVar("_T")


class Wire:
    """One rank's end of the network between nodes.

    Parameters
    ----------
    args : EpBufferArgs
    group : ProcessGroup
        What to send and receive with.
    carrier : Carrier, optional
        What moves rows instead, where that can be.

    Attributes
    ----------
    absent : set of int
        Masked ranks.
    """

    def __init__(self, args: EpBufferArgs, group: Any, carrier: Carrier | None = None) -> None:
        self._args = args
        self._carrier = carrier
        self._posts = Posts(group)
        weakref.finalize(self, self._posts.close)  # its threads end even where nobody closes
        self._others = [rank for rank in range(args.num_ranks) if rank != args.rank]
        per_node = args.ranks_per_node
        self._away = [rank for rank in self._others if rank // per_node != args.rank // per_node]
        self._calls = 0
        self._broken: RankFailure | None = None
        self.absent: set[int] = set()
        self._left: set[int] = set()  # those of them that were told
        self._silent: set[int] = set()  # ranks that owe something in this call

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
            Tokens sent to each rank across nodes, then tokens for each rank; none where nothing is sent.
        error : SpecError, optional
            What every rank is to raise instead of making the call.
        waits : Tensor, optional
            [R] int64, to which the microseconds waited for each rank are added.

        Returns
        -------
        list of list of int
            Of every rank its counts; of masked ones zeros.

        Raises
        ------
        SpecError
            What anyone's header says is wrong, the same on every rank.
        RankFailure
            A rank does not answer, another rank told that one failed, or the others carry on without this one.
        """
        if self._broken is not None:
            raise self._broken
        self._calls += 1
        self._part()
        text = () if error is None else (error.argument, error.got, error.legal)
        mine = self._header(kind, fields, counts, text)
        landing = {rank: torch.zeros_like(mine) for rank in self._others if rank not in self.absent}
        failed, waited = self._trade([(rank, mine) for rank in landing], list(landing.items()), 0)
        if waits is not None:
            for rank, seconds in waited.items():
                waits[rank] += int(seconds * 1e6)
        failure = found_out = self._blamed(failed, kind)
        landing[self._args.rank] = mine
        headers = {rank: landing[rank].tolist() for rank in sorted(landing)}
        for rank, header in list(headers.items()):
            if header[0] == KINDS.index("failed"):
                # Whoever told of it may be gone by now; the one he named is to blame.
                told = self._told(header)
                if not self._args.mask_ranks or told.rank == self._args.rank:
                    failure = told
                failed.setdefault(rank, told.reason)
        if failure is not None:
            self._broken = failure
            self._calls += 1
            if failure is found_out:
                self._tell_blamed(failure)
            raise failure
        self.absent |= failed.keys()
        headers = {rank: header for rank, header in headers.items() if rank not in failed}
        self._compare(headers)
        nothing = [0] * 2 * self._args.num_ranks
        found = {rank: header[len(FIELDS) + 1 : -1 - _WORDS] for rank, header in headers.items()}
        return [found.get(rank, nothing) for rank in range(self._args.num_ranks)]

    def _compare(self, headers: dict[int, list[int]]) -> None:
        for header in headers.values():
            if header[-1 - _WORDS]:
                raise SpecError(*_text(header))
        first = min(headers)
        # Low-latency dispatches tell of fewer things.
        packed = headers[first][0] == KINDS.index("low_latency_dispatch")
        for rank, header in headers.items():
            for at, (name, value, other) in enumerate(zip(FIELDS, header, headers[first], strict=False)):
                if value == other:
                    continue
                if packed and at > 1:
                    raise differing(PACKED_FIELDS, at - 2, value, rank, other, first)
                shown = (KINDS[value], KINDS[other]) if name == "call" else (value, other)
                raise SpecError(name, f"{shown[0]} on rank {rank}", f"{shown[1]}, as on rank {first}")

    def trade(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], phase: str
    ) -> set[int]:
        """Send and receive rows, all at once.

        Returns
        -------
        set of int
            Where ranks are masked, those whose rows did not come; what is in their place is undefined for good.

        Raises
        ------
        RankFailure
            Otherwise: the first peer that does not answer, or whom another rank named.
        """
        if self._carrier is not None:
            self._carry(self._carrier, sends, receives, phase)
            return set()
        out = self.absent | self._silent
        for rank, rows in sends:
            if rank in self._silent:
                self._posts.send(rank, rows.view(torch.uint8), self._tag(1))
        failed, _ = self._trade(
            [(rank, rows) for rank, rows in sends if rank not in out],
            [(rank, rows) for rank, rows in receives if rank not in out],
            1,
        )
        self._require_all(failed, phase)
        self._silent |= failed.keys()
        return {rank for rank, _ in receives if rank in self.absent | self._silent}

    def _require_all(self, failed: dict[int, str], phase: str) -> None:
        """Raise where somebody failed, unless ranks are masked: the first, or whom another rank has named."""
        self._broken = self._blamed(failed, phase)
        if self._broken is not None:
            found_out, told = self._broken, self._named_by_others(failed)
            if told is None:
                self._tell_blamed(found_out)
            self._broken = told or found_out
            raise self._broken

    def _carry(
        self,
        carrier: Carrier,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        phase: str,
    ) -> None:
        """As `trade`, by a library that does not say whom it waits for: who is still there is asked on the host."""
        if carrier.trade(sends, receives, self._args.timeout * _SHARE):
            return
        carrier.close()
        here, left = torch.zeros(1, dtype=torch.uint8, device="cpu"), self._args.timeout * (1 - _SHARE)
        answers = [(rank, torch.zeros_like(here)) for rank in self._others]
        asked = [(rank, here) for rank in self._others]
        failed, _ = self._posts.trade(asked, answers, self._tag(1), left / 2, _GRACE)
        late = dict.fromkeys(self._others[:1], f"no rows of a call that all made within {self._args.timeout:g} s")
        self._require_all(failed or late, phase)

    def inside(self, call: Callable[[], _T]) -> _T:
        """Run a call inside the node; a rank that fails there is told to the other nodes, who cannot see it."""
        try:
            return call()
        except SpecError:
            raise
        except BaseException as error:
            self._break(error)
            raise

    def blamed(self, call: Callable[[], _T], tell: Callable[[RankFailure], None]) -> _T:
        """Run a call; of an error of this rank's own, as of its memory, all others hear, those of its node twice.

        Parameters
        ----------
        call : callable
        tell : callable
            Tells those who wait inside the node.
        """
        try:
            return call()
        except (SpecError, RankFailure):
            raise
        except BaseException as error:
            if self._broken is None:
                tell(own_failure(self._args.rank, "call between nodes", error))
                self._break(error, [rank for rank in self._others if rank not in self._away])
            raise

    def _break(self, error: BaseException, near: Sequence[int] = ()) -> None:
        """End every later call, and tell other nodes why; ranks of this one too, where they may not know yet."""
        if isinstance(error, RankFailure):
            self._broken = error
        else:
            self._broken = own_failure(self._args.rank, "call between nodes", error)
            self._broken.__cause__ = error
        self._tell(self._broken, near)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._broken = self._broken or RankFailure(self._args.rank, "call", "this buffer is closed")
        if self._carrier is not None:
            self._carrier.close()
        self._posts.close()

    def _part(self) -> None:
        """Ranks masked since the last call are told so in place of a header, should they wake up."""
        self._silent = set()
        for rank in self.absent - self._left:
            text = (str(rank), "call", f"rank {self._args.rank} carries on without this one")
            self._posts.send(rank, self._header("failed", (), (), text).view(torch.uint8), self._tag(0))
        self._left = set(self.absent)

    def _tell_blamed(self, failure: RankFailure) -> None:
        """In place of its next header; it may only have been slow."""
        header = self._header("failed", (), (), (str(failure.rank), failure.phase, failure.reason))
        self._posts.send(failure.rank, header.view(torch.uint8), self._tag(0))

    def _tell(self, failure: RankFailure, near: Sequence[int]) -> None:
        """In place of the next header; where failed ranks are masked, that is this one."""
        rank = self._args.rank if self._args.mask_ranks else failure.rank
        header = self._header("failed", (), (), (str(rank), failure.phase, failure.reason)).view(torch.uint8)
        self._calls += 1
        # A message leaves when its receiver asks for it; whoever is still computing will not be waited for long.
        sends = [(rank, header) for rank in self._away if rank not in self.absent]
        for rank in near:
            self._posts.send(rank, header, self._tag(0))
        self._posts.trade(sends, (), self._tag(0), min(self._args.timeout, _PARTING))

    def _named_by_others(self, failed: dict[int, str]) -> RankFailure | None:
        """What another rank tells in place of its next header: it may have seen more than this one."""
        self._calls += 1
        header = self._header("failed", (), (), ())
        landing = {rank: torch.zeros_like(header) for rank in self._others}
        receives = [(rank, one.view(torch.uint8)) for rank, one in landing.items()]
        gone, _ = self._posts.trade((), receives, self._tag(0), _GRACE)
        came = [one.tolist() for rank, one in landing.items() if rank not in gone]
        return next((self._told(one) for one in came if one[0] == KINDS.index("failed")), None)

    def _told(self, header: list[int]) -> RankFailure:
        rank, where, reason = _text(header)
        return RankFailure(int(rank), where, reason)

    def _blamed(self, failed: dict[int, str], phase: str) -> RankFailure | None:
        """The failure of the first peer, where that is one."""
        if self._args.mask_ranks:
            return None
        for peer, reason in failed.items():
            return RankFailure(peer, f"{phase} (between nodes)", f"no answer from it ({reason})")
        return None

    def _tag(self, step: int) -> int:
        """Of this call only: what an earlier one left unread is never taken for its own."""
        return (2 * self._calls + step) % _TAGS

    def _header(self, kind: str, fields: Sequence[int], counts: Sequence[int], text: Sequence[str]) -> Tensor:
        """Kind, fields, the number of the call, counts, and a text of up to 512 bytes."""
        said = "\0".join(text).encode()[: 8 * _WORDS].ljust(8 * _WORDS, b"\0")
        filled = [KINDS.index(kind), *fields, *[0] * (len(FIELDS) - 1 - len(fields))]
        tokens = [*counts, *[0] * (2 * self._args.num_ranks - len(counts))]
        words = struct.unpack(f"<{_WORDS}q", said)
        return torch.tensor([*filled, self._calls, *tokens, len(text), *words], device="cpu")

    def _trade(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], step: int
    ) -> tuple[dict[int, str], dict[int, float]]:
        """Bytes, because every communication library moves those."""
        return self._posts.trade(
            [(peer, rows.view(torch.uint8)) for peer, rows in sends if rows.numel()],
            [(peer, rows.view(torch.uint8)) for peer, rows in receives if rows.numel()],
            self._tag(step),
            self._args.timeout,
            None if self._args.mask_ranks else _GRACE,
        )


def _text(header: Sequence[int]) -> tuple[str, str, str]:
    said = struct.pack(f"<{_WORDS}q", *header[-_WORDS:]).rstrip(b"\0").decode(errors="replace")
    first, second, third = (*said.split("\0"), "", "")[:3]
    return first, second, third
