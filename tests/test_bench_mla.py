"""``hal bench mla``: no speed without a right result, and every exit code."""

from __future__ import annotations

import importlib.metadata
import json
import math
import xml.etree.ElementTree

import pytest
import torch
from bench_backends import PlantedPeer
from typer.testing import CliRunner

import hal.bench.peers
from hal import plugins
from hal.bench import limits, rounds
from hal.bench.cases import MlaCase
from hal.bench.data import make
from hal.bench.mla import verdict
from hal.bench.peers import MLA_PEERS
from hal.cli.app import app

CASE = "b2_h3_s100_q2_causal_varlen_bf16"
SMALL = ("--case", CASE, "--rounds", "3")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other are slow where tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """Backends of this module only, and limits and working sets too small to cost time."""
    names = ("right", "wrong", "fading")
    found = [importlib.metadata.EntryPoint(name, f"bench_backends:{name}", plugins.GROUP) for name in names]
    monkeypatch.setattr(plugins, "_registry", plugins.Registry(found))
    monkeypatch.setattr(plugins, "_used", None)
    monkeypatch.delenv(plugins.ENV, raising=False)
    monkeypatch.setattr(limits, "GEMM", 64)
    monkeypatch.setattr(limits, "_HOST_BUFFER", 1 << 12)
    monkeypatch.setattr(limits, "last_level_cache", lambda: 1 << 10)
    monkeypatch.setattr("hal.bench.data.last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr(rounds, "TURN_SECONDS", 1e-4)
    monkeypatch.setattr(rounds, "REST_SECONDS", 0.0)


def bench(*arguments, command="mla"):
    return CliRunner().invoke(app, ["bench", command, *map(str, arguments)], env={"COLUMNS": "80"})


def with_peers(monkeypatch, *peers):
    monkeypatch.setattr(hal.bench.peers, "MLA_PEERS", peers)


def test_the_document_has_exactly_the_schema(tmp_path, monkeypatch):
    with_peers(monkeypatch, PlantedPeer("quiet"))
    file = tmp_path / "new.json"
    done = bench("--backend", "right", *SMALL, "--json", file)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    assert set(document) == {"limits", "cases", "machine"}
    assert document["machine"]["device"].startswith("a planted backend")
    assert document["machine"]["date"].endswith("UTC")
    assert set(document["limits"]) == {"sgemm_gflops", "copy_gbps"}
    (case,) = document["cases"]
    assert set(case) == {"name", "ms_p50", "gflops", "gbps", "fraction_of_limit", "peers"}
    assert case["name"] == CASE
    assert set(case["peers"]) == {"quiet"}
    assert set(case["peers"]["quiet"]) == {"ms_p50", "speedup"}
    data = make(MlaCase.parse(CASE), 0, torch.device("cpu"))
    seconds = case["ms_p50"] / 1e3
    assert case["gflops"] == pytest.approx(data.flop / seconds / 1e9)
    assert case["gbps"] == pytest.approx(data.moved / seconds / 1e9)
    roof = min(document["limits"]["sgemm_gflops"], data.flop / data.moved * document["limits"]["copy_gbps"])
    assert case["fraction_of_limit"] == pytest.approx(case["gflops"] / roof)
    assert case["peers"]["quiet"]["speedup"] == pytest.approx(case["peers"]["quiet"]["ms_p50"] / case["ms_p50"])


def test_the_record_holds_every_sample(tmp_path, monkeypatch):
    with_peers(monkeypatch, PlantedPeer("quiet"), PlantedPeer("weak", reason="s_q > 1"))
    file = tmp_path / "record.json"
    assert bench("--backend", "right", *SMALL, "--record", file).exit_code == 0
    record = json.loads(file.read_text())
    assert record["backend"] == "right"
    assert record["machine"]["threads"] == torch.get_num_threads()
    contenders = record["cases"][0]["contenders"]
    assert {name: len(entry["seconds"]) for name, entry in contenders.items()} == {"right": 3, "quiet": 3, "weak": 0}
    assert contenders["weak"]["reason"] == "cannot: s_q > 1"
    assert {len(samples) for samples in record["limits"].values()} == {3}


@pytest.mark.parametrize(("backend", "says"), [("wrong", "WRONG: 1 of"), ("fading", "WRONG after timing: 1 of")])
def test_a_wrong_backend_gets_no_speed(tmp_path, monkeypatch, backend, says):
    with_peers(monkeypatch, PlantedPeer("quiet"))
    file = tmp_path / "new.json"
    done = bench("--backend", backend, *SMALL, "--json", file)
    assert done.exit_code == 1
    flat = " ".join(done.output.split())
    assert says in flat
    assert f"NO SPEED for {CASE}" in flat
    (case,) = json.loads(file.read_text())["cases"]
    assert case == dict.fromkeys(("ms_p50", "gflops", "gbps", "fraction_of_limit")) | {"name": CASE, "peers": {}}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("one row", "WRONG: 1 of"),
        ("does nothing", "WRONG: 12 of 12 rows"),
        ("raises", "failed: RuntimeError: planted failure"),
    ],
)
def test_a_wrong_peer_gets_no_speed_and_costs_the_others_nothing(tmp_path, monkeypatch, spoil, says):
    with_peers(monkeypatch, PlantedPeer("quiet"), PlantedPeer("spoilt", spoil=spoil))
    file = tmp_path / "new.json"
    done = bench("--backend", "right", *SMALL, "--json", file)
    assert done.exit_code == 0, done.output
    assert says in " ".join(done.output.split())
    (case,) = json.loads(file.read_text())["cases"]
    assert set(case["peers"]) == {"quiet"}
    assert "geometric mean" in done.output
    assert done.output.count("spoilt  ") == 2  # once among the peers, once in the table, never in a mean


