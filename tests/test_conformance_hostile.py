"""Backends that work on their judge, and surroundings that do: what the suite sees of them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import Distribution, install
from hal_conformance import manners
from hal_conformance.case import MlaCase
from hal_conformance.cli import app
from hal_conformance.decode import call
from hal_conformance.facts import dependencies, of_dependencies, reaches, required, unlisted
from hal_conformance.inputs import build
from hal_conformance.parcel import pack, unpack_plain
from hal_conformance.process import Secluded, Worker
from hal_conformance.ranks import GroupResult, RankResult
from hal_conformance.session import Session, Settings
from hal_conformance.table import BY_ID
from hal_conformance.waivers import LONGEST, read
from hal_conformance.witness import Departed, Tape, out_of_reach
from mutants.runner import WITNESS, installed
from typer.testing import CliRunner

import hal
from hal.reference import mla as reference


@pytest.fixture(autouse=True)
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.sampled
@pytest.mark.long(2)
@pytest.mark.parametrize(
    ("name", "obligation", "complaint"),
    [
        ("mutant-loosens-the-limits", "MLA-01", "judged apart from it: out differs from the reference"),
        ("mutant-silences-the-judge-of-ranks", "EPN-01", "judged apart from it: rank "),
        ("mutant-asks-the-reference", "CAP-05", "asked the reference"),
        ("mutant-lse-of-its-own", "MLA-13", "the tensor returned as lse is not the one given to write to"),
        # Which of the two it is depends on who is faster: the thread that stores, or the suite as it copies the result.
        ("mutant-stores-later", "MLA-01", "out was written after the call had returned|out differs from the reference"),
        ("mutant-blinds-the-guards", "MLA-01", "judged apart from it: 8 elements of memory around out were written"),
        (
            "mutant-rotates-queries-in-place",
            "MLA-01",
            "the input q was changed|out differs from the reference",
        ),
        ("mutant-copies-the-reference", "CAP-05", "asked the reference"),
        ("mutant-leaves-its-dtype", "MLA-01", "a call changed torch's default dtype"),
    ],
)
def test_what_a_backend_does_to_its_judge_and_its_process_is_seen(name: str, obligation: str, complaint: str) -> None:
    session = Session(Settings(name, 3, "quick"), [obligation], witness=WITNESS)
    session.stop_after = 1
    try:
        message = session.run_one(BY_ID[obligation]).message
        assert any(part in message for part in complaint.split("|")), message
    finally:
        session.close()


@pytest.mark.parametrize("layout", ["none", "padded"])
def test_what_is_written_once_a_call_has_returned_is_seen(layout: str) -> None:
    inputs = build(MlaCase(lengths=(5, 33), h_q=4, d=24, d_v=16, page=16, out_layout=layout), 1)
    outcome = call(inputs, "cpu")
    assert (outcome.problems, outcome.written_later()) == ([], [])
    for guarded in outcome.outputs:
        guarded.view[-1, -1, -1] += 1
        assert outcome.written_later() == [f"{guarded.name} was written after the call had returned"]
        guarded.seal()
        # Memory around it is no less watched than the result itself.
        guarded.storage[0] = 1.0
        assert outcome.written_later() == [f"{guarded.name} was written after the call had returned"]
        guarded.seal()
    assert sorted(guarded.name for guarded in outcome.outputs) == ["lse", "out"]


def test_a_changed_setting_is_named_and_set_back() -> None:
    before = manners.shared()
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    assert manners.changed(before) == ["torch's default dtype", "denormal numbers"]
    assert torch.get_default_dtype() == torch.float32
    assert manners.changed(before) == []


def test_every_case_of_numbers_has_a_witness_that_never_loads_the_backend() -> None:
    session = Session(Settings("sample", 3, "quick"), ["CAP-01", "MLA-03"], witness=WITNESS)
    try:
        results = {o: session.run_one(BY_ID[o]) for o in ("CAP-01", "MLA-03")}
    finally:
        session.close()
    assert [r.status for r in results.values()] == ["PASS", "PASS"]
    assert results["CAP-01"].witnessed == []
    assert results["MLA-03"].witnessed == list(range(results["MLA-03"].executed))


def test_a_tape_gives_what_it_holds_and_no_more() -> None:
    tape = Tape([GroupResult((RankResult(0, "done", "start", value=torch.ones(2)),))])
    assert tape.through(lambda: None).ranks[0].rank == 0
    with pytest.raises(Departed, match="more calls"):
        tape.through(lambda: None)


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_what_a_process_of_the_backend_sends_is_read_and_not_executed(capsys: pytest.CaptureFixture[str]) -> None:
    sent = [{"out": torch.ones(2, dtype=torch.bfloat16)}, GroupResult((RankResult(0, "done", "x", value=(1, "a")),))]
    got = unpack_plain(pack(sent))
    assert torch.equal(got[0]["out"], sent[0]["out"])  # type: ignore[index]
    assert got[1] == sent[1]
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        unpack_plain(pickle.dumps(_Evil()))
    assert capsys.readouterr().out == ""


def test_the_reference_is_out_of_reach_for_all_who_hold_it() -> None:
    held = reference.mla_decode
    with out_of_reach(held), pytest.raises(RuntimeError, match="asked the reference"):
        reference.mla_decode(*[torch.zeros(1)] * 4)
    assert held is reference.mla_decode
    with pytest.raises(TypeError):
        held()  # type: ignore[call-arg]


def test_neither_the_folder_nor_variables_decide_how_a_backend_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hal_conformance").mkdir()
    (tmp_path / "hal_conformance" / "__init__.py").write_text("raise SystemExit('of this folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAL_VALIDATE", "full")
    session = Session(Settings("mutant-asserts-on-bad-entry", 3, "quick"), ["CAP-01", "MLA-40"], witness=WITNESS)
    try:
        results = [session.run_one(BY_ID[o]).status for o in ("CAP-01", "MLA-40")]
    finally:
        session.close()
    assert results == ["PASS", "FAIL"]


def test_a_distribution_that_reaches_into_its_judge_is_named(tmp_path: Path) -> None:
    plain = Distribution("hal-plain", "x = 1\n", "plain")
    groups = {"hal.backends": {"sly": "hal_sly"}, "pytest11": {"sly": "hal_sly"}}
    folder = install(tmp_path, plain, Distribution("hal-sly", "x = 1\n", entry_points=groups))
    (folder / "sly.pth").write_text("import hal_sly\n")
    record = folder / "hal_sly-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "sly.pth,,\nsitecustomize.py,,\nhal/spec/limits.py,,\ntorch/sly.py,,\n")
    found = {d.name: reaches(d) for d in importlib.metadata.distributions(path=[str(folder)])}
    assert found["hal-plain"] == []
    assert found["hal-sly"] == [
        "it is loaded by pytest: hal_sly",
        "hal/spec/limits.py lies in the package hal",
        "sitecustomize.py is executed wherever Python starts",
        "sly.pth is executed wherever Python starts",
        "torch/sly.py lies in the package torch",
    ]


def test_a_dependency_that_reaches_into_its_judge_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far down, and unless the suite has it too."""
    groups = {"hal.backends": {"far": "hal_far"}}
    made = (
        Distribution(name, "x = 1\n", entry_points=groups if name == "hal-far" else {})
        for name in ("hal-far", "far-below", "deep-down")
    )
    folder = install(tmp_path, *made)
    for name, needs in (
        ("hal_far", "Far_Below>=1"),
        ("far_below", "deep.down[x]; python_version > '3'"),
        ("deep_down", "torch\nRequires-Dist: hal-far"),
    ):
        path = folder / f"{name}-1.0.dist-info" / "METADATA"
        path.write_text(path.read_text().rstrip() + f"\nRequires-Dist: {needs}\n")
    record = folder / "deep_down-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "deep.pth,,\ntorch/sly.py,,\n")
    monkeypatch.syspath_prepend(str(folder))
    assert required("hal-far") > {"hal-far", "far-below", "deep-down", "torch"}
    assert of_dependencies(dependencies(importlib.metadata.distribution("hal-far"))) == [
        "its dependency deep-down: deep.pth is executed wherever Python starts",
        "its dependency deep-down: torch/sly.py lies in the package torch",
    ]


