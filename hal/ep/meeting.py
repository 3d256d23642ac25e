"""Ranks of a group gathered for one purpose, over the group's store.

A meeting waits for nobody's sake but its own: it uses none of the group's communication, whose order of calls and whose
timeouts are shared with everything else. So a rank that comes late, or an opening that failed, leaves nothing behind
that a later meeting could take for its own.
"""

from __future__ import annotations

import hashlib
import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import torch.distributed as dist

from hal.ep.places import Place
from hal.spec.errors import RankFailure, first_line

_OPENING: Final = "opening the buffer"
_DEPARTURES: Final = "hal-ep/departures"
_FIRST_POLL, _LAST_POLL = 2e-4, 5e-3
_T = TypeVar("_T")


def _left(name: str) -> str:
    return f"hal-ep/left/{name}"


class _Left(Exception):
    """Someone of the meeting has left it, on account of ``failure``."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Meeting:
    """The ranks of a group, once all of them are here.

    Everybody offers to meet under a name of his own; the names of all are the name of the meeting. A rank that gives up
    takes its offer back, and whoever still wants to meet waits for its next one.

    Parameters
    ----------
    group : ProcessGroup
        With a store.
    timeout : float
        Seconds to wait for any rank, here and in every round.

    Raises
    ------
    RankFailure
        A rank did not come.
    SpecError
        Ranks wait for each other in different groups.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self._store = group.get_group_store()
        self._rank, self._ranks = dist.get_rank(group), range(dist.get_world_size(group))
        self._timeout = timeout
        self._own = f"{self._rank}.{secrets.token_hex(8)}"
        self._rounds = 0
        self._came: dict[int, str] = {}
        self._place = self._ask(lambda: Place(group, timeout))
        self._departures = self._ask(lambda: self._store.add(_DEPARTURES, 0))
        self._say(self._offer(self._rank), self._own.encode())
        end = time.monotonic() + timeout
        while True:
            self._names = self._gather(self._offers, end)
            self._say(self._key("here", self._rank), b"1")
            try:
                self._gather(lambda: self._heard("here"), end)
                break
            except _Left:
                continue  # it may come again
        # Everybody has read the offer, and none of an earlier meeting is to be found by the next.
        self._say(self._offer(self._rank), b"")
        self._ask(self._place.leave)

    @property
    def name(self) -> str:
        """Of this meeting and no other, the same on every rank."""
        return hashlib.sha256(b"".join(self._names[rank] for rank in self._ranks)).hexdigest()[:32]

    def exchange(self, mine: Any) -> list[Any]:
        """Gather one picklable object of every rank, in rank order.

        Raises
        ------
        RankFailure
            A rank does not answer, or has left; who is to blame for that is named.
        """
        self._rounds += 1
        where = f"round{self._rounds}"
        self._say(self._key(where, self._rank), pickle.dumps(mine))
        try:
            found = self._gather(lambda: self._heard(where), time.monotonic() + self._timeout)
        except _Left as left:
            raise left.failure from None
        return [pickle.loads(found[rank]) for rank in self._ranks]

    def told(self) -> RankFailure | None:
        """Why one of those who came has left, if one has."""
        for rank, name in self._came.items():
            if rank != self._rank and self._store.check([key := _left(name)]):
                return RankFailure(*pickle.loads(self._store.get(key)))
        return None

    def leave(self, failure: RankFailure) -> None:
        """Tell the others that this rank does not go on, and why, so that they need not wait for it."""
        told = failure.rank, failure.phase, failure.reason
        self._say(_left(self._own), pickle.dumps(told))
        self._ask(lambda: self._store.add(_DEPARTURES, 1))
        self._say(self._offer(self._rank), b"")

    @staticmethod
    def _offer(rank: int) -> str:
        return f"hal-ep/offer/{rank}"

    def _key(self, where: str, rank: int) -> str:
        return f"hal-ep/{self.name}/{where}/{rank}"

    def _offers(self) -> dict[int, bytes]:
        keys = [self._offer(rank) for rank in self._ranks]
        there: Sequence[int] = self._ranks
        if not self._store.check(keys):
            there = [rank for rank in self._ranks if self._store.check([keys[rank]])]
        found = dict(zip(there, self._read([keys[rank] for rank in there]), strict=True))
        self._came |= {rank: name.decode() for rank, name in found.items() if name}
        return {rank: name for rank, name in found.items() if name}

    def _heard(self, where: str) -> dict[int, bytes]:
        keys = [self._key(where, rank) for rank in self._ranks]
        found = dict(enumerate(self._read(keys))) if self._store.check(keys) else {}
        if self._store.add(_DEPARTURES, 0) != self._departures and (failure := self.told()) is not None:
            raise _Left(failure)
        return found

    def _read(self, keys: list[str]) -> list[bytes]:
        if self._store.has_extended_api():
            return list(self._store.multi_get(keys))
        return [self._store.get(key) for key in keys]

    def _say(self, key: str, value: bytes) -> None:
        self._ask(lambda: self._store.set(key, value))

    def _gather(self, look: Callable[[], dict[int, bytes]], end: float) -> dict[int, bytes]:
        """What ``look`` finds, once it finds something of every rank."""
        poll = _FIRST_POLL
        while True:
            found = self._ask(look)
            if len(found) == len(self._ranks):
                return found
            if time.monotonic() > end:
                break
            time.sleep(poll)
            poll = min(1.5 * poll, _LAST_POLL * max(1.0, len(self._ranks) / 16))
        missing = self._missing(found)
        # Who came and left again knows whom he waited for: one who is missing still, or this rank.
        told = self._ask(self.told)
        if told is None or told.rank not in {self._rank, *missing}:
            culprit = min(missing - set(self._came) or missing, default=self._rank)
            told = RankFailure(culprit, _OPENING, f"no answer from it within {self._timeout:g} s")
        self.leave(told)
        wrong = None if self._rounds else self._ask(lambda: self._place.mismatch(missing))
        raise wrong or told

    def _missing(self, found: dict[int, bytes]) -> set[int]:
        if not found:  # looked for all at once: ask for each
            where = f"round{self._rounds}" if self._rounds else "here"
            found = {
                rank: b"" for rank in self._ranks if self._ask(partial(self._store.check, [self._key(where, rank)]))
            }
        return set(self._ranks) - set(found)

    def _ask(self, step: Callable[[], _T]) -> _T:
        """The store may live in a process that is gone."""
        try:
            return step()
        except RuntimeError as error:
            reason = first_line(error)
            raise RankFailure(0, _OPENING, f"the group's store does not answer ({reason})") from None
