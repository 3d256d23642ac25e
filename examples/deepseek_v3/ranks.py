"""The processes of a run: each is one rank; the first that fails ends them all, and its message is the run's.

Processes come from a fork server that has transformers loaded. They report over pipes; nothing outlives `run`.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from examples.deepseek_v3.engine import Engine, Progress, Summary
from examples.deepseek_v3.experts import most_rows
from examples.deepseek_v3.model import DTYPES, build_model, in_dtype
from examples.deepseek_v3.scheduler import Request
from hal import EpBuffer, EpFaults, HalError, RankFailure, capabilities
from hal.cli.text import plain

GRACE: Final = 3.0
"""Seconds in which the ranks that see a failure may say what it was, before all are ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks of a run are told.

    Attributes
    ----------
    model : str
        ``"v3"`` or ``"v2"``.
    seed : int
        Of the weights.
    dtypes : tuple of str
        One run each, one after the other.
    requests : tuple of Request
        Request i goes to rank ``i % processes``.
    processes : int
    backend : str
    rows : int
        Token rows of a step.
    page_size : int
    timeout : float
        Seconds without a sign of life from any rank after which the run is over.
    faults : mapping of int to EpFaults
        For tests: what goes wrong on which rank.
    """

    model: str
    seed: int
    dtypes: tuple[str, ...]
    requests: tuple[Request, ...]
    processes: int
    backend: str
    rows: int = 16
    page_size: int = 64
    timeout: float = 60.0
    faults: Mapping[int, EpFaults] = field(default_factory=dict)


class RunFailed(HalError):
    """A rank failed, so the run is over.

    Attributes
    ----------
    rank : int
        The rank where it began.
    details : str
        Its traceback, where it could still send one.
    """

    def __init__(self, rank: int, message: str, details: str = "") -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.details = details


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    message: str
    details: str
    order: int
    """Causes come before what they caused: 0 a death, 1 an error of its own, 2 word of another rank's failure."""


def run(job: Job) -> Iterator[Progress | Summary]:
    """Run a job, yielding what the ranks report: `Progress` of every step, then a `Summary` a rank, for every dtype.

    Raises
    ------
    RunFailed
        A rank failed, died or fell silent; all others have been ended.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(job.processes):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, job, os.path.join(folder, "store"), theirs), daemon=True
            )
            process.start()
            ends.callback(_end, process)
            theirs.close()
            ends.callback(mine.close)
            pipes[mine] = rank
            processes.append(process)
        yield from _listen(job, pipes, processes)


def _end(process: Any) -> None:
    process.kill()
    process.join()


def _listen(job: Job, pipes: dict[Connection, int], processes: list[Any]) -> Iterator[Progress | Summary]:
    failures: list[_Failure] = []
    until = time.monotonic() + job.timeout
    while pipes:
        ready = wait(list(pipes), max(0.0, until - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes[pipe]
            try:
                said = pipe.recv()
            except (EOFError, OSError):
                said = _departed(rank, processes[rank])
            if said is None or isinstance(said, _Failure):
                del pipes[pipe]
            if isinstance(said, _Failure):
                if not failures:
                    until = time.monotonic() + GRACE
                failures.append(said)
            elif said is not None and not failures:
                until = time.monotonic() + job.timeout
                yield said
    if failures:
        first = min(failures, key=lambda failure: failure.order)
        raise RunFailed(first.rank, first.message, first.details)
    if pipes:
        silent = sorted(pipes.values())
        raise RunFailed(silent[0], f"nothing heard from ranks {silent} for {job.timeout:g} s")


def _departed(rank: int, process: Any) -> _Failure | None:
    """Why a pipe was closed: None if its rank was done."""
    process.join(GRACE)
    code = process.exitcode
    if code == 0:
        return None
    if code is not None and code < 0:
        return _Failure(rank, f"ended by {signal.Signals(-code).name}", "", 0)
    return _Failure(rank, f"ended with exit code {code}", "", 0)


def _rank(rank: int, job: Job, store: str, pipe: Connection) -> None:
    """Be one rank: the target of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's business, which then ends this process
    try:
        _work(rank, job, store, pipe)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody listens any more
    except BaseException as error:
        # gloo has no error type of its own; what it says of a lost connection is another rank's doing.
        order = 2 if isinstance(error, RankFailure) or "gloo" in str(error) else 1
        said = plain(f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            pipe.send(_Failure(rank, said, traceback.format_exc(), order))
        os._exit(1)  # the others may be gone, and an orderly shutdown would wait for them
    pipe.close()


def _work(rank: int, job: Job, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # ranks share the cores; and bits would depend on the number of threads
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=job.processes,
        timeout=timedelta(seconds=job.timeout),
    )
    built = build_model(job.model, job.seed)
    config: Any = built.config
    mine = job.requests[rank :: job.processes]
    for name in job.dtypes:
        buffer = EpBuffer(
            num_experts=config.n_routed_experts,
            hidden=config.hidden_size,
            topk=config.num_experts_per_tok,
            max_tokens_per_rank=job.rows,
            dtype=DTYPES[name],
            modes=("normal",),
            max_recv_tokens=most_rows(config, job.processes, job.rows),
            timeout=job.timeout / 2,
            device=capabilities(job.backend).device_types[0],
            faults=job.faults.get(rank),
            backend=job.backend,
        )
        with buffer, torch.no_grad():
            engine = Engine(in_dtype(built, DTYPES[name]), mine, buffer, job.backend, job.page_size)
            for progress in engine.run():
                pipe.send(progress)
            dist.barrier()  # a window must outlive what others still read from it
        pipe.send(engine.summary())
    dist.destroy_process_group()
