"""Obligations of several processes: own ranks, a hard time limit, and the dead or stuck rank named."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hal_conformance import ranks
from hal_conformance.parcel import pack
from hal_conformance.process import OUTSIDE
from hal_conformance.ranks import Team, run_ranks


@pytest.fixture(autouse=True)
def _ranks_find_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def test_ranks_talk_and_return() -> None:
    done = run_ranks("conformance_ranks:add_up", 3, {"add": 1}, timeout=60)
    assert done.message == ""
    assert done.values == [6.0, 6.0, 6.0]
    assert [r.state for r in done.ranks] == ["done"] * 3


@pytest.mark.parametrize(
    ("number", "how"),
    [(None, "ended with exit code 7"), (signal.SIGKILL, f"was killed by SIGKILL, {OUTSIDE}")],
)
def test_a_dead_rank_is_named_and_the_others_do_not_wait_for_ever(number: int | None, how: str) -> None:
    started = time.monotonic()
    done = run_ranks("conformance_ranks:one_dies", 2, number, timeout=100)
    assert done.culprits == (1,)
    assert f"rank 1 died in phase 'before the exchange': it {how}" in done.message
    assert time.monotonic() - started < 60


@pytest.mark.long(8)
def test_a_stuck_rank_is_named_and_not_those_that_wait_for_it() -> None:
    done = run_ranks("conformance_ranks:one_hangs", 2, timeout=8)  # two messages on a busy machine
    assert done.culprits == (0,)
    assert done.message == "rank 0 is stuck in phase 'prepare' after 8 s"


def test_a_rank_that_raises_is_named_with_what_it_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hal_conformance.ranks.GRACE", 0.5)
    done = run_ranks("conformance_ranks:one_raises", 2, timeout=60)
    assert done.culprits == (1,)
    assert "rank 1 raised in phase 'check': ValueError: 17 tokens expected" in done.message
    assert [r.state for r in done.ranks] == ["stopped", "raised"]


def test_a_rank_that_starts_late_prolongs_no_wait_after_another_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    team = Team.__new__(Team)
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    team._fresh = True
    team._members = [ranks._Member(SimpleNamespace(exitcode=None), mine) for mine, _ in pipes]
    for said in (("phase", (1, "start")), ("raised", "ValueError: at once")):
        pipes[1][1].send_bytes(pack(said))
    late = threading.Timer(0.3, lambda: pipes[0][1].send_bytes(pack(("phase", (1, "start")))))
    late.start()
    started = time.monotonic()
    assert team._wait(30.0, ())
    late.join()
    assert time.monotonic() - started < 10


def test_an_answer_counts_whatever_the_interpreter_does_as_it_ends() -> None:
    done = run_ranks("conformance_ranks:answers_and_falls", 2, timeout=60)
    assert done.values == ["fine", "fine"], done.message
