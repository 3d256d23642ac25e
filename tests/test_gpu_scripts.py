"""What is run on machines with devices, rehearsed on the CPU: it sees what is wrong, and says what it saw."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ep_ranks import run_ranks

import hal
from hal.bench import ep_deep_ep
from hal.bench.ep_cases import Shape, routes
from hal.bench.ep_peers import require_same
from hal.bench.ep_rank import Rank
from hal.bench.ep_site import Host

SCRIPTS = Path(__file__).parents[1] / "scripts" / "gpu"


def stress() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("ep_stress", SCRIPTS / "ep_stress.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["ep_stress"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tampered:
    """A buffer, one call of which gives something else than it should on one rank."""

    def __init__(self, buffer: hal.EpBuffer, call: str) -> None:
        self._buffer, self._call = buffer, call

    def __getattr__(self, name: str) -> Any:
        def called(*given: Any, **options: Any) -> Any:
            found = getattr(self._buffer, name)(*given, **options)
            if name == self._call:
                rows = found[0][0] if isinstance(found[0], tuple) else found[0]
                if getattr(found, "hook", None) is not None:
                    found.hook()
                rows.view(torch.uint8).view(-1)[: rows.shape[-1] * rows.itemsize].bitwise_xor_(1)
            return found

        return called


def played(rank: int, call: str) -> list[str]:
    module = stress()
    with hal.EpBuffer(
        num_experts=2 * module.LOCAL,
        hidden=module.HIDDEN,
        topk=module.TOPK,
        max_tokens_per_rank=module.MOST,
        backend="cpu",
    ) as buffer:
        given: Any = Tampered(buffer, call) if rank else buffer
        player = module.Player(3, rank, 2, torch.device("cpu"), given, lambda: None)
        for number in range(4):
            player.play(number)
        dist.barrier()
    found: list[str] = player.wrong
    return found


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("", ""),
        ("dispatch", "recv_x"),
        ("combine", "combined_x"),
        ("low_latency_dispatch", "packed recv_x"),
        ("low_latency_combine", "low-latency combined_x"),
    ],
)
def test_the_stress_test_sees_a_row_that_is_not_what_it_must_be(call: str, what: str) -> None:
    right, wrong = (outcome.value for outcome in run_ranks(2, played, call, limit=60))
    assert right == []
    assert not call or any(f"rank 1: {what}" in text and "wrong in 1 rows, first 0" in text for text in wrong)
    assert all(what in text for text in wrong)


@pytest.mark.sampled
@pytest.mark.long(15)
def test_rounds_add_up_over_runs_and_a_lost_rank_is_named(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / "ep_stress.py"), "--ranks", "2", *options]
        environment = os.environ | {"HAL_BACKEND": "cpu"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    progress = ["--progress", str(tmp_path / "progress.json")]
    first = run("--rounds", "40", "--seconds", "0", *progress)
    assert first.returncode == 1 and "rounds 0 to 16 of 40, 0 mismatches" in first.stdout, first.stdout + first.stderr
    second = run("--rounds", "40", *progress)
    assert second.returncode == 0 and "rounds 16 to 40 of 40, 0 mismatches" in second.stdout
    assert "all 40 rounds are done" in run("--rounds", "40", *progress).stdout
    lost = run("--lose", "kill", "--rounds", "8", "--timeout", "6")
    assert lost.returncode == 0 and "ok    rank 0: named rank 1 after" in lost.stdout, lost.stdout + lost.stderr


@pytest.mark.sampled
@pytest.mark.long(6)
def test_the_script_writes_a_verdict_of_every_stage(tmp_path: Path) -> None:
    command = [
        str(SCRIPTS / "ep.sh"),
        "--backend",
        "cpu",
        "--ranks",
        "2",
        "--quick",
        str(tmp_path),
        "link",
        "stress",
    ]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    verdict = (tmp_path / "verdict.txt").read_text().splitlines()
    assert done.returncode == 0 and done.stdout.splitlines() == verdict
    assert verdict[1] == "link: not applicable to the cpu"
    assert verdict[2].startswith("stress-2: PASS") and "rounds 0 to 100 of 100, 0 mismatches" in verdict[2]
    assert len(verdict) == 3


@pytest.mark.parametrize("script", ["ep.sh", "mla.sh"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("OUT doctro", "no stage is called doctro; there are: install doctor"),
        ("OUT install --quick", "no stage is called --quick"),
        ("--frob OUT", "what is --frob?"),
        ("--backend", "--backend needs a value"),
        ("--limit 0 OUT", "--limit 0: a number of seconds, 1 or more"),
        ("--wheels . OUT", "--wheels .: a folder with wheels"),
        ("/proc/nothing/here install", "no folder to write to"),
        ("", ".sh [--backend NAME]"),
    ],
)
def test_a_wrong_command_line_starts_nothing(script: str, arguments: str, says: str, tmp_path: Path) -> None:
    command = [str(SCRIPTS / script), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["ep.sh --ranks 2", "mla.sh"])
def test_its_folder_is_where_the_caller_stands(script: str, tmp_path: Path) -> None:
    command = [*str(SCRIPTS / script).split(), "OUT", "install"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "OUT" / "verdict.txt").read_text().endswith("install: not asked for (no --wheels)\n")


def beside(rank: int) -> None:
    from hal.compat import deep_ep

    sys.modules["deep_ep"] = deep_ep
    shape = Shape("dispatch", 9, experts=8, topk=2, hidden=256)
    idx, x, weights = routes(shape, rank), torch.randn(9, 256).bfloat16(), torch.rand(9, 2)
    options: dict[str, Any] = {"num_experts": 8, "hidden": 256, "topk": 2, "max_tokens_per_rank": 9}
    with hal.EpBuffer(**options) as buffer:
        theirs = ep_deep_ep.DeepEp(shape, 2)
        fp8 = (x.to(torch.float8_e4m3fn), torch.rand(9, 2))
        for rows in (x, fp8):
            require_same(
                {
                    "ours": lambda rows=rows: buffer.dispatch(rows, idx, weights),
                    "deep_ep": lambda rows=rows: theirs.dispatch(rows, idx, weights),
                }
            )
        got = buffer.dispatch(x, idx, weights)
        outputs = torch.randn(got.handle.num_recv_tokens, 256).bfloat16()
        back = theirs.combine(outputs, x, idx, weights)
        require_same({"ours": lambda: buffer.combine(outputs, got.handle), "deep_ep": back})
        theirs.close()
        theirs = ep_deep_ep.DeepEp(replace(shape, operation="low_latency_dispatch"), 2)
        low = buffer.low_latency_dispatch(x, idx, use_fp8=False)
        assert isinstance(low.recv_x, torch.Tensor)
        assert torch.equal(theirs.low_latency_dispatch(x, idx)[1], low.recv_count)
        packed = torch.randn(low.recv_x.shape).bfloat16()
        summed = theirs.low_latency_combine(packed, x, idx, weights)
        require_same(
            {
                "ours": lambda: buffer.low_latency_combine(packed, idx, weights, low.handle),
                "deep_ep": lambda: summed()[0],
            }
        )
        theirs.close()
        dist.barrier()


def left_out(rank: int) -> tuple[str, str]:
    """A peer that raises on one rank, then one that gives something else there, then one that is right."""
    here, found = Rank(Host()), []
    x = torch.arange(4.0)

    def raises() -> Any:
        raise RuntimeError("no memory\nmore")

    for theirs in (raises if rank else lambda: lambda: x, lambda: lambda: x + rank, lambda: lambda: x):
        calls: dict[str, Any] = {"ours": lambda: x}
        here.admit(calls, theirs, alike=True)
        found.append("deep_ep" in calls)
        if len(found) == 1:
            first = here.absent["deep_ep"]
    dist.barrier()
    assert found == [False, False, True]
    return first, here.absent["deep_ep"]


def test_a_peer_that_fails_on_one_rank_is_left_out_on_all_and_costs_nobody_else_anything() -> None:
    one, other = (outcome.value for outcome in run_ranks(2, left_out))
    assert one == ("another rank cannot ask it", "another rank cannot ask it")
    assert other[0] == "RuntimeError: no memory" and other[1].startswith(
        "it gives something else (AssertionError: deep_ep"
    )


def test_deep_ep_is_called_by_its_published_interface() -> None:
    """The drop-in has it, so what is called of DeepEP is called here of that."""
    run_ranks(2, beside, limit=60)
