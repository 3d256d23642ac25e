"""Ranks of obligations that need several processes: started once, asked often, and named when they die or hang.

A rank is a process forked from a server that has torch loaded, so it starts in milliseconds. What it is asked is
``module:function``; the function gets a `Rank` and returns plain data and tensors. It says what it is about to do
(`Rank.phase`), so that a rank that dies or hangs is named with what it was doing. The variables of torchrun are set, so
code that reads them works too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Literal

from hal_conformance.parcel import pack, unpack
from hal_conformance.process import TAIL, ending

State = Literal["done", "raised", "died", "stuck", "stopped"]
"""``stuck``: did not end in time. ``stopped``: was waiting for a rank that had failed, and was ended."""

STARTING: Final = 120.0
"""Seconds all ranks have to import what they need, which on a busy machine takes longer than the work. The time limit
of an obligation counts from then."""

GRACE: Final = 5.0
"""Seconds the others have to notice that a rank died, and to say so themselves."""

_PRELOAD: Final = ("torch", "torch.distributed", "hal.ep.buffer", "hal.reference.ep", "hal_conformance.ep")


@dataclass(frozen=True, slots=True)
class RankResult:
    """What became of one rank.

    Attributes
    ----------
    rank : int
    state : State
    phase : str
        The last thing it said it was doing.
    detail : str
        Exit code, error, or the end of its output.
    value : object
        What its function returned.
    """

    rank: int
    state: State
    phase: str
    detail: str = ""
    value: Any = None


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What became of all ranks.

    Attributes
    ----------
    ranks : tuple of RankResult
    culprits : tuple of int
        The ranks that failed, not those that waited for them; empty if all are done.
    message : str
        One line naming them.
    """

    ranks: tuple[RankResult, ...]
    culprits: tuple[int, ...] = ()
    message: str = ""

    @property
    def values(self) -> list[Any]:
        """What each rank returned."""
        return [rank.value for rank in self.ranks]


@dataclass(slots=True)
class Rank:
    """What a rank's function gets.

    Attributes
    ----------
    rank, world : int
    payload : object
    folder : Path
        Shared by the ranks of this team and nobody else.
    pipe : Connection
    """

    rank: int
    world: int
    payload: Any
    folder: Path
    pipe: Connection
    _entered: int = field(default=0)

    def phase(self, name: str) -> None:
        """Say what comes next; told at once."""
        self._entered += 1
        self.pipe.send_bytes(pack(("phase", (self._entered, name))))

    def join(self, timeout: float = 60.0) -> None:
        """Enter the default torch.distributed group of all ranks, over gloo, unless it is entered already."""
        import datetime

        import torch.distributed as dist

        if dist.is_initialized():
            return
        self.phase("join the group")
        where = f"file://{self.folder / 'store'}"
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=where, rank=self.rank, world_size=self.world, timeout=limit)


@dataclass(slots=True)
class _Member:
    """One rank, seen from here."""

    process: Any
    pipe: Connection
    entered: int = 0
    phase: str = "start"
    answer: tuple[str, Any] | None = None

    def listen(self) -> None:
        """Take in what it said."""
        try:
            while self.answer is None and self.pipe.poll(0):
                kind, value = unpack(self.pipe.recv_bytes())
                if kind == "phase":
                    self.entered, self.phase = value
                else:
                    self.answer = kind, value
        except (EOFError, OSError):
            pass

    @property
    def failed(self) -> bool:
        """Whether it raised, or ended without an answer."""
        if self.answer is not None:
            return self.answer[0] == "raised"
        return self.process.exitcode is not None


