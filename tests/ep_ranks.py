"""Runs a function on several ranks, each a fresh process, within a hard time limit.

Processes come from a fork server that has torch loaded, so a rank starts in milliseconds. A rank that is still alive
at the limit is killed and the test fails with the state of every rank.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from hal import RankFailure

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "hal.ep.buffer", "hal.reference.ep", "hal_cpu.ep"])


@dataclass(frozen=True)
class Outcome:
    """What one rank came to: its return value, its exception, or the signal that ended it."""

    value: Any = None
    error: BaseException | None = None
    exitcode: int | None = None
    seconds: float = 0.0


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    limit: float = 30.0,
    check: bool = True,
    before: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Call ``function(rank, *args)`` on every rank of a new gloo group, which is made after ``before(rank)``.

    With ``check`` the first exception of any rank is raised here and only outcomes with values come back.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            mine, theirs = _context.Pipe()
            process = _context.Process(
                target=_rank,
                args=(rank, ranks, os.path.join(folder, "store"), function, args, theirs, before),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            outcomes = _collect(pipes, processes, time.monotonic() + limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
    late = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
    if late:
        raise AssertionError(f"ranks {late} of {function.__name__} did not end within {limit} s: {outcomes}")
    found = [outcome for outcome in outcomes if outcome is not None]
    if check:
        # A rank that failed makes the others report it; its own error says more.
        errors = sorted(
            (o.error for o in found if o.error is not None), key=lambda error: isinstance(error, RankFailure)
        )
        for error in errors:
            raise error from (errors[-1] if errors[-1] is not error else None)
        for rank, outcome in enumerate(found):
            assert outcome.exitcode is None, f"rank {rank} ended with {outcome.exitcode}"
    return found


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[Outcome | None]:
    outcomes: list[Outcome | None] = []
    start = time.monotonic()
    for pipe, process in zip(pipes, processes, strict=True):
        # A stopped rank never ends by itself; the others are still asked.
        while not pipe.poll(0.02) and process.is_alive() and time.monotonic() < deadline:
            pass
        if pipe.poll(0):
            try:
                value, error = pipe.recv()
                outcomes.append(Outcome(value, error, None, time.monotonic() - start))
                continue
            except EOFError:
                process.join(1)
        outcomes.append(None if process.is_alive() else Outcome(exitcode=process.exitcode))
    return outcomes


def _rank(
    rank: int,
    ranks: int,
    store: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    pipe: Connection,
    before: Callable[[int], None] | None,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    value, error = None, None
    try:
        if before is not None:
            before(rank)
        meeting = dist.FileStore(store, ranks)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))
        # Nobody dies or sleeps before all others are connected to it.
        if meeting.add("connected", 1) == ranks:
            meeting.set("all connected", "")
        meeting.wait(["all connected"])
        value = function(rank, *args)
    except BaseException as caught:
        error = caught
        if not hasattr(caught, "argument") and not hasattr(caught, "phase"):
            error = AssertionError("".join(traceback.format_exception(caught)))
    try:
        pipe.send((value, error))
    except BaseException as caught:
        pipe.send((None, AssertionError(f"rank {rank} could not send its outcome: {caught!r}")))
    # Until it is killed with the others: a peer may be in the last collective still, which an end here would break.
    pipe.poll(None)
    os._exit(0)  # peers may be gone; gloo's own shutdown would wait for them
