"""Reports, certificates and what is made from many of them; on results made up for the purpose."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hal_conformance import certificate, diff, facts, html, report, verdict
from hal_conformance.case import MlaCase
from hal_conformance.checks import planned
from hal_conformance.cli import app
from hal_conformance.context import Context, Settings
from hal_conformance.ep_case import EpCase
from hal_conformance.facts import environment
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.schema import schema_errors
from hal_conformance.session import Result, Session
from hal_conformance.table import OBLIGATIONS
from hal_conformance.waivers import Waiver
from typer.testing import CliRunner

import hal
from hal.spec.errors import SpecError

_ERRORS = {
    "rows": 10,
    "worst": 0.4,
    "max_abs": 1e-4,
    "max_cosine": 1e-7,
    "ulp": [9, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    "ratio": [5, 3, 2, 0, 0, 0, 0, 0],
}


def made(*waivers: Waiver, mode: str = "default", **changed: str) -> dict[str, Any]:
    """A report of a backend that passes, but for the named obligations."""
    session = Session(Settings("acme", 5, mode), waivers={w.obligation: w for w in waivers}, fresh=True)  # type: ignore[arg-type]
    session.capabilities = capabilities = hal.capabilities("cpu")
    session.facts = {
        "state": "available",
        "reason": "chip 7, <b>rev B</b>",
        "capabilities": capabilities.to_dict(),
        "evidence": "simulation",
        "details": {"driver": "acme 3"},
        "distribution": {
            "name": "hal-acme",
            "version": "1.0",
            "editable": False,
            "hash": "ab" * 32,
            "requires": [{"name": "acme-kernels", "version": "1.0", "hash": "ef" * 32}],
            "reaches": [],
        },
        "environment": environment(),
    }
    for o in OBLIGATIONS:
        declared = REQUIREMENTS[o.requires].declared(capabilities)
        status = changed.get(o.id.replace("-", "_"), "PASS" if declared else "REFUSED")
        count = planned(Context(session.settings, capabilities, o, 0)) if declared else 1
        result = Result(o.id, status, "", count, count, count, seconds=0.1, witnessed=[*range(count)])  # type: ignore[arg-type]
        if status == "FAIL":
            result.message = "out differs"
            result.failures = [{"status": "FAIL", "problems": ["out differs"], "reproduce": "hal conform", "index": 0}]
        if o.id.startswith("MLA"):
            result.errors = {"out": dict(_ERRORS), "lse": dict(_ERRORS)}
            result.launches = {"acme:decode@acme0": count}
        launched = dict.fromkeys(result.launches, 1)
        result.cases = [{"index": i, "calls": 1, "launches": launched, "seconds": 0.1} for i in range(count)]
        session._waive(result)
        session.results[o.id] = result
    for case in (MlaCase(), EpCase(scales="float32")):
        session.sizes.add(case)
    points = [{"name": "b1 h16 s4096", "seconds": 1e-3, "flops": 1e8, "bytes": 5e6}]
    return report.make(session, {"points": points, "flops": 2e11, "bytes": 1e10, "dtype": "bfloat16"})


def forge(one: dict[str, Any], change: Callable[[], None]) -> None:
    """Change a report and make everything that follows from it fit."""
    change()
    one["levels"] = verdict.levels({row["id"]: row["status"] for row in one["obligations"]})
    one["verdict"] = verdict.overall(one["levels"], one["run"]["filtered"], one["problems"])[0]
    one["certificate"] = certificate.issue(one)


def test_a_passing_report_certifies_and_verifies() -> None:
    one = made()
    assert one["verdict"] == "PASS"
    assert one["certificate"]["levels"] == {
        "L0": "PASS",
        "L1": "PASS",
        "L2": "PASS",
        "E1": "PASS",
        "E2": "PASS",
        "E3": "PASS",
    }
    errors, notes = certificate.verify(json.loads(json.dumps(one)))
    assert errors == []
    assert "not installed here" in notes[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["obligations"][9].update(status="PASS", executed=0),
        lambda r: r["obligations"].pop(),
        lambda r: r["obligations"][9].update(status="FAIL"),
        lambda r: r["obligations"][9].update(calls=0),
        lambda r: r["obligations"][9].update(planned=1, executed=1),
        lambda r: r["levels"][2].update(verdict="UNDECLARED"),
        lambda r: r["run"].update(seed=6),
        lambda r: r["run"].update(filtered=True),
        lambda r: r["run"].update(mode="quick"),
        lambda r: r["backend"]["distribution"].update(hash="cd" * 32),
        lambda r: r["certificate"].update(backend="other"),
        lambda r: r["certificate"]["levels"].update(L3="PASS"),
        lambda r: r["suite"].update(hash="cd" * 32),
        lambda r: r.update(certificate=None),
        lambda r: r["run"].update(fresh=False),
        lambda r: r["run"].update(host="pytest"),
        lambda r: r.update(certificate={}),
        lambda r: forge(r, lambda: r["waivers"].append({"obligation": "MLA-07", "reason": "", "expires": "2020-1-1"})),
        lambda r: r["obligations"][20].update(witnessed=[]),
        lambda r: r["backend"]["distribution"].update(reaches=["acme.pth is executed wherever Python starts"]),
        lambda r: forge(r, lambda: r["obligations"][20].update(status="REFUSED")),
        lambda r: forge(r, lambda: r["obligations"][20].update(status="UNCOVERED")),
        lambda r: forge(r, lambda: r["backend"]["capabilities"].update(mla_dense=None)),
        lambda r: forge(r, lambda: _row(r, "MLA-46").update(planned=3, executed=3, calls=3, cases=_cases(r, 3))),
        lambda r: forge(r, lambda: _row(r, "MLA-07").update(calls=99)),
        lambda r: forge(r, lambda: _row(r, "MLA-07").update(cases=_row(r, "MLA-07")["cases"][:1])),
        lambda r: forge(r, lambda: _row(r, "MLA-07").update(launches={"acme:decode@acme0": 10**6})),
        lambda r: forge(r, lambda: r["coverage"].update(pairs=10)),
        lambda r: forge(r, lambda: r.pop("coverage")),
        lambda r: forge(r, lambda: r["sizes"].clear()),
        lambda r: forge(r, lambda: r["sizes"].pop()),
        lambda r: r.update(schema=2),
        lambda r: r.pop("environment"),
    ],
)
def test_a_report_that_was_changed_does_not_verify(change: Any) -> None:
    one = made()
    change(one)
    assert certificate.verify(one)[0]


def _row(one: dict[str, Any], obligation: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in one["obligations"] if row["id"] == obligation)
    return found


def _cases(one: dict[str, Any], count: int) -> list[Any]:
    return list(_row(one, "MLA-46")["cases"][:count])


def test_a_waiver_of_a_certificate_lasts_a_year_at_most() -> None:
    one = made(Waiver("MLA-32", "one day", datetime.date.today() + datetime.timedelta(days=900)), MLA_32="FAIL")
    (error,) = certificate.verify(one)[0]
    assert "a year is the longest" in error


def test_a_report_of_another_suite_says_which_one_judged_and_which_is_here() -> None:
    one = made()
    here = one["suite"]["hash"]
    forge(one, lambda: one["suite"].update(hash="cd" * 32))
    (error,) = certificate.verify(one)[0]
    assert "of hash cdcdcdcdcdcd" in error
    assert f"of hash {here[:12]}: verify with the one that judged" in error


def test_quick_filtered_editable_and_failing_runs_have_no_certificate() -> None:
    assert made(mode="quick")["certificate"] is None
    failing = made(MLA_07="FAIL")
    assert (failing["verdict"], failing["certificate"]) == ("FAIL", None)
    assert "breaks 1 obligation (MLA-07)" in failing["headline"]
    editable = copy.deepcopy(made())
    editable["backend"]["distribution"]["editable"] = True
    assert certificate.issue(editable) is None
    compiled = copy.deepcopy(made())
    compiled["backend"]["evidence"] = "compiled"
    assert certificate.issue(compiled) is None


def test_a_headline_says_why_nothing_is_certified() -> None:
    one = made()
    assert "certified" not in report.headline(one, [])
    one["backend"]["distribution"]["editable"] = True
    assert "; not certified: the backend is an editable install" in report.headline(one, [])


def test_a_waiver_stands_in_headline_and_certificate_and_ends_with_its_day() -> None:
    last = datetime.date.today() + datetime.timedelta(days=3)
    one = made(Waiver("MLA-32", "due in 2.1", last), MLA_32="FAIL")
    assert one["verdict"] == "WAIVED"
    assert "1 waived: MLA-32" in one["headline"]
    assert one["certificate"]["waivers"] == [
        {"obligation": "MLA-32", "reason": "due in 2.1", "expires": last.isoformat()}
    ]
    assert certificate.verify(one)[0] == []
    assert "expired" in certificate.verify(one, today=last + datetime.timedelta(days=1))[0][0]


def test_the_schema_refuses_what_it_does_not_know() -> None:
    one = made()
    assert schema_errors(one) == []
    assert schema_errors({**one, "bonus": 1})
    assert schema_errors({**one, "verdict": "GREAT"})
    assert schema_errors([])


def test_a_report_from_before_cases_were_judged_apart_is_read_and_certifies_nothing() -> None:
    old = made()
    del old["run"]["fresh"], old["backend"]["distribution"]["reaches"]
    del old["notes"], old["coverage"]
    for row in old["obligations"]:
        del row["witnessed"], row["notes"]
    assert schema_errors(old) == []
    assert diff.diff(old, made()) == []
    assert certificate.verify(old)[0]


def test_a_diff_names_what_broke_and_what_got_worse() -> None:
    old, new = made(MLA_08="FAIL"), made(MLA_07="FAIL")
    next(o for o in new["obligations"] if o["id"] == "MLA-01")["errors"]["out"]["worst"] = 0.95
    kinds = {row["what"].split()[0]: row["kind"] for row in diff.diff(old, new)}
    assert kinds["MLA-07"] == "broken"
    assert kinds["MLA-08"] == "fixed"
    assert kinds["MLA-01"] == "worse"
    assert [row["kind"] for row in diff.diff(old, new)][:3] == ["broken", "worse", "fixed"]
    assert diff.diff(new, new) == []


def test_a_failure_that_is_not_run_again_is_not_fixed_and_what_was_left_out_is_said_once() -> None:
    skipped = {o.id.replace("-", "_"): "SKIPPED" for o in OBLIGATIONS if o.level != "L0"}
    rows = {row["what"]: row for row in diff.diff(made(MLA_08="FAIL"), made(**skipped))}
    assert rows["MLA-08 several queries"] == {
        "kind": "changed",
        "what": "MLA-08 several queries",
        "then": "FAIL",
        "now": "SKIPPED",
    }
    assert rows["obligations not run"]["now"] == str(len(skipped))
    assert not any(what.startswith("MLA-07") for what in rows)


class _Page(HTMLParser):
    """Collects tags; complains of those that need the network."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.outside += [str(v) for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.mark.parametrize("one", [made(), made(MLA_07="FAIL")], ids=["passing", "failing"])
