"""``hal bench ep`` measures what it says, in the published form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from hal.bench import ep, ep_cases, ep_deep_ep, ep_report
from hal.bench.ep_cases import FULL, GROUPS, PUBLISHED, QUICK, TOP_GROUPS, Shape
from hal.bench.ep_peers import require_same
from hal.bench.ep_site import Device, Host
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


def test_cases_for_which_there_was_no_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(ranks: int, shapes: Any, overlaps: Any, seconds: float, budget: float, where: Any) -> ep.Found:
        asked.append(budget)
        return ep.Found(cases=[ep_report.report(shape, ranks, found()) for shape in list(shapes)[: 6 - ranks]])

    monkeypatch.setattr(ep, "run", run)
    shown, written = ep.measure([2, 4], False, None, published=True, budget=70.0)
    assert len(written["cases"]) == 6 and shown.endswith("\n4 cases were not begun: 70 s were over")
    assert 69.0 < asked[1] <= asked[0] <= 70.0
    assert "not begun" not in ep.measure([1], False, None, published=True)[0]


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


def test_groups_are_few_and_the_best() -> None:
    idx = ep_cases.routes(Shape("dispatch", 300, experts=256, routing="groups"), 1)
    groups = idx // (256 // GROUPS)
    assert all(len(set(row)) == 8 for row in idx.tolist())
    assert all(len(set(row)) <= TOP_GROUPS for row in groups.tolist())
    assert torch.bincount(groups.flatten(), minlength=GROUPS).min() > 0


def found(**changes: Any) -> dict[str, Any]:
    times = {"ours": [2e-3] * 3, "copy": [1e-3] * 3, "nccl": [4e-3] * 3, "deep_ep": [1e-3] * 3}
    return {"merged": times, "bytes": 7e6, "remote": 6e6, "rows": 1000.0} | changes


def test_published_cases_are_counted_as_they_were_published() -> None:
    fp8, bf16, combine, packed, summed = (ep_report.report(shape, 8, found()) for shape in PUBLISHED)
    # recv_x.numel() * 2 * f / t, with f = (1 + 4/128) / 2 for FP8.
    assert fp8["published_gbps"] == pytest.approx(1000 * 7168 * 2 * ((1 + 4 / 128) / 2) / 2e-3 / 1e9)
    assert bf16["published_gbps"] == combine["published_gbps"] == pytest.approx(1000 * 7168 * 2 / 2e-3 / 1e9)
    assert packed["published_gbps"] == pytest.approx(1000 * (7168 + 7168 / 128 * 4 + 16) / 2e-3 / 1e9)
    assert summed["published_gbps"] == bf16["published_gbps"]
    # 6e6 bytes of others in 2 ms, beside a copy of 7e6 bytes in 1 ms.
    assert fp8["remote_of_copy"] == pytest.approx(6 / 2 / 7)
    assert not any("published_gbps" in ep_report.report(shape, 8, found()) for shape in QUICK)
    shown = ep_report.table([fp8])
    assert "f = (1 + 4/128) / 2" in shown and "153 GB/s" in shown


def test_the_table_of_a_device_has_its_peers_and_says_who_is_not_there() -> None:
    (shape, *_) = PUBLISHED
    one = ep_report.report(shape, 8, found())
    assert list(one["peers"]) == ["nccl", "deep_ep"] and one["peers"]["nccl"]["speedup"] == 2.0
    assert "copy: 43%" in ep_report.table([one])
    head, row, *_, last = ep_report.table([one], absent={"deep_ep": "not installed"}).splitlines()
    assert head.split()[-2:] == ["nccl", "deep_ep"] and row.split()[-2:] == ["2.00×", "0.50×"]
    assert last == "deep_ep is not beside it: not installed"
    written = ep_report.document([one], (), {"deep_ep": "not installed"}, "to the next device")
    assert written["limits"] == {"copy_gbps": 7.0, "copy": "to the next device"}
    assert written["absent"] == {"deep_ep": "not installed"}
    assert ep_report.document([one]).keys() == {"limits", "cases", "overlap"}


class _Mark:
    """An event of a device whose calls take two milliseconds each, and nothing else any time."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        assert device.index == 1 and enable_timing
        self.at = -1

    def record(self) -> None:
        self.log.append("mark")
        self.at = self.log.count("call")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, after: _Mark) -> float:
        return 2.0 * (after.at - self.at)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with four devices, of which only what happens to them is known."""
    log: ClassVar[list[str]] = []
    monkeypatch.setattr(_Mark, "log", log)
    monkeypatch.setattr(torch, "Event", _Mark)
    module = SimpleNamespace(
        device_count=lambda: 4,
        set_device=lambda index: log.append(f"device {index}"),
        synchronize=lambda device: log.append("idle"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    return log


def test_ranks_have_devices_of_their_own_and_their_library_only_then(devices: list[str]) -> None:
    own, shared = Device("cuda", 1, 4), Device("cuda", 5, 8)
    assert devices == ["device 1", "device 1"]
    assert (own.exchange, own.group, own.absent) == ("nccl", "cpu:gloo,cuda:nccl", "")
    assert (shared.exchange, shared.group) == ("", "gloo") and "8 ranks share 4 devices" in shared.absent


def test_a_call_on_a_device_is_timed_from_when_it_is_made_until_it_is_done(devices: list[str]) -> None:
    own = Device("cuda", 1, 4)
    devices.clear()
    assert own.timed(lambda: devices.append("call"), 2) == [2e-3, 2e-3]
    assert devices == ["idle", "mark", "call", "mark", "wait"] * 2


def test_compute_beside_a_call_is_compared_with_the_same_compute_alone(
    devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Device("cuda", 1, 4)
    monkeypatch.setattr(own, "_product", lambda: devices.append("call"))
    assert own.compute(0.01) == 1.0
    assert devices.count("call") == 23 + 5
    monkeypatch.setattr(own, "_product", lambda: devices.extend(["call", "call"]))
    assert own.compute(0.01) == 2.0
    assert Host().compute(0.001) == 1.0


def test_deep_ep_is_asked_where_it_is_itself_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "DeepEP is not installed" in ep_deep_ep.missing()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == ep_deep_ep._COMPILED or None)
    monkeypatch.setitem(__import__("sys").modules, "deep_ep", None)
    assert "deep_ep does not import" in ep_deep_ep.missing()


def test_wrong_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, said in ((["--quick", "--published"], "not both"), (["--backend", "nobody"], "nobody")):
        done = CliRunner().invoke(app, ["bench", "ep", *options])
        assert done.exit_code == 2 or "nobody" in str(done.exception), done.output
        assert said in done.output + str(done.exception)