class Team:
    """Local ranks that stay from one question to the next, until one of them fails.

    Parameters
    ----------
    world : int
        How many.
    """

    def __init__(self, world: int) -> None:
        from hal_conformance.rank import serve

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self.world = world
        self.whole = True
        self._fresh = True
        self._folder = tempfile.TemporaryDirectory()
        self._members = []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, world, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._members.append(_Member(process, mine))

    def ask(self, target: str, payloads: Sequence[Any], timeout: float, mortal: Collection[int] = ()) -> GroupResult:
        """Have every rank call ``module:function`` with its payload.

        Parameters
        ----------
        target : str
        payloads : sequence
            One a rank.
        timeout : float
            Seconds for all of them, from when all have started.
        mortal : collection of int
            Ranks that are meant to die or to stop: nobody waits for them, and they are no failure.
        """
        for member, payload in zip(self._members, payloads, strict=True):
            member.entered, member.phase, member.answer = 0, "start", None
            with contextlib.suppress(OSError):
                member.pipe.send_bytes(pack((target, payload)))
        in_time = self._wait(timeout, mortal)
        done = all(m.answer is not None and m.answer[0] == "done" for m in self._members)
        if not done or mortal:
            self.whole = False
            running = [m.process.exitcode is None for m in self._members]
            for member in self._members:
                member.process.kill()
                member.process.join()
                member.listen()
        else:
            running = [True] * self.world
        return self._judge(running, in_time, timeout, mortal)

    def _wait(self, timeout: float, mortal: Collection[int]) -> bool:
        """Until all have answered, or the time is over, or one has failed and the others had their grace."""
        deadline = time.monotonic() + (STARTING if self._fresh else timeout)
        failed = False
        awaited = [m for rank, m in enumerate(self._members) if rank not in mortal]
        while True:
            for member in self._members:
                member.listen()
            if all(m.answer is not None or m.process.exitcode is not None for m in awaited):
                for member in self._members:
                    member.listen()
                return True
            if self._fresh and all(m.entered for m in self._members):
                self._fresh = False
                deadline = min(deadline, time.monotonic() + GRACE) if failed else time.monotonic() + timeout
            if not failed and any(m.failed for m in awaited):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline:
                return failed
            speaking = [m.pipe for m in awaited if m.answer is None and m.process.exitcode is None]
            wait(speaking, timeout=0.05)

    def _judge(self, running: list[bool], in_time: bool, timeout: float, mortal: Collection[int]) -> GroupResult:
        ranks = []
        for rank, member in enumerate(self._members):
            phase = member.phase
            if member.answer is not None and member.answer[0] == "done":
                ranks.append(RankResult(rank, "done", phase, value=member.answer[1]))
            elif member.answer is not None:
                ranks.append(RankResult(rank, "raised", phase, member.answer[1]))
            elif running[rank]:
                state: State = "stopped" if in_time else "stuck"
                ranks.append(RankResult(rank, state, phase, self._tail(rank)))
            else:
                how = ending(member.process.exitcode)
                ranks.append(RankResult(rank, "died", phase, f"{how}\n{self._tail(rank)}"))
        judged = [r for r in ranks if r.rank not in mortal]
        culprits = _culprits(judged, [m.entered for m in self._members])
        return GroupResult(tuple(ranks), tuple(culprits), _message(ranks, culprits, timeout))

    def _tail(self, rank: int) -> str:
        path = Path(self._folder.name) / f"{rank}.output"
        return path.read_text(errors="replace")[-TAIL:] if path.exists() else ""

    def close(self) -> None:
        """End all ranks."""
        for member in self._members:
            member.process.kill()
            member.process.join()
            member.pipe.close()
        self._folder.cleanup()


def run_ranks(target: str, world: int, payload: Any = None, timeout: float = 60.0) -> GroupResult:
    """Run ``module:function`` on ``world`` local ranks for at most ``timeout`` seconds once all have started."""
    team = Team(world)
    try:
        return team.ask(target, [payload] * world, timeout)
    finally:
        team.close()


def variables(rank: int, world: int) -> dict[str, str]:
    """What torchrun would set, and what local ranks need."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        # Ranks outnumber cores: threads of theirs would only wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Local ranks meet on the loopback; a machine may resolve its own name to an address it does not have.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    return {key: str(value) for key, value in found.items()}


def _culprits(ranks: list[RankResult], entered: list[int]) -> list[int]:
    """Who failed first: the dead before those that raised, and those behind all others before those that wait."""
    for state in ("died", "raised"):
        found = [r.rank for r in ranks if r.state == state]
        if found:
            return found
    stuck = [r.rank for r in ranks if r.state in ("stuck", "stopped")]
    furthest_back = min((entered[rank] for rank in stuck), default=0)
    return [rank for rank in stuck if entered[rank] == furthest_back]


def _message(ranks: list[RankResult], culprits: list[int], timeout: float) -> str:
    parts = []
    for rank in culprits:
        one = ranks[rank]
        if one.state == "died":
            parts.append(f"rank {rank} died in phase {one.phase!r}: it {one.detail.splitlines()[0]}")
        elif one.state == "raised":
            parts.append(f"rank {rank} raised in phase {one.phase!r}: {one.detail}")
        else:
            parts.append(f"rank {rank} is stuck in phase {one.phase!r} after {timeout:g} s")
    return "; ".join(parts)
