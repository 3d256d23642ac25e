"""Obligations of several processes: starts the ranks itself, gives them a hard time limit, and names who failed.

A rank is ``python -m hal_conformance.rank module:function``; the function gets a `Rank` and returns something JSON can
hold. It says what it is about to do (`Rank.phase`), so that a rank that dies or hangs is named with what it was doing.
The variables of torchrun are set, so code that reads them works too.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from hal_conformance.process import INTERPRETER, TAIL

State = Literal["done", "raised", "died", "stuck", "stopped"]
"""``stuck``: did not end in time. ``stopped``: was waiting for a rank that had failed, and was ended."""

STARTING: Final = 120.0
"""Seconds all ranks have to import what they need, which on a busy machine takes longer than the work. The time limit
of an obligation counts from then."""

GRACE: Final = 5.0
"""Seconds the others have to notice that a rank died, and to say so themselves."""


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
    payload : dict
    folder : Path
        Shared by the ranks of this run and nobody else.
    """

    rank: int
    world: int
    payload: dict[str, Any]
    folder: Path
    _entered: int = field(default=0)

    def phase(self, name: str) -> None:
        """Say what comes next; written down at once."""
        self._entered += 1
        (self.folder / f"{self.rank}.phase").write_text(json.dumps([self._entered, name]))

    def join(self, timeout: float = 30.0) -> None:
        """Enter the default torch.distributed group of all ranks, over gloo."""
        import datetime

        import torch.distributed as dist

        self.phase("join the group")
        where = f"file://{self.folder / 'store'}"
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=where, rank=self.rank, world_size=self.world, timeout=limit)


def run_ranks(target: str, world: int, payload: dict[str, Any] | None = None, timeout: float = 60.0) -> GroupResult:
    """Run ``module:function`` on ``world`` local ranks for at most ``timeout`` seconds once all have started."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "payload").write_text(json.dumps(payload or {}))
        processes = [_start(target, rank, world, folder) for rank in range(world)]
        try:
            in_time = _wait(processes, folder, timeout)
        finally:
            running = [process.poll() is None for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        return _judge(folder, processes, running, in_time, timeout)


def _start(target: str, rank: int, world: int, folder: Path) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        # Ranks outnumber cores: threads of theirs would only wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Local ranks meet on the loopback; a machine may resolve its own name to an address it does not have.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    with (folder / f"{rank}.output").open("wb") as output:
        return subprocess.Popen(
            [*INTERPRETER, "-m", "hal_conformance.rank", target, str(folder)],
            env=os.environ | {key: str(value) for key, value in variables.items()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> bool:
    """Until all have ended, or the time is over, or one has failed and the others had their grace."""
    deadline = time.monotonic() + STARTING
    started = failed = False
    while any(process.poll() is None for process in processes):
        if not started and all((folder / f"{rank}.phase").exists() for rank in range(len(processes))):
            started, deadline = True, time.monotonic() + timeout
        if not failed and any(process.poll() not in (None, 0) for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.02)
    return True


def _judge(
    folder: Path, processes: list[subprocess.Popen[bytes]], running: list[bool], in_time: bool, timeout: float
) -> GroupResult:
    ranks, entered = [], []
    for rank, process in enumerate(processes):
        count, phase = _phase(folder, rank)
        entered.append(count)
        answer = folder / f"{rank}.answer"
        tail = (folder / f"{rank}.output").read_text(errors="replace")[-TAIL:]
        if answer.exists() and process.returncode == 0:
            ranks.append(RankResult(rank, "done", phase, value=json.loads(answer.read_text())))
        elif running[rank]:
            state: State = "stopped" if in_time else "stuck"
            ranks.append(RankResult(rank, state, phase, tail))
        elif answer.exists() and isinstance(found := json.loads(answer.read_text()), dict) and "raised" in found:
            ranks.append(RankResult(rank, "raised", phase, found["raised"]))
        else:
            code = process.returncode
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            ranks.append(RankResult(rank, "died", phase, f"{how}\n{tail}"))
    culprits = _culprits(ranks, entered)
    return GroupResult(tuple(ranks), tuple(culprits), _message(ranks, culprits, timeout))


def _phase(folder: Path, rank: int) -> tuple[int, str]:
    try:
        count, name = json.loads((folder / f"{rank}.phase").read_text())
    except (OSError, ValueError):
        return 0, "start"
    return int(count), str(name)


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
            parts.append(f"rank {rank} died in phase {one.phase!r} ({one.detail.splitlines()[0]})")
        elif one.state == "raised":
            parts.append(f"rank {rank} raised in phase {one.phase!r}: {one.detail}")
        else:
            parts.append(f"rank {rank} is stuck in phase {one.phase!r} after {timeout:g} s")
    return "; ".join(parts)
