"""In which group each rank waits for others, so that those who wait for each other in two groups learn it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from hal.spec.errors import SpecError


class Place:
    """That of this rank, for all to see while it waits.

    Parameters
    ----------
    group : ProcessGroup
        In which it waits.
    timeout : float
        Seconds that it will wait.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self._store: Any = group.get_group_store()
        world: Any = dist.group.WORLD
        with contextlib.suppress(RuntimeError):  # of a world without a store only this group sees it
            self._store = world.get_group_store() or self._store
        self._ranks: list[int] = dist.get_process_group_ranks(group)
        self._mine = [str(group.group_name), self._ranks]
        # Who gives up stays to be seen until those who came later give up too; clocks need not agree to the second.
        until = time.time() + 2 * timeout
        self._store.set(self._key(dist.get_rank()), json.dumps([*self._mine, until]))

    def leave(self) -> None:
        """Everybody came."""
        self._store.set(self._key(dist.get_rank()), "")

    def mismatch(self, missing: Iterable[int]) -> SpecError | None:
        """What is wrong where one of the group's ranks that are missing waits for this one in another group."""
        places = {rank: place for rank in self._ranks if (place := self._of(rank)) is not None}
        there = [places.get(self._ranks[rank], self._mine) for rank in missing]
        if not any(place != self._mine and dist.get_rank() in place[1] for place in there):
            return None
        first, *others = sorted(places)
        other = next(rank for rank in others if places[rank] != places[first])
        got, legal = (f"group {name!r} of ranks {ranks}" for name, ranks in (places[other], places[first]))
        return SpecError("group", f"{got} on rank {other}", f"{legal}, as on rank {first}")

    def _of(self, rank: int) -> list[Any] | None:
        if not self._store.check([self._key(rank)]):
            return None
        said = self._store.get(self._key(rank))
        name, ranks, until = json.loads(said) if said else ("", [], 0.0)
        return [name, ranks] if until > time.time() else None

    @staticmethod
    def _key(rank: int) -> str:
        return f"hal-ep/place/{rank}"