def test_the_page_is_whole_self_contained_and_escaped(one: dict[str, Any]) -> None:
    text = html.render(one, diff.diff(made(), one))
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.outside == []
    assert "<b>rev B</b>" not in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 5
    assert one["headline"].split("(")[0].strip() in text


def test_a_matrix_is_made_from_results(tmp_path: Path) -> None:
    report.write(made(), tmp_path / "a.json")
    report.write(made(MLA_07="FAIL"), tmp_path / "b.json")
    page = tmp_path / "matrix.html"
    done = CliRunner().invoke(app, ["matrix", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(page)])
    assert done.exit_code == 0, done.output
    table = diff.matrix([made(), made(MLA_07="FAIL")])
    features = {row["title"]: [c["text"] for c in row["cells"]] for row in table["sections"][2]["rows"]}
    assert features["causal dense decode"] == ["PASS", "FAIL"]
    assert features["sparse decode"] == ["REFUSED", "REFUSED"]
    assert "FAIL" in page.read_text()


def test_a_failure_marks_every_feature_that_its_call_used() -> None:
    dense, ranks = made(MLA_44="FAIL"), made(EPN_05="FAIL")
    for one, case in (
        (dense, {"dtype": "bfloat16", "lengths": [9], "h_q": 4, "q_lens": [2], "lse_base": "2"}),
        (ranks, {"ranks": 4, "tokens": [1, 2, 3, 4], "expand": True, "per_node": 2}),
    ):
        next(row for row in one["obligations"] if row["failures"])["failures"][0]["case"] = case
    table = diff.matrix([dense, ranks])
    features = {row["title"]: [c["text"] for c in row["cells"]] for row in table["sections"][2]["rows"]}
    failing = [{title for title, cells in features.items() if cells[at] == "FAIL"} for at in (0, 1)]
    assert failing[0] == {"dense decode", "s_q above 1", "ragged queries", "lse in base 2"}
    assert failing[1] == {"EP, normal mode", "EP, expand layout", "EP over several nodes"}


