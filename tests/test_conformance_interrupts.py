"""Runs that are ended by signals, and processes of a run that are: what is said, and that the report remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hal_conformance import report
from hal_conformance.context import Settings
from hal_conformance.interrupts import WRITING
from hal_conformance.next_step import next_step
from hal_conformance.process import OUTSIDE, Secluded, Worker
from hal_conformance.session import Session
from hal_conformance.table import BY_ID

# Who starts this may be deaf to SIGINT, and whom it starts would be too.
_COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hal_conformance.cli import app
app()
"""
_LIMIT = 120.0


def _until(seen: str, log: Path, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT
    while seen not in log.read_text():
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "seen"),
    [(signal.SIGINT, "CAP-01"), (signal.SIGTERM, "CAP-01"), (signal.SIGINT, "seed"), (signal.SIGTERM, "seed")],
)
@pytest.mark.long(12)
def test_signals_end_a_run_and_none_of_them_its_report(number: signal.Signals, seen: str, tmp_path: Path) -> None:
    """The first comes once something was seen; others, one after the other, until the report is there."""
    log, out = tmp_path / "log", tmp_path / "report"
    command = [sys.executable, "-c", _COMMAND, "--backend", "cpu", "--only", "L0", "--only", "L1", "--out", str(out)]
    with log.open("wb") as to, subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, cwd=tmp_path) as run:
        try:
            _until(seen, log, run)
            started = time.monotonic()
            while not (out / "report.html").exists() and run.poll() is None:
                run.send_signal(number)
                time.sleep(0.2)
            took = time.monotonic() - started
            code = run.wait(_LIMIT)
        finally:
            run.kill()
    said = log.read_text()
    assert code == 1 and took < WRITING, said
    assert "interrupted: what was not run is left out" in said and f"in {WRITING} s at most" in said, said
    assert "Traceback" not in said
    made = json.loads((out / "report.json").read_text())
    statuses = {row["id"]: row["status"] for row in made["obligations"]}
    assert statuses["CAP-01"] == ("PASS" if seen == "CAP-01" else "SKIPPED") and set(statuses) == set(BY_ID)
    assert (made["verdict"], made["certificate"]) == ("INCOMPLETE", None)


def _end(process: Worker, number: signal.Signals) -> None:
    process.start()
    assert process._process is not None
    os.kill(process._process.pid, number)
    process._process.wait()


def test_a_judge_that_is_killed_is_named_and_the_backend_is_not_blamed() -> None:
    with Worker() as worker, Secluded() as judge:
        session = Session(Settings("cpu", 11, "quick"), ["MLA-21"], 0, witness=judge)
        session.worker = worker
        session.learn()
        _end(judge, signal.SIGKILL)
        session.run()
    made = report.make(session)
    said = session.results["MLA-21"].message
    assert said == f"the case could not be judged: {judge.who} was killed by SIGKILL, {OUTSIDE}"
    assert made["verdict"] == "FAIL"
    assert made["headline"] == "cpu was not judged to the end: 1 obligation (MLA-21) could not be judged"
    assert "in the backend" not in " ".join(next_step(made))


@pytest.mark.parametrize(("number", "outside"), [(signal.SIGKILL, True), (signal.SIGABRT, False)])
def test_a_worker_that_is_killed_is_named(number: signal.Signals, outside: bool) -> None:
    with Worker() as worker, Secluded() as judge:
        session = Session(Settings("cpu", 11, "quick"), ["MLA-21"], 0, witness=judge)
        session.worker = worker
        session.learn()
        _end(worker, number)
        session.run()
    made = report.make(session)
    said = session.results["MLA-21"].message
    assert said.startswith(f"{worker.who} was killed by {number.name}" + (f", {OUTSIDE}" if outside else " in "))
    assert made["verdict"] == "FAIL" and session.results["MLA-21"].status == "CRASH"
    assert ("in the backend: mla_decode()" in " ".join(next_step(made))) != outside


def test_a_process_that_hangs_does_not_outlive_who_asks() -> None:
    code = "from hal_conformance.process import Worker\nw = Worker()\nw.start()\nprint(w._process.pid, flush=True)"
    code += "\ninput()"
    asks = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert asks.stdout is not None
    worker = int(asks.stdout.readline())
    # It imports torch before it can say when it is to end.
    deadline = time.monotonic() + _LIMIT
    while b"torch" not in Path(f"/proc/{worker}/maps").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3.0)
    os.kill(worker, signal.SIGSTOP)
    asks.kill()
    asks.wait()
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}/stat").exists()