def test_processor_time_is_said_to_be_it(monkeypatch):
    with_peers(monkeypatch)
    done = bench("--backend", "right", *SMALL, "--clock", "cpu", "--threads", "1")
    assert done.exit_code == 0, done.output
    assert "processor time of one thread, not time on the wall" in done.output


def test_absent_and_unable_peers_say_why(monkeypatch):
    with_peers(monkeypatch, PlantedPeer("gone", here=False), PlantedPeer("weak", reason="paging"))
    done = bench("--backend", "right", *SMALL)
    assert done.exit_code == 0
    flat = " ".join(done.output.split())
    assert "not here: planted is not installed (pip install planted)" in flat
    assert "weak cannot: paging" in flat
    assert "does not do: lse" in flat


def test_a_case_the_backend_does_not_declare_is_no_failure_but_nothing_was_measured(monkeypatch):
    with_peers(monkeypatch)
    done = bench("--backend", "right", "--case", "b1_h1_s64_fp16", "--rounds", "3")
    assert done.exit_code == 1
    assert "cannot: UnsupportedError" in " ".join(done.output.split())


def test_everything_fits_80_columns(monkeypatch):
    with_peers(monkeypatch, *MLA_PEERS[:2], PlantedPeer("spoilt", spoil="one row"), PlantedPeer("gone", here=False))
    done = bench("--backend", "right", *SMALL)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "\x1b" not in done.output


