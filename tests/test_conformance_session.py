"""Runs of the suite: what becomes of crashes, hangs, refusals, waivers and filters, and of wrong requests."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hal_conformance import cli, html, progress, report, verdict
from hal_conformance.cli import app
from hal_conformance.consistency import consistency
from hal_conformance.context import Settings
from hal_conformance.ep_draw import EpDraw
from hal_conformance.process import Worker
from hal_conformance.session import RED, Result, Session
from hal_conformance.table import BY_ID, OBLIGATIONS, Obligation
from hal_conformance.waivers import Waiver, read
from mutants.runner import WITNESS, installed
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import hal
from hal.spec.capability import only

TODAY = datetime.date.today()
LATER, BEFORE = TODAY + datetime.timedelta(days=30), TODAY - datetime.timedelta(days=1)


@pytest.fixture(autouse=True)
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


Run = Callable[..., Session]


@pytest.fixture
def run(kept_worker: Worker) -> Run:
    """Run the suite in a worker that stays: what is run here leaves it as it was, or ends it."""

    def ran(backend: str, *only: str, **waivers: Waiver) -> Session:
        named = {name.replace("_", "-"): waiver for name, waiver in waivers.items()}
        session = Session(Settings(backend, 11, "quick"), only, None, named, witness=WITNESS)
        session.stop_after = 1
        session.worker = kept_worker
        session.run()
        return session

    return ran


def statuses(session: Session) -> dict[str, str]:
    return {r.id: r.status for r in session.results.values() if r.status != "SKIPPED"}


def test_a_correct_backend_passes_and_what_it_lacks_is_seen_refused(run: Run) -> None:
    session = run("sample", "CAP-01", "CAP-05", "MLA-07", "MLA-22", "SPA-01", "SNK-01", "FP8-01", "FP8-02", "XTR-01")
    assert statuses(session) == {
        "CAP-01": "PASS",
        "CAP-05": "PASS",
        "MLA-07": "PASS",
        "MLA-22": "PASS",
        "SPA-01": "REFUSED",
        "SNK-01": "REFUSED",
        "FP8-01": "REFUSED",
        "FP8-02": "REFUSED",
        "XTR-01": "REFUSED",
    }
    assert all(r.calls for r in session.results.values() if r.status in ("PASS", "REFUSED"))


def test_a_failure_blocks_the_levels_above_and_names_its_cause_and_one_line_that_repeats_it(run: Run) -> None:
    session = run("mutant-causal-one-more", "CAP-01", "MLA-07", "MLA-22")
    assert statuses(session) == {"CAP-01": "PASS", "MLA-07": "FAIL", "MLA-22": "BLOCKED"}
    failure = session.results["MLA-07"].failures[0]
    assert failure["diagnosis"]["cause"] == "causal is off by one: a query sees one key too many"
    line = failure["reproduce"]
    assert line.startswith("hal conform --backend mutant-causal-one-more --case MLA-07@11.")
    again = Session(Settings("mutant-causal-one-more", 11, "quick"), ["MLA-07"], failure["index"], witness=WITNESS)
    try:
        again.run()
    finally:
        again.close()
    assert again.results["MLA-07"].failures[0]["problems"] == failure["problems"]


def test_a_crash_is_recorded_and_the_run_goes_on(run: Run) -> None:
    session = run("mutant-crash-on-empty", "MLA-20", "MLA-22")
    assert statuses(session) == {"MLA-20": "CRASH", "MLA-22": "PASS"}
    assert "SIGSEGV" in session.results["MLA-20"].message
    assert "ctypes" in session.results["MLA-20"].failures[0]["output"]


@pytest.mark.long(16)
def test_a_hang_is_recorded_with_the_stack_and_the_run_goes_on() -> None:
    session = Session(
        Settings("mutant-hangs-on-long", 11, "quick"), ["CAP-01", "MLA-35", "MLA-33", "MLA-20"], witness=WITNESS
    )
    session.stop_after = 1
    short = dataclasses.replace(BY_ID["MLA-33"], timeout=10.0)
    try:
        # Only what hangs has little time, in a process that has started: starting another may take its own.
        for obligation in (BY_ID["CAP-01"], BY_ID["MLA-35"], short, BY_ID["MLA-20"]):
            session.run_one(obligation)
    finally:
        session.close()
    assert statuses(session) == {"CAP-01": "PASS", "MLA-35": "PASS", "MLA-33": "TIMEOUT", "MLA-20": "PASS"}
    assert "mla_decode" in session.results["MLA-33"].failures[0]["output"]


def test_a_plugin_that_cannot_load_fails_at_the_gate(run: Run) -> None:
    session = run("mutant-exits-at-load")
    seen = statuses(session)
    assert seen.pop("CAP-01") == "FAIL"
    assert set(seen.values()) == {"BLOCKED"}


def test_a_plugin_that_cannot_load_is_an_error_whatever_is_chosen_and_said_once(run: Run) -> None:
    session = run("mutant-exits-at-load", "MLA-01", "MLA-02", "EPN-01")
    assert statuses(session) == {"MLA-01": "ERROR", "MLA-02": "BLOCKED", "EPN-01": "BLOCKED"}
    assert "could not be asked what it declares: " in session.results["MLA-01"].message
    assert report.make(session)["verdict"] == "FAIL"


def test_a_wrong_result_is_bisected_from_outside_where_no_partial_results_are_exposed(run: Run) -> None:
    session = run("mutant-token-after-boundary-lost", "MLA-23")
    index = session.results["MLA-23"].failures[0]["index"]
    settings = dataclasses.asdict(session.settings)
    request = {"op": "bisect", "settings": settings, "obligation": "MLA-23", "index": index}
    with Worker() as worker:
        found = worker.ask(request, 120.0)
    assert "exposes no partial results" in found["verdict"]
    page = found["case"].get("page", 64)
    first = next(row for row in found["rows"] if not row["ok"])
    assert first["where"].endswith(f"first {page + 1} keys")


def test_a_fallback_is_seen_where_it_happens(run: Run) -> None:
    session = run("mutant-falls-back-for-long", "CAP-07", "MLA-09")
    assert statuses(session) == {"CAP-07": "PASS", "MLA-09": "FAIL"}
    assert "no kernel of this backend was launched" in session.results["MLA-09"].message
    cases = run("sample", "MLA-09").results["MLA-09"].cases
    assert [c["launches"] for c in cases] == [{"torch:attend@cpu": n} for n in (1, 1, 1, 2)]


def test_an_obligation_that_calls_nothing_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Settings("sample", 1, "quick"), ["MLA-01"])
    answers = {"facts": {}, "count": {"count": 2}, "case": {"problems": [], "calls": 0}, "tape": {}}
    monkeypatch.setattr(session.worker, "ask", lambda request, timeout: answers[request["op"]])
    monkeypatch.setattr(session.witness, "ask", lambda request, timeout: answers["case"])
    session.facts = {"state": "available"}
    session.capabilities = hal.capabilities("cpu")
    session.run()
    assert session.results["MLA-01"].status == "ERROR"
    assert session.results["MLA-01"].message == "nothing was executed in case 0"


def test_waivers_never_pass_and_must_be_needed_and_in_force(run: Run) -> None:
    mine = {"MLA_07": Waiver("MLA-07", "due in 2.1", LATER), "MLA_08": Waiver("MLA-08", "not needed", LATER)}
    session = run("mutant-causal-one-more", "CAP-01", "MLA-07", "MLA-08", "MLA-22", **mine)
    assert statuses(session) == {"CAP-01": "PASS", "MLA-07": "WAIVED", "MLA-08": "PASS", "MLA-22": "PASS"}
    assert session.waiver_problems() == ["the waiver of MLA-08 is not used: it is PASS; remove it"]
    made = report.make(session)
    assert made["verdict"] == "FAIL"
    assert "1 waived: MLA-07" in made["headline"]
    expired = run("mutant-causal-one-more", "MLA-07", MLA_07=Waiver("MLA-07", "was due", BEFORE))
    assert statuses(expired) == {"MLA-07": "FAIL"}
    assert "expired" in expired.waiver_problems()[0]


@pytest.mark.parametrize(
    ("backend", "waived"), [("sample", ""), ("mutant-causal-one-more", "MLA-07"), ("mutant-crash-on-empty", "MLA-20")]
)
@pytest.mark.long(4)
def test_what_a_run_says_of_itself_holds_together(backend: str, waived: str, kept_worker: Worker) -> None:
    waivers = {waived: Waiver(waived, "due in 2.1", LATER)} if waived else {}
    chosen = ["CAP-01", "MLA-07", "MLA-20", "SPA-01"]
    session = Session(Settings(backend, 11, "quick"), chosen, waivers=waivers, witness=WITNESS, fresh=True)
    session.worker = kept_worker
    session.run()
    made = json.loads(json.dumps(report.make(session)))
    assert {waiver["obligation"] for waiver in made["waivers"]} == set(waivers)
    assert consistency(made) == []


def test_a_waiver_that_a_filter_leaves_unjudged_is_said_to_be(run: Run) -> None:
    mine = {"MLA_08": Waiver("MLA-08", "due in 2.1", LATER), "MLA_07": Waiver("MLA-07", "was due", BEFORE)}
    session = run("sample", "CAP-01", **mine)
    note = "whether the waiver of MLA-08 is needed was not judged: it was not run (filtered out)"
    assert session.notes() == [note]
    made = report.make(session)
    assert made["notes"] == [note]
    assert note in html.render(made)
    assert "expired" in made["problems"][0]


def test_a_waiver_is_not_judged_by_one_case_nor_by_a_run_that_was_interrupted(kept_worker: Worker) -> None:
    waivers = {"MLA-21": Waiver("MLA-21", "due in 2.1", LATER), "SPA-01": Waiver("SPA-01", "due in 3", LATER)}
    one = Session(Settings("sample", 11, "quick"), ["MLA-21"], 1, waivers, witness=WITNESS)
    one.worker = kept_worker
    one.run()
    assert statuses(one) == {"MLA-21": "PASS"}
    assert one.waiver_problems() == []
    assert [text.split(": ", 1) for text in one.notes()] == [
        ["whether the waiver of MLA-21 is needed was not judged", "only one of its cases was run"],
        ["whether the waiver of SPA-01 is needed was not judged", "it was not run (filtered out)"],
    ]
    ended = Session(Settings("sample", 11, "quick"), waivers=waivers, witness=WITNESS)
    ended.leave_the_rest()
    assert "it was not run (interrupted)" in ended.notes()[0]
    refused = Session(Settings("sample", 11, "quick"), ["SPA-01"], 0, waivers, witness=WITNESS)
    refused.worker = kept_worker
    refused.run()
    assert refused.waiver_problems() == ["the waiver of SPA-01 is not used: it is REFUSED; remove it"]


@pytest.mark.parametrize("options", [["--case", "MLA-07@5.24"], ["--case", "MLA-07@5.4", "--quick"]], ids=" ".join)
def test_a_case_that_does_not_exist_is_a_wrong_request_that_names_those_that_do(
    options: list[str], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["--backend", "cpu", *options, "--out", str(tmp_path)])
    assert done.exit_code == 2, done.output
    last, mode = (3, "quick") if "--quick" in options else (23, "default")
    assert f"legal: MLA-07@5.0 to MLA-07@5.{last}, which a {mode} run of this seed has" in done.output
    assert not (tmp_path / "report.json").exists()


def test_the_last_case_of_an_undeclared_obligation_is_its_refusal(tmp_path: Path) -> None:
    done = [
        CliRunner().invoke(app, ["--backend", "cpu", "--case", f"SPA-01@5.{index}", "--out", str(tmp_path)])
        for index in (0, 1)
    ]
    assert [one.exit_code for one in done] == [0, 2], [one.output for one in done]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[waiver]]\nobligation='MLA-99'\nreason='x'\nexpires=2030-01-01", "MLA-99"),
        ("[[waiver]]\nobligation='MLA-07'\nreason=' '\nexpires=2030-01-01", "reason"),
        ("[[waiver]]\nobligation='MLA-07'\nreason='x'\nexpires='soon'", "expires"),
        ("[[waiver]]\nobligation='MLA-07'\nreason='x'", "exactly"),
        ("[[waiver]", "TOML"),
        ("waiver=[1]", "exactly"),
        ("[[waiver]]\nobligation=['MLA-07']\nreason='x'\nexpires=2030-01-01", "an id of"),
        ("waive_all = true", "nothing else"),
    ],
)
def test_a_waiver_file_that_is_wrong_is_a_wrong_request(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    with pytest.raises(hal.SpecError, match=complaint):
        read(path)
    done = CliRunner().invoke(app, ["--backend", "cpu", "--waivers", str(path)])
    assert done.exit_code == 2


@pytest.mark.parametrize("text", ["", "# all fixed\n", "waiver = []"])
def test_a_waiver_file_without_waivers_waives_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    assert read(path) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "nope"],
        ["--backend", ""],
        ["--backend", "cpu", "--only", "MLA-99"],
        ["--backend", "cpu", "--only", "L9"],
        ["--backend", "cpu", "--case", "MLA-07"],
        ["--backend", "cpu", "--case", "MLA-99@1.1"],
        ["--backend", "cpu", "--tighten", "2"],
        ["--backend", "cpu", "--quick", "--full"],
        ["--backend", "cpu", "--against", "/nowhere.json"],
        ["verify", "/nowhere.json"],
        ["matrix", "/nowhere.json"],
        ["bisect", "MLA-07", "--backend", "cpu"],
        ["bisect", "MLA-07@1.99999", "--backend", "cpu"],
        ["bisect", "SPA-01@1.0", "--backend", "cpu"],
        ["bisect", "CAP-01@1.0", "--backend", "cpu"],
        ["bisect", "EPN-01@1.0", "--backend", "cpu"],
        ["--backend", "cpu", "bisect", "MLA-07@1.0", "--backend", "cpu"],
        ["--quick", "matrix", "/nowhere.json"],
    ],
    ids=" ".join,
)
def test_wrong_requests_exit_with_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAL_BACKEND", raising=False)
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_a_wrong_request_says_what_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAL_BACKEND", raising=False)

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return done.output

    assert "SPA-01 is not tested by this suite yet" in said("bisect", "SPA-01@1.0", "-b", "cpu")
    assert "only a decode has stages" in said("bisect", "EPN-01@1.0", "-b", "cpu")
    assert "--quick, --seed before matrix would not be heard" in said("--quick", "--seed", "1", "matrix", "a.json")


def test_a_device_that_is_not_declared_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(Settings("cpu", 1))
    session.capabilities = hal.capabilities("cpu")
    for device, wrong in (("", False), ("cpu", False), ("bogus", True), ("cuda", True), ("cpu:x", True)):
        session.settings.device = device
        if not wrong:
            cli.require_device(session)
            continue
        with pytest.raises(typer.Exit) as ended:
            cli.require_device(session)
        assert ended.value.exit_code == 2
        assert f"--device {device}: cpu has cpu" in capsys.readouterr().err


def test_groups_have_the_size_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Settings("cpu", 1, ranks=8))
    capabilities = hal.capabilities("cpu")
    declared = capabilities.ep
    assert declared is not None
    told = {"capabilities": capabilities.to_dict()}
    monkeypatch.setattr(session.worker, "ask", lambda *given: told)
    session.learn()
    assert session.filtered and session.command().endswith("--ranks 8")
    for asked, sizes, made in ((8, (3, 2), {8}), (8, (4,), {4}), (0, (3, 2), {2, 3})):
        drawn = [EpDraw(random.Random(index), declared, index, asked).base(sizes) for index in range(4)]
        assert {case.ranks for case in drawn} == made
        assert all(len(case.tokens) == case.ranks for case in drawn)
    for ep, legal in ((replace(declared, ranks=only(2, 4)), "2 or 4, as declared"), (None, "no groups are declared")):
        told["capabilities"] = replace(capabilities, ep=ep).to_dict()
        with pytest.raises(hal.SpecError, match=f"--ranks: got 8.*{legal}"):
            session.learn()


def test_levels_follow_from_their_obligations() -> None:
    assert verdict.level_verdict([]) == "EMPTY"
    assert verdict.level_verdict(["PASS", "REFUSED"]) == "PASS"
    assert verdict.level_verdict(["REFUSED"]) == "UNDECLARED"
    assert verdict.level_verdict(["PASS", "WAIVED"]) == "WAIVED"
    assert verdict.level_verdict(["PASS", "UNCOVERED"]) == "UNCOVERED"
    assert verdict.level_verdict(["PASS", "SKIPPED"]) == "INCOMPLETE"
    assert verdict.level_verdict(["WAIVED", "BLOCKED"]) == "BLOCKED"
    for red in RED:
        assert verdict.level_verdict(["PASS", "WAIVED", red, "BLOCKED"]) == "FAIL"


def test_nothing_executed_is_a_failure() -> None:
    rows = verdict.levels({o.id: "REFUSED" for o in OBLIGATIONS})
    assert verdict.overall(rows, False, []) == ("FAIL", ["nothing was executed"])


def test_a_filter_is_never_a_pass() -> None:
    rows = verdict.levels({o.id: "PASS" for o in OBLIGATIONS})
    assert verdict.overall(rows, False, [])[0] == "PASS"
    assert verdict.overall(rows, True, [])[0] == "INCOMPLETE"


# One process, for most of what a run of pytest takes is to import torch.
_RUNS = """
import contextlib, io, json, sys
import pytest
answers = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--pyargs", "hal_conformance", *arguments])
    answers.append((int(code), said.getvalue()))