def test_a_pass_is_marked_by_what_its_run_can_show(tmp_path: Path) -> None:
    uncertified = made()
    uncertified["certificate"] = None
    table = diff.matrix([made(), made(mode="quick"), uncertified, made(MLA_07="FAIL", mode="quick")])
    levels = {row["title"][:2]: [(c["text"], c["mark"]) for c in row["cells"]] for row in table["sections"][1]["rows"]}
    assert levels["L2"][:3] == [("PASS", "certified"), ("PASS", "part"), ("PASS", "whole")]
    assert levels["L1"][3] == ("FAIL", "")
    html.write_matrix(table, tmp_path / "matrix.html")
    text = (tmp_path / "matrix.html").read_text()
    for mark, meaning in diff.MARKS.items():
        assert f'class="tag PASS {mark}"' in text
        assert meaning in text
        assert f".{mark}" in text.split("</style>")[0]


def test_a_quick_run_says_how_many_pairs_met_and_that_it_cannot_certify() -> None:
    quick = made(mode="quick")
    pairs = quick["coverage"]["pairs"]
    assert pairs > 1000
    assert f"(quick: 0 of {pairs} pairs); cannot certify" in quick["headline"]
    assert f"0 of {pairs:,} pairs of values" in html.render(quick)
    assert "pairs" not in made()["headline"]