def test_against_an_earlier_run(tmp_path, monkeypatch):
    with_peers(monkeypatch)
    old = tmp_path / "old.json"
    earlier = {"name": CASE, "ms_p50": 1e9, "fraction_of_limit": 1e-12}
    old.write_text(json.dumps({"cases": [earlier, {"name": "another"}]}))
    done = bench("--backend", "right", *SMALL, "--against", old)
    assert done.exit_code == 0, done.output
    after = done.output[done.output.index("against the earlier run") :]
    assert CASE in after
    assert "another" in after


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--backend", "rihgt", *SMALL), "rihgt"),
        (("--peer", "vlm", *SMALL), "Did you mean 'vllm'?"),
        (("--case", "b1_h1"), "lacks s"),
        (("--case", "b1_h1_s64", "--quick"), "not both"),
        (("--case", "b1_h1_s64", "--rounds", "1"), "--rounds"),
        (("--case", "b4096_h1_s9999999"), "is free"),
        ((*SMALL, "--against", "absent.json"), "cannot be read"),
        ((*SMALL, "--json", "absent/new.json"), "cannot be written"),
        ((*SMALL, "--json", "."), "cannot be written"),
        ((*SMALL, "--clock", "cpu", "--threads", "2"), "--threads 1"),
        ((*SMALL, "--clock", "sun"), "sun"),
        (("--surprise",), "--surprise"),
    ],
)
def test_a_wrong_request_is_a_usage_error(arguments, says, capsys, monkeypatch):
    from hal.cli import app as entry

    monkeypatch.setattr("sys.argv", ["hal", "bench", "mla", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        entry.main()
    assert done.value.code == 2
    assert says in capsys.readouterr().err


def test_plots_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    done = bench("--backend", "right", *SMALL, "--plots", tmp_path)
    assert done.exit_code == 2
    assert "pip install" in " ".join(done.output.split())


def test_plots_are_drawn_for_axes_that_vary(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="not installed: pip install 'kernel-hal[bench]'")
    with_peers(monkeypatch, PlantedPeer("quiet"))
    cases = ("b1_h2_s64", "b1_h2_s128", "b2_h2_s64", "b1_h4_s64", "b1_h2_s64_t1")
    done = bench("--backend", "right", *(x for c in cases for x in ("--case", c)), "--rounds", 3, "--plots", tmp_path)
    assert done.exit_code == 0, done.output
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == ["roofline.svg", "scaling_b.svg", "scaling_h_q.svg", "scaling_s_k.svg"]
    for file in tmp_path.iterdir():
        assert xml.etree.ElementTree.parse(file).getroot().tag.endswith("svg")
    assert "scaling_threads.svg: not drawn" in " ".join(done.output.split())


def test_list_measures_nothing(monkeypatch):
    with_peers(monkeypatch, PlantedPeer("gone", here=False))
    monkeypatch.setattr("hal.bench.mla.run", None)
    done = bench("--backend", "wrong", "--quick", "--list")
    assert done.exit_code == 0
    assert "b1_h16_s4096_bf16" in done.output
    assert "pip install planted" in done.output


@pytest.mark.parametrize("name", [CASE, "b1_h16_s200", "b3_h2_s128_fp16", "b2_h4_s130_q2", "b2_h2_s64_p16"])
@pytest.mark.parametrize("peer", MLA_PEERS, ids=lambda peer: peer.name)
def test_every_peer_that_is_here_is_right_or_says_what_it_cannot_do(peer, name):
    case = MlaCase.parse(name)
    if peer.elsewhere(torch.device("cpu")):
        pytest.skip(f"not applicable: {peer.elsewhere(torch.device('cpu'))}")
    found = peer.presence()
    if not found.here:
        # Peers are optional: one that is absent has to say so, and how to get it.
        assert found.what
        assert peer.install.startswith("pip install ")
        return
    if peer.cannot(case):
        return
    data = make(case, 0, torch.device("cpu"))
    prepared = peer.prepare(data, torch.get_num_threads())
    wrong = verdict(prepared, data)
    assert wrong == ""
    prepared.call(data.layers - 1)
    assert not prepared.result()[0].isnan().any()


def test_overhead_reports_every_level(tmp_path, monkeypatch):
    monkeypatch.setattr("hal.bench.overhead._IMPORT", "print(2.0, 0.25)")
    file = tmp_path / "overhead.json"
    done = bench("--backend", "right", "--rounds", "3", "--imports", "1", "--json", file, command="overhead")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    document = json.loads(file.read_text())
    calls = {(call["style"], call["level"]): call for call in document["calls"]}
    assert set(calls) == {(style, level) for style in ("steady", "bare") for level in ("off", "shapes", "full")}
    assert all(math.isfinite(call[key]) for call in calls.values() for key in call if key.endswith("_p50"))
    assert document["import"] == {"torch_ms_p50": 2000.0, "hal_ms_p50": 250.0}