print(json.dumps(answers))
"""


@pytest.mark.long(6)
def test_the_pytest_plugin_runs_obligations_and_refuses_wrong_requests(tmp_path: Path) -> None:
    chosen = ["--hal-mode", "quick", "--hal-only", "CAP-01", "--hal-only", "MLA-21"]
    runs = [
        ["--hal-backend", "sample", *chosen],
        ["--hal-backend", "nope"],
        ["--hal-backend", "sample", "--hal-only", "XYZ-1"],
        [],
    ]
    command = [sys.executable, "-c", _RUNS, json.dumps(runs)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    good, unknown, absent, silent = json.loads(done.stdout)
    assert good[0] == 0 and "2 passed" in good[1], good[1]
    assert unknown[0] == absent[0] == 2, (unknown, absent)
    assert silent[0] == 1 and "--hal-backend NAME" in silent[1], silent[1]


def test_the_bar_tells_how_far_a_run_is_and_its_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Progress] = []
    monkeypatch.setattr(progress, "_progress", lambda console: bars.append(Progress(console=console)) or bars[0])
    seen = []

    def ran(self: Session, obligation: Obligation, step: Callable[[str, int, int], None]) -> Result:
        for done in range(3):
            step(obligation.id, done, 2)
            seen.append((bars[0].tasks[0].description, bars[0].tasks[0].completed))
        assert bars[0].tasks[0].finished_time is None
        return Result(obligation.id, "SKIPPED")

    monkeypatch.setattr(Session, "run_one", ran)
    progress.play(Session(Settings("sample", 1)), Console(quiet=True))
    first, last = OBLIGATIONS[0].id, OBLIGATIONS[-1].id
    count = len(OBLIGATIONS)
    assert seen[:2] == [(f"{first}, 1 of {count}", 0), (f"{first}, 1 of {count}", 1)]
    assert seen[-1] == (f"{last}, {count} of {count}", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_shows_what_it_saw_and_certifies_nothing(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = Session.run_one

    def interrupted(self: Session, obligation: Obligation, progress: object = None) -> Result:
        if obligation.id == "CAP-04":
            if number == signal.SIGINT:
                # Who is started in the background is deaf to the signal itself.
                raise KeyboardInterrupt
            signal.raise_signal(number)
        return ran(self, obligation)

    monkeypatch.setattr(Session, "run_one", interrupted)
    done = CliRunner().invoke(app, ["--backend", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 1, done.output
    assert "interrupted: what was not run is left out" in done.output
    made = json.loads((tmp_path / "report.json").read_text())
    seen = {row["id"]: row["status"] for row in made["obligations"]}
    assert set(seen) == set(BY_ID)
    assert (seen["CAP-03"], seen["CAP-04"], seen["MLA-01"]) == ("PASS", "SKIPPED", "SKIPPED")
    assert (made["verdict"], made["certificate"], made["run"]["filtered"]) == ("INCOMPLETE", None, True)
    assert (tmp_path / "report.html").exists()