def test_verify_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(made(), path)
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 0, done.output
    assert "the certificate holds: hal-acme 1.0, levels E1, E2, E3, L0, L1, L2" in done.output
    report.write(made(mode="quick"), path)
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 1
    assert "there is no certificate: quick mode" in done.output


def test_files_beside_those_of_the_certificate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    certified = made()
    here = dict(certified["backend"]["distribution"])
    monkeypatch.setattr(certificate, "entry_points", lambda **named: [None])
    monkeypatch.setattr(certificate, "distribution", lambda name: here)
    assert certificate.verify(certified) == ([], [])
    here["reaches"] = ["kernels/__init__.py is not among its listed files"]
    errors, _ = certificate.verify(certified)
    assert errors == ["it reaches beyond its package here: kernels/__init__.py is not among its listed files"]


@pytest.mark.parametrize("now", ["cd" * 32, None, ""])
def test_a_dependency_that_is_not_the_certified_one_is_named(monkeypatch: pytest.MonkeyPatch, now: str | None) -> None:
    """Kernels may lie in one. Changed, editable now, or gone."""
    certified = made()
    there = [] if now == "" else [{"name": "acme-kernels", "version": "1.0", "hash": now}]
    monkeypatch.setattr(certificate, "entry_points", lambda **named: [None])
    here = certified["backend"]["distribution"] | {"requires": there}
    monkeypatch.setattr(certificate, "distribution", lambda name: here)
    assert certificate.verify(certified) == (["its dependency acme-kernels is not the certified one"], [])


def test_a_dependency_that_may_change_certifies_nothing() -> None:
    report_ = made()
    report_["backend"]["distribution"]["requires"][0]["hash"] = None
    assert "its dependency acme-kernels is an editable install" in " ".join(certificate.obstacles(report_))


@pytest.mark.parametrize("found", [None, {}, {"x": 1}, {"device_types": []}])
def test_capabilities_that_say_nothing_are_told(found: Any) -> None:
    report_ = made()
    report_["backend"]["capabilities"] = found
    errors, _ = certificate.verify(report_)
    assert any(text.startswith("the capabilities cannot be read: ") for text in errors)


def test_no_depth_of_json_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[" * 100_000)
    with pytest.raises(SpecError, match="report"):
        report.read(tmp_path / "report.json")


def test_the_suite_is_bound_with_all_of_the_hal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    face = tmp_path / "hal"
    (face / "portable" / "kernels").mkdir(parents=True)
    kernel = face / "portable" / "kernels" / "ep.h"
    kernel.write_text("one")
    monkeypatch.setattr("hal.__file__", str(face / "__init__.py"))
    before = facts.suite_hash()
    kernel.write_text("another")
    assert facts.suite_hash() != before
    after = facts.suite_hash()
    (face / "__pycache__").mkdir()
    (face / "__pycache__" / "ep.pyc").write_text("bytecode")
    assert facts.suite_hash() == after
