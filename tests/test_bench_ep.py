"""``hal bench ep`` measures what it says, in the published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hal.bench import ep, ep_cases, ep_report
from hal.bench.ep_cases import FULL, QUICK, Shape
from hal.bench.ep_peers import require_same
from hal.cli.app import app

SMALL = [
    Shape("dispatch", 4, experts=8, topk=2, hidden=128),
    Shape("combine", 4, experts=8, topk=2, hidden=128, routing="zipf"),
    Shape("dispatch", 4, experts=8, topk=2, hidden=128, fp8=True),
    Shape("low_latency_combine", 4, experts=8, topk=2, hidden=128),
]


def test_a_small_run_has_the_published_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ep, "QUICK", SMALL)
    monkeypatch.setattr(ep, "OVERLAPS", SMALL[:1])
    path = tmp_path / "ep.json"
    done = CliRunner().invoke(app, ["bench", "ep", "--quick", "--seconds", "0.2", "--json", str(path)])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert found["limits"]["copy_gbps"] > 0
    assert [case["name"] for case in found["cases"]] == [shape.name for shape in SMALL]
    for case in found["cases"]:
        assert case["ranks"] == 2
        assert case["tokens"] == 4
        assert 0 < case["us_p10"] <= case["us_p50"] <= case["us_p99"]
        assert 0 < case["remote_gbps"] < case["gbps"]
        assert case["fraction_of_copy"] > 0
        assert case["peers"]["gloo"]["speedup"] == pytest.approx(case["peers"]["gloo"]["us_p50"] / case["us_p50"])
        assert ("gloo_whole" in case["peers"]) == (not case["operation"].startswith("low_latency"))
        assert case["name"] in done.output
    (overlap,) = found["overlap"]
    assert overlap["receive_us"] > 0
    assert overlap["visible"] == pytest.approx(overlap["visible_us"] / overlap["receive_us"])


def test_the_full_table_is_the_one_that_was_promised() -> None:
    promised = {
        (operation, tokens, experts, fp8, routing)
        for operation in ("dispatch", "combine")
        for tokens in (1, 16, 128, 1024, 4096)
        for experts in (64, 256)
        for fp8 in ((False, True) if operation == "dispatch" else (False,))
        for routing in (("uniform", "zipf") if not fp8 or experts == 64 else ("uniform",))
    }
    there = [(s.operation, s.tokens, s.experts, s.fp8, s.routing) for s in FULL]
    assert promised <= set(there)
    assert len(there) == len(set(there))
    assert {shape.hidden for shape in (*FULL, *QUICK)} == {7168}


def test_routes_are_distinct_and_zipf_is_skewed() -> None:
    for routing in ("uniform", "zipf"):
        idx = ep_cases.routes(Shape("dispatch", 500, routing=routing), 0)
        assert all(len(set(row)) == 8 for row in idx.tolist())
    counts = torch.bincount(idx.flatten(), minlength=64)
    assert counts[0] > 4 * counts[32]


def test_a_quantile_is_an_observation() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [ep_report.quantile(values, q) for q in (0.1, 0.5, 0.99)] == [10.0, 50.0, 99.0]


def test_a_peer_that_gives_something_else_is_not_timed() -> None:
    x = torch.randn(3, 4)
    require_same({"ours": lambda: x, "same": lambda: x + 0.001})
    with pytest.raises(AssertionError, match="other: Tensor-likes are not close"):
        require_same({"ours": lambda: x, "other": lambda: x + 1})
