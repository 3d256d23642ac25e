"""Reports, certificates and what is made from many of them; on results made up for the purpose."""

from __future__ import annotations

import copy
import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hal_conformance import certificate, diff, facts, html, report
from hal_conformance.cli import app
from hal_conformance.headline import headline
from hal_conformance.schema import schema_errors
from hal_conformance.table import OBLIGATIONS
from hal_conformance.verify import verify
from hal_conformance.waivers import Waiver
from made_reports import made
from typer.testing import CliRunner

from hal.spec.errors import SpecError


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
    assert "certified" not in headline(one, [])
    one["backend"]["distribution"]["editable"] = True
    assert "; not certified: the backend is an editable install" in headline(one, [])


def test_a_waiver_stands_in_headline_and_certificate_and_ends_with_its_day() -> None:
    last = datetime.date.today() + datetime.timedelta(days=3)
    one = made(Waiver("MLA-32", "due in 2.1", last), MLA_32="FAIL")
    assert one["verdict"] == "WAIVED"
    assert "1 waived: MLA-32" in one["headline"]
    assert one["certificate"]["waivers"] == [
        {"obligation": "MLA-32", "reason": "due in 2.1", "expires": last.isoformat()}
    ]
    assert verify(one)[0] == []
    assert "expired" in verify(one, today=last + datetime.timedelta(days=1))[0][0]


def test_the_schema_refuses_what_it_does_not_know() -> None:
    one = made()
    assert schema_errors(one) == []
    assert schema_errors({**one, "bonus": 1})
    assert schema_errors({**one, "verdict": "GREAT"})
    assert schema_errors([])


def test_a_report_from_before_cases_were_judged_apart_is_read_and_certifies_nothing() -> None:
    old = made()
    del old["run"]["fresh"], old["backend"]["distribution"]["reaches"]
    del old["notes"], old["coverage"], old["run"]["ended"]
    for row in old["obligations"]:
        del row["witnessed"], row["notes"]
    assert schema_errors(old) == []
    assert diff.diff(old, made()) == []
    assert verify(old)[0]


def test_a_diff_names_what_broke_and_what_got_worse() -> None:
    old, new = made(MLA_08="FAIL"), made(MLA_07="FAIL")
    next(o for o in new["obligations"] if o["id"] == "MLA-01")["errors"]["out"]["worst"] = 0.95
    kinds = {row["what"].split()[0]: row["kind"] for row in diff.diff(old, new)}
    assert kinds["MLA-07"] == "broken"
    assert kinds["MLA-08"] == "fixed"
    assert kinds["MLA-01"] == "worse"
    assert [row["kind"] for row in diff.diff(old, new)][:3] == ["broken", "worse", "fixed"]
    assert diff.diff(new, new) == []


def test_what_one_of_two_runs_left_out_has_not_changed_and_is_said_in_one_line() -> None:
    whole, part = made(MLA_08="FAIL"), made(only=("CAP-01", "MLA-07"), MLA_07="FAIL")
    left_out = len(OBLIGATIONS) - 2
    assert diff.diff(whole, part) == [
        {"kind": "broken", "what": "MLA-07 causal alignment for s_q > 1", "then": "PASS", "now": "FAIL"},
        {
            "kind": "not run",
            "what": "obligations (failed then, not run now: MLA-08)",
            "then": "0",
            "now": str(left_out),
        },
    ]
    (fixed, unknown) = diff.diff(part, whole)
    assert (fixed["kind"], fixed["now"]) == ("fixed", "PASS")
    assert unknown["what"] == "obligations (fail now, not run then: MLA-08)"
    assert (unknown["then"], unknown["now"]) == (str(left_out), "0")
    blocked = {o.id.replace("-", "_"): "BLOCKED" for o in OBLIGATIONS if o.level == "L2"}
    rows = {row["what"]: row["now"] for row in diff.diff(made(), made(MLA_07="FAIL", **blocked))}
    assert rows["verdict"] == rows["level L1"] == "FAIL"
    assert rows["level L2"] == "BLOCKED"
    assert rows["obligations"] == str(len(blocked))


def test_a_pass_of_fewer_cases_neither_fixes_nor_was_broken() -> None:
    quick, whole = made(mode="quick"), made(MLA_07="FAIL", mode="default")
    quick["obligations"][9]["errors"] = {}
    for old, new, then, now in (
        (quick, whole, "PASS (4 cases)", "FAIL (24 cases)"),
        (whole, quick, "FAIL (24 cases)", "PASS (4 cases)"),
    ):
        rows = {row["what"].split()[0]: row for row in diff.diff(old, new)}
        assert (rows["MLA-07"]["kind"], rows["MLA-07"]["then"], rows["MLA-07"]["now"]) == ("unclear", then, now)
        assert "verdict" not in rows
    other = made(mode="quick")
    other["obligations"][20]["errors"]["out"]["worst"] = 0.01
    assert [row["kind"] for row in diff.diff(other, made())] == []
    assert [row["kind"] for row in diff.diff(other, made(mode="quick"))] == ["worse"]


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


def test_a_report_that_was_changed_is_compared_with_none(tmp_path: Path) -> None:
    failing = made(MLA_07="FAIL")
    for level in failing["levels"]:
        level["verdict"] = "PASS"
    report.write(failing, tmp_path / "levels.json")
    report.write(failing | {"certificate": made()["certificate"]}, tmp_path / "pasted.json")
    for name, complaint in (("levels", "the verdicts of the levels"), ("pasted", "the certificate is not the one")):
        path = str(tmp_path / f"{name}.json")
        for words in (["matrix", path], ["--backend", "cpu", "--against", path]):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 2
            assert complaint in done.output


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