def test_a_module_that_no_hash_is_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path, Distribution("hal-plain", "x = 1\n", "plain"))
    monkeypatch.syspath_prepend(str(folder))
    record = folder / "hal_plain-1.0.dist-info" / "RECORD"
    for kept, missing in ((True, []), (False, ["hal_plain.py is not among its listed files"])):
        lines = [line for line in record.read_text().splitlines() if kept or not line.startswith("hal_plain.py")]
        record.write_text("\n".join(lines))
        dist = next(iter(importlib.metadata.distributions(path=[str(folder)])))
        entry = next(e for e in dist.entry_points if e.group == "hal.backends")
        assert unlisted(entry, dist) == missing


def test_a_waiver_lasts_a_year_at_most(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    last = datetime.date.today() + LONGEST
    line = "[[waiver]]\nobligation = 'MLA-07'\nreason = 'due'\nexpires = {}\n"
    path.write_text(line.format(last))
    assert read(path)["MLA-07"].expires == last
    path.write_text(line.format(last + datetime.timedelta(days=1)))
    with pytest.raises(hal.SpecError, match="expires"):
        read(path)


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_patience_without_end_is_a_wrong_request(factor: str) -> None:
    assert CliRunner().invoke(app, ["--backend", "cpu", "--only", "CAP-01", "--patience", factor]).exit_code == 2


def test_a_place_that_takes_no_report_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["-b", "cpu", "--only", "CAP-01", "--out", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert "--out: nothing can be written to" in done.output
    assert "run, seed" not in done.output
    (tmp_path / "report.json").mkdir()
    done = CliRunner().invoke(app, ["-b", "cpu", "--only", "CAP-01", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a folder" in done.output


def test_a_case_brings_its_own_seed() -> None:
    done = CliRunner().invoke(app, ["-b", "cpu", "--case", "MLA-07@5.0", "--seed", "9"])
    assert done.exit_code == 2
    assert "leave out --only and --seed" in done.output


def hooks_into_torch(folder: Path, hook: str) -> None:
    """A distribution whose hook torch runs wherever it is imported."""
    (folder / "hooked.py").write_text(f"def load():\n    {hook}\n")
    metadata = folder / "hooked-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hooked\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nhooked = hooked:load\n")


def test_no_entry_point_of_torch_runs_in_the_process_that_judges(tmp_path: Path) -> None:
    """It would tell the judge what to think of the backend; where backends run, devices need it."""
    hooks_into_torch(tmp_path, f"import pathlib, sys; pathlib.Path({str(tmp_path)!r}, sys.argv[0][-3:]).touch()")
    before = {path.name for path in tmp_path.iterdir()}
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [str(Path(sys.executable).with_name("hal")), "conform", "--backend", "cpu", "--quick", "--only", "CAP-01"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "report")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {path.name for path in tmp_path.iterdir()} - before - {"report", "__pycache__"}
    assert ran == {"-c"}, "in the worker, and not in the command"


def test_no_distribution_runs_code_in_the_witness_by_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``.pth`` and by an entry point of torch: each would loosen the judge in every process that has both."""
    hook = f"import pathlib, sys; pathlib.Path({str(tmp_path)!r}, str(len(sys.orig_argv))).touch()"
    hooks_into_torch(tmp_path, hook)
    (tmp_path / "sitecustomize.py").write_text(hook + "\n")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    request = {"op": "roofline", "settings": dataclasses.asdict(Settings("nobody", 1))}
    with Worker() as open_to_all:
        open_to_all.ask(request, 60)
    assert {path.name for path in tmp_path.iterdir()} - before - {"__pycache__"}, "the hooks work"
    for path in tmp_path.iterdir():
        if path.name not in before and path.is_file():
            path.unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with Secluded() as alone:
        alone.ask(request, 60)
    assert {path.name for path in tmp_path.iterdir()} - before - {"__pycache__"} == set()
