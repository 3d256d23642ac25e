"""A rank that was stopped for longer than the timeout is named by the others, and told so when it goes on."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import portable_backends
import pytest
from ep_cases import Case
from ep_ranks import run_ranks

from hal import EpFault, EpFaults, RankFailure, plugins
from hal.ep.meeting import Meeting
from hal.ep.rendezvous import Doorbell

TIMEOUT = 2.0
ONE = Case(ranks=3, tokens=(6, 6, 6), experts=9)
TWO = Case(ranks=4, tokens=(6, 6, 6, 6), experts=8, per_node=2)
PORTABLE = replace(ONE, backend=portable_backends.name(32))


def registered(rank: int) -> None:
    """The backends of `portable_backends` in this process."""
    plugins._registry = portable_backends.registry()


def stop() -> None:
    """Stop this process until the others have long given it up; a child lets it go on."""
    if os.fork() == 0:
        time.sleep(2.5 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def stopped_between_calls(rank: int, case: Case, culprit: int) -> int:
    mine = case.inputs()[rank]
    with case.buffer(timeout=TIMEOUT) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
        if rank == culprit:
            stop()
        with pytest.raises(RankFailure) as caught:
            [buffer.dispatch(mine.x, mine.topk_idx) for _ in range(3)]
    return caught.value.rank


@pytest.mark.sampled
@pytest.mark.long(6)
@pytest.mark.parametrize(("case", "culprit"), [(ONE, 1), (TWO, 1), (TWO, 2), (PORTABLE, 1)])
def test_between_calls(case: Case, culprit: int) -> None:
    before = registered if case is PORTABLE else None
    said = [outcome.value for outcome in run_ranks(case.ranks, stopped_between_calls, case, culprit, before=before)]
    assert said == [culprit] * case.ranks


def stopped_within_a_call(rank: int, phase: str) -> int:
    mine = ONE.inputs()[rank]
    faults = None
    if rank == 1:
        faults = EpFaults(EpFault("stop", phase, 2))
        if os.fork() == 0:
            time.sleep(2.5 * TIMEOUT)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
    with ONE.buffer(timeout=TIMEOUT, faults=faults) as buffer, pytest.raises(RankFailure) as caught:
        [buffer.dispatch(mine.x, mine.topk_idx) for _ in range(4)]
    return caught.value.rank


@pytest.mark.sampled
@pytest.mark.long(5)
@pytest.mark.parametrize("phase", ["post", "grant", "push", "receive"])
def test_within_a_call(phase: str) -> None:
    assert [outcome.value for outcome in run_ranks(3, stopped_within_a_call, phase)] == [1, 1, 1]


def test_who_does_not_trade_windows_is_named_by_all() -> None:
    bells = [Doorbell(3) for _ in range(3)]
    names, token = [bell.name for bell in bells], b"t" * 32

    def trade(rank: int) -> int:
        with tempfile.TemporaryFile() as file, pytest.raises(RankFailure) as caught:
            bells[rank].trade(file.fileno(), rank, names, token, 1.0)
        return caught.value.rank

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(trade, (0, 2))) == [1, 1]
    for bell in bells:
        bell.close()


def stopped_while_opening(rank: int, case: Case, where: type, method: str) -> int:
    if rank == 1:
        went_on = getattr(where, method)

        def late(*given: Any) -> Any:
            setattr(where, method, went_on)
            stop()
            return went_on(*given)

        setattr(where, method, late)
    with pytest.raises(RankFailure) as caught:
        case.buffer(timeout=TIMEOUT)
    return caught.value.rank


@pytest.mark.sampled
@pytest.mark.long(5)
@pytest.mark.parametrize("case", [ONE, TWO], ids=["one node", "two nodes"])
@pytest.mark.parametrize(("where", "method"), [(Meeting, "_heard"), (Meeting, "exchange"), (Doorbell, "trade")])
def test_while_opening(case: Case, where: type, method: str) -> None:
    outcomes = run_ranks(case.ranks, stopped_while_opening, case, where, method)
    assert [outcome.value for outcome in outcomes] == [1] * case.ranks
