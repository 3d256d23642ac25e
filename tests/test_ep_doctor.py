"""``hal ep doctor`` tells who waits for whom, of live groups and of dumps written at a failure."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks
from typer.testing import CliRunner

from hal import EpFault, EpFaults, RankFailure, SpecError
from hal.cli.app import app
from hal.ep import doctor

CASE = Case(tokens=(6, 6, 6), ranks=3, experts=9)


def look() -> list[doctor.Finding]:
    """The groups of this test's own processes."""
    from hal_cpu import ep_live

    mine = {child for child in os.listdir("/proc") if child.isdigit() and _parent(child) == os.getppid()}
    return [one for one in doctor.live(ep_live.states()) if {str(state.pid) for state in one.states} <= mine]


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def patient(rank: int, fault: EpFault | None, until: int) -> Any:
    """The last rank, outside any call, looks at the others until so many wait; then it joins them."""
    mine = CASE.inputs()[rank]
    faults = EpFaults(fault) if fault is not None and rank == 0 else None
    with CASE.buffer(timeout=4.0, faults=faults) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
        dist.barrier()
        seen = None
        if rank == 2 and fault is None:
            seen = _poll(until)
        try:
            got = buffer.dispatch(mine.x, mine.topk_idx, async_finish=True)
            if rank == 2 and fault is not None:
                seen = _poll(until)
            got.event.wait()
        except RankFailure:
            assert fault is not None
        dist.barrier()  # a rank that closes its buffer would be noticed at once
        return seen


def _poll(until: int) -> dict[str, Any]:
    end = time.monotonic() + 6
    while time.monotonic() < end:
        for found in look():
            if len(found.waits) >= until and found.stuck:
                return found.as_json()
        time.sleep(0.05)
    raise AssertionError(f"nobody was seen waiting: {look()}")


def test_a_live_group_shows_who_waits_for_whom() -> None:
    seen = run_ranks(3, patient, None, 2)[2].value
    assert [(wait["rank"], wait["waits_for"], wait["phase"]) for wait in seen["waits"]] == [
        (0, 2, "post"),
        (1, 2, "post"),
    ]
    assert [*seen["culprits"]] == [2]
    assert "in no call since dispatch #1" in seen["culprits"][2]
    assert [state["process"] for state in seen["states"]] == ["running"] * 3


def test_a_live_group_shows_awaited_rows() -> None:
    seen = run_ranks(3, patient, EpFault("drop", "push", 2), 1, check=False)[2].value
    (wait,) = [one for one in seen["waits"] if one["rank"] == 1]
    assert (wait["waits_for"], wait["phase"], wait["kind"]) == (0, "receive", "dispatch")
    assert wait["expected"] > 0
    assert wait["received"] == 0
    assert wait["expert"] // 3 == 1


def failing(rank: int, folder: str) -> None:
    os.environ[doctor.DUMP_ENV] = folder
    mine = CASE.inputs()[rank]
    faults = EpFaults(EpFault("kill", "push", 2)) if rank == 1 else None
    with CASE.buffer(timeout=3.0, faults=faults) as buffer:
        for _ in range(3):
            buffer.dispatch(mine.x, mine.topk_idx)


def test_a_failure_leaves_a_dump_that_is_read(tmp_path: Path) -> None:
    run_ranks(3, failing, str(tmp_path / "dumps"), check=False)
    files = sorted((tmp_path / "dumps").iterdir())
    assert len(files) == 2
    result = CliRunner().invoke(app, ["ep", "doctor", *map(str, files), "--json"])
    assert result.exit_code == 1, result.output
    for group in json.loads(result.output)["groups"]:
        assert group["failure"]["rank"] == 1
        assert group["culprits"]["1"].startswith("its process ended")
        kinds = [record["kind"] for state in group["states"] for record in state["records"] if state["rank"] == 1]
        assert kinds == ["dispatch", "dispatch"]
    shown = CliRunner().invoke(app, ["ep", "doctor", str(files[0])], env={"COLUMNS": "240"})
    assert shown.exit_code == 1
    assert "rank 1 failed in dispatch" in shown.output
    assert "#2 dispatch unfinished" in shown.output
    more = CliRunner().invoke(app, ["ep", "doctor", str(files[0]), "--last", "3"], env={"COLUMNS": "240"})
    assert "#1 dispatch" in more.output


def test_what_is_no_dump_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SpecError, match="HAL_EP_DUMP"):
        doctor.read_dump(path)


def idle(rank: int) -> tuple[int, str]:
    with CASE.buffer():
        dist.barrier()
        result = CliRunner().invoke(app, ["ep", "doctor"]) if rank == 0 else None
        dist.barrier()
        return (0, "") if result is None else (result.exit_code, result.output)


def test_an_idle_group_is_healthy() -> None:
    code, output = run_ranks(3, idle)[0].value
    assert "nobody waits" in output, output
    assert code in (0, 1)  # other groups of this user may be stuck, which is not this test's business
