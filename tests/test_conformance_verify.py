"""`hal conform verify`: reports that were changed are refused, whoever certified them again."""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hal_conformance import certificate, report
from hal_conformance import verify as verifying
from hal_conformance.cli import app
from hal_conformance.consistency import consistency
from hal_conformance.schema import schema_errors
from hal_conformance.verify import verify
from hal_conformance.waivers import Waiver
from made_reports import forge, made
from typer.testing import CliRunner

Report = dict[str, Any]
Place = tuple[Any, ...]

TODAY = datetime.date.today()
WAIVER = Waiver("MLA-32", "due in 2.1", TODAY + datetime.timedelta(days=30))


@pytest.fixture(scope="module")
def honest() -> Report:
    one: Report = json.loads(json.dumps(made(WAIVER, MLA_32="FAIL")))
    assert verify(one)[0] == []
    return one


def _row(one: Report, obligation: str) -> Report:
    found: Report = next(row for row in one["obligations"] if row["id"] == obligation)
    return found


def test_a_passing_report_certifies_and_verifies() -> None:
    one = made()
    assert one["verdict"] == "PASS"
    assert one["certificate"]["levels"] == dict.fromkeys(("L0", "L1", "L2", "E1", "E2", "E3"), "PASS")
    errors, notes = verify(json.loads(json.dumps(one)))
    assert errors == []
    assert "not installed here" in notes[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["obligations"][9].update(status="PASS", executed=0),
        lambda r: r["obligations"].pop(),
        lambda r: r["levels"][2].update(verdict="UNDECLARED"),
        lambda r: r["backend"]["distribution"].update(hash="cd" * 32),
        lambda r: r["certificate"].update(backend="other"),
        lambda r: r["certificate"]["levels"].update(L3="PASS"),
        lambda r: r["suite"].update(hash="cd" * 32),
        lambda r: r.update(certificate=None),
        lambda r: r.update(certificate={}),
        lambda r: r["backend"]["distribution"].update(reaches=["acme.pth is executed wherever Python starts"]),
        lambda r: r.update(schema=2),
        lambda r: r.pop("environment"),
    ],
)
def test_a_report_that_was_changed_does_not_verify(honest: Report, change: Callable[[Report], None]) -> None:
    one = copy.deepcopy(honest)
    change(one)
    assert verify(one)[0]


def _time(**ago: float) -> str:
    then = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(**ago)
    return then.isoformat("T", "seconds")


FORGED: dict[str, tuple[Callable[[Report], Any], str]] = {
    "an end before its start": (
        lambda r: r["run"].update(started=_time(hours=1), ended=_time(hours=2)),
        "the run ended at .* before it started",
    ),
    "a start that is to come": (
        lambda r: r["run"].update(started=_time(hours=-30), ended=_time(hours=-40)),
        "before it started|and it is",
    ),
    "an end that is to come": (lambda r: r["run"].update(ended=_time(days=-2)), "the run ended at .*, and it is"),
    "an end that nobody noted": (lambda r: r["run"].pop("ended"), "the run ended at None, which is no time"),
    "a start of another time zone": (
        lambda r: r["run"].update(started="2026-01-31T12:00:00+02:00"),
        "the run started at .*, which is no time in UTC",
    ),
    "less time than its obligations": (lambda r: r["run"].update(started=r["run"]["ended"]), "which is less than its"),
    "another sum of seconds": (lambda r: r["run"].update(seconds=3.0), "the run took 3 s, and its obligations"),
    "cases longer than their obligation": (
        lambda r: _row(r, "MLA-07").update(seconds=0.0) or r["run"].update(seconds=r["run"]["seconds"] - 1),
        "MLA-07 took 0 s, and its cases",
    ),
    "a case longer than it may be": (
        lambda r: _row(r, "MLA-07")["cases"][0].update(seconds=1e6),
        "MLA-07 spent longer in case 0 than the 60 s",
    ),
    "a seed that cannot be drawn": (
        lambda r: r["run"].update(seed=2**31, command="hal conform --backend acme --seed 2147483648"),
        "seed 2147483648 was not drawn by this suite",
    ),
    "another seed": (
        lambda r: r["run"].update(seed=6),
        "this run is repeated by 'hal conform --backend acme --seed 6'",
    ),
    "a case of another seed": (
        lambda r: _row(r, "MLA-32")["failures"][0].update(reproduce="hal conform --backend acme --case MLA-32@6.0"),
        "case 0 of this run is repeated by 'hal conform --backend acme --case MLA-32@5.0'",
    ),
    "a quick run": (lambda r: r["run"].update(mode="quick"), "nothing was left out, and was quick"),
    "some ranks": (lambda r: r["run"].update(ranks=2), "nothing was left out, and was quick, filtered"),
    "a device nobody declared": (lambda r: r["run"].update(device="xpu"), "the run was on 'xpu', and declared is cpu"),
    "a waiver that was over": (
        lambda r: r["waivers"][0].update(expires="2020-01-01"),
        "the waiver of MLA-32 expired on 2020-01-01, before the run",
    ),
    "a waiver for years": (lambda r: r["waivers"][0].update(expires="2120-01-01"), "a year is the longest"),
    "a waiver until no day": (lambda r: r["waivers"][0].update(expires="2027-02-30"), "which is no day"),
    "a waiver without a reason": (lambda r: r["waivers"][0].update(reason=" "), "gives no reason"),
    "a waiver twice": (lambda r: r["waivers"].append(r["waivers"][0]), "each once and in their order"),
    "a waiver of what passed": (
        lambda r: r["waivers"].insert(0, {**r["waivers"][0], "obligation": "MLA-07"}),
        "MLA-07 says PASS, but it has a waiver, and none was used",
    ),
    "waived without a waiver": (lambda r: r["waivers"].clear(), "MLA-32 says WAIVED, but there is no waiver for it"),
    "waived without a failure": (
        lambda r: _row(r, "MLA-32")["failures"].clear(),
        "MLA-32 says WAIVED, but none of its cases failed",
    ),
    "waived as the suite itself failed": (
        lambda r: _row(r, "MLA-32")["failures"][0].update(status="ERROR"),
        "MLA-32 says WAIVED, but it ended with ERROR, for which there is no waiver",
    ),
    "a failure in no case": (
        lambda r: _row(r, "MLA-32")["failures"][0].update(index=99),
        r"MLA-32 says WAIVED, but it names the cases \[99\] as failed",
    ),
    "a pass of what failed": (
        lambda r: _row(r, "MLA-32").update(status="PASS") or r["waivers"].clear(),
        "MLA-32 says PASS, but 12 of 12 cases ran, of 12 calls, and 1 failed",
    ),
    "refused without a call": (
        lambda r: _row(r, "SPA-01").update(calls=0, cases=[], planned=0, executed=0),
        "SPA-01 says REFUSED, but 0 of 0 cases ran, of 0 calls",
    ),
    "refused by many calls": (
        lambda r: _row(r, "SPA-01").update(calls=7, cases=[{**_row(r, "SPA-01")["cases"][0], "calls": 7}]),
        "SPA-01 says REFUSED, but .*: what is not declared is called once",
    ),
    "refused, and declared": (
        lambda r: _row(r, "MLA-07").update(status="REFUSED"),
        "MLA-07 says REFUSED, but causal dense decode is declared",
    ),
    "untested, and tested": (
        lambda r: _row(r, "MLA-07").update(status="UNCOVERED"),
        "MLA-07 says UNCOVERED, but this suite tests it",
    ),
    "judged apart with no case": (
        lambda r: _row(r, "MLA-07").update(witnessed=[*range(25)]),
        "MLA-07 was judged apart in the cases .*, and those that ended are others",
    ),
    "judged apart twice": (
        lambda r: _row(r, "MLA-07").update(witnessed=[0, *range(24)]),
        "MLA-07 was judged apart in the cases",
    ),
    "not judged apart": (
        lambda r: _row(r, "EPN-05").update(witnessed=[0]),
        "EPN-05 was not judged apart from the backend in 29 cases, of which 1 is the first",
    ),
    "judged apart where nothing is": (lambda r: _row(r, "CAP-01").update(witnessed=[0]), "CAP-01 was judged apart"),
    "launches without a call": (
        lambda r: _row(r, "MLA-07").update(calls=23) or _row(r, "MLA-07")["cases"][0].update(calls=0),
        "MLA-07 launched kernels in case 0, or passed it, and made no call there",
    ),
    "more calls": (lambda r: _row(r, "MLA-07").update(calls=99), "MLA-07 says 99 calls, and its cases made others"),
    "fewer cases told": (
        lambda r: _row(r, "MLA-07").update(cases=_row(r, "MLA-07")["cases"][:1]),
        r"MLA-07 says PASS, but it tells of the cases \[0\], not of 24",
    ),
    "other launches": (
        lambda r: _row(r, "MLA-07").update(launches={"acme:decode@acme0": 10**6}),
        "MLA-07 tells of other launches than its cases",
    ),
    "launches of nobody": (
        lambda r: [one.update(launches={"decode": 1}) for one in (_row(r, "MLA-07"), _row(r, "MLA-07")["cases"][0])],
        "MLA-07 launched 'decode', which does not read",
    ),
    "fewer cases of a plan": (
        lambda r: _row(r, "MLA-46").update(
            planned=3,
            executed=3,
            calls=3,
            cases=_row(r, "MLA-46")["cases"][:3],
            witnessed=[0, 1, 2],
            launches={"acme:decode@acme0": 3},
        ),
        "MLA-46 ran 3 cases where this mode and seed have",
    ),
    "an error over its limit": (
        lambda r: _row(r, "MLA-07")["errors"]["out"].update(worst=1.5),
        "MLA-07 measured an error of out over its limit, and passed",
    ),
    "an error that is none": (
        lambda r: _row(r, "MLA-07")["errors"]["out"].update(worst="nan"),
        "MLA-07 measured an error of out over its limit, and passed",
    ),
    "an error below what is counted": (
        lambda r: _row(r, "MLA-07")["errors"]["out"].update(worst=1e-4),
        "MLA-07 says the worst error of out is 0.0001 of its limit, and counts some above 0.003",
    ),
    "a direction below what is told": (
        lambda r: _row(r, "MLA-07")["errors"]["out"].update(max_cosine=0.5),
        "MLA-07 says the worst error of out is 0.4 of its limit, and its direction is off by more",
    ),
    "histograms of other calls": (
        lambda r: _row(r, "MLA-07")["errors"]["out"].update(ulp=[1] * 10 + [0]),
        "MLA-07 has histograms of out that are not of the same elements",
    ),
    "more rows of lse": (
        lambda r: _row(r, "MLA-07")["errors"]["lse"].update(rows=11),
        "MLA-07 compared more rows of out or of lse",
    ),
    "results of nobody": (
        lambda r: [one.update(launches={}) for one in (_row(r, "EPN-05"), *_row(r, "EPN-05")["cases"])],
        "EPN-05 launched nothing, so something else computed its results",
    ),
    "fewer cases than were planned": (
        lambda r: _row(r, "MLA-32").update(planned=13),
        "MLA-32 says WAIVED, but only 12 of 13 cases ran, and 1 failed",
    ),
    "errors of what has none": (
        lambda r: _row(r, "EPN-01").update(errors=_row(r, "MLA-01")["errors"]),
        "EPN-01 measured errors of lse, out",
    ),
    "other pairs": (lambda r: r["coverage"].update(pairs=10), "the report tells of others"),
    "more pairs than there are": (lambda r: r["coverage"].update(covered=10**6), "1000000 pairs of values met, of"),
    "no pairs": (lambda r: r.pop("coverage"), "the report tells of others"),
    "no sizes": (lambda r: r["sizes"].clear(), "it does not say how large"),
    "larger than is declared": (
        lambda r: r["sizes"][0].update(largest=1000),
        "head_dim 1000 was compared, and 1…576 is declared",
    ),
    "smallest and largest": (lambda r: r["sizes"][2].update(least=99), "the smallest h_q that was compared is 99"),
    "another declaration": (lambda r: r["sizes"][0].update(declared="any"), "and the sizes say any"),
    "nothing of decode declared": (
        lambda r: r["backend"]["capabilities"].update(mla_dense=None),
        "MLA-07 says PASS, but causal dense decode is not declared",
    ),
    "what may not be declared": (
        lambda r: r["backend"]["capabilities"]["ep"].update(layouts=["expand"]),
        "CAP-04 says PASS, but ep.layouts is",
    ),
    "another title": (
        lambda r: _row(r, "MLA-07").update(title="all"),
        "MLA-07 is 'causal alignment for s_q > 1' of L1",
    ),
    "another headline": (lambda r: r.update(headline="acme is the best"), "the headline does not follow from the rest"),
    "notes nobody made": (lambda r: r["notes"].append("all is well"), "the notes are not those of the obligations"),
    "another environment": (lambda r: r["environment"].pop("cores"), "the environment is not hal, specification"),
    "another specification": (
        lambda r: r["environment"].update(specification="2.0"),
        "the suite of this hash is of specification 1.0, and the report says 2.0",
    ),
    "a number that is none": (lambda r: r["run"].update(tighten=float("nan")), "a number that is infinite or none"),
    "half a case": (lambda r: _row(r, "MLA-07").update(planned=24.0), "24.0 is not of type 'integer'"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_be_is_refused_however_it_is_certified(honest: Report, name: str) -> None:
    change, complaint = FORGED[name]
    one = copy.deepcopy(honest)
    change(one)
    if name not in ("no pairs", "a number that is none", "another headline"):
        forge(one)
    one["certificate"] = certificate.issue(one)
    errors, _ = verify(one)
    assert any(re.search(complaint, text) for text in errors), errors
    assert all("\n" not in text for text in errors)


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
    monkeypatch.setattr(verifying, "entry_points", lambda **named: [None])
    monkeypatch.setattr(verifying, "distribution", lambda name: here)
    assert verify(certified) == ([], [])
    here["reaches"] = ["kernels/__init__.py is not among its listed files"]
    errors, _ = verify(certified)
    assert errors == ["it reaches beyond its package here: kernels/__init__.py is not among its listed files"]


@pytest.mark.parametrize("now", ["cd" * 32, None, ""])
def test_a_dependency_that_is_not_the_certified_one_is_named(monkeypatch: pytest.MonkeyPatch, now: str | None) -> None:
    """Kernels may lie in one. Changed, editable now, or gone."""
    certified = made()
    there = [] if now == "" else [{"name": "acme-kernels", "version": "1.0", "hash": now}]
    monkeypatch.setattr(verifying, "entry_points", lambda **named: [None])
    here = certified["backend"]["distribution"] | {"requires": there}
    monkeypatch.setattr(verifying, "distribution", lambda name: here)
    assert verify(certified) == (["its dependency acme-kernels is not the certified one"], [])


def test_a_dependency_that_may_change_certifies_nothing() -> None:
    report_ = made()
    report_["backend"]["distribution"]["requires"][0]["hash"] = None
    assert "its dependency acme-kernels is an editable install" in " ".join(certificate.obstacles(report_))


@pytest.mark.parametrize("found", [None, {}, {"x": 1}, {"device_types": []}])
def test_capabilities_that_say_nothing_are_told(found: Any) -> None:
    report_ = made()
    report_["backend"]["capabilities"] = found
    errors, _ = verify(report_)
    assert any(text.startswith("the capabilities cannot be read: ") for text in errors)


FREE = {
    "certificate": "made anew by whoever forges",
    "backend/reason": "what the device is called, and the rest of its name",
    "backend/details": "what the driver says of itself",
    "backend/distribution": "compared with what is installed, where it is installed",
    "backend/evidence": "simulation, or hardware: the backend's own word",
    "backend/capabilities": "sets that make as many pairs and cases",
    "environment/(hal|python|torch|system|machine|processor|cores)": "of the machine",
    "coverage/covered": "less than all of them",
    r"sizes/\d+/(least|largest)": "within what is declared",
    "roofline": "shown, never judged",
    "waivers/0/expires": "a day of the year that comes",
    "run/(seconds|started|ended)": "within what its obligations took",
    r"obligations/[\w-]+/seconds": "within what its run took",
    r"obligations/[\w-]+/cases/\d+/seconds": "within what its obligation took",
    r"obligations/[\w-]+/failures/0/(problems|case|diagnosis|output)": "for people, but for the first problem",
    r"obligations/[\w-]+/errors": "none of them, or less than there were",
}
"""Fields that may say something else than they do: nothing follows from them but what is tested above."""

_ROWS = ("CAP-01", "CAP-04", "MLA-07", "MLA-32", "EPN-05", "SPA-01")
"""Obligations of each kind, and of each thing that may become of them."""


def _fields(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every field of a report, of long lists the ends alone."""
    yield path, value
    for key in value if isinstance(value, dict) else ():
        yield from _fields(value[key], (*path, key))
    for at in sorted({0, len(value) - 1}) if isinstance(value, list) and value else ():
        yield from _fields(value[at], (*path, at))


def _otherwise(value: Any) -> list[Any]:
    """What may stand there instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 0, 10**12]
    if isinstance(value, float):
        return [value * 1.5, value * 1e6 + 1, -1.0, float("nan")]
    if isinstance(value, str):
        return [value + "x", "", value.swapcase()]
    if isinstance(value, list):
        return [[], value[:-1], value + value[-1:], value[::-1]]
    if isinstance(value, dict):
        return [{}, dict(list(value.items())[1:]), value | {"bonus": 1}]
    return ["x", 1, {}]


def _named(one: Report, path: Place) -> str:
    if path[:1] == ("obligations",) and len(path) > 1:
        path = ("obligations", one["obligations"][path[1]]["id"], *path[2:])
    return "/".join(map(str, path))


def _is_free(name: str) -> bool:
    return any(re.fullmatch(f"{pattern}(/.*)?", name) for pattern in FREE)


@pytest.mark.long(25)
def test_no_field_says_what_nothing_else_bears_out(honest: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field of an honest report in turn, changed and certified again, with all that follows from it or without."""
    monkeypatch.setattr(verifying, "suite_hash", lambda: honest["suite"]["hash"])
    same = {id(row) for row in honest["obligations"]}

    def of_what_changed(one: Report) -> list[str]:
        rows = one.get("obligations")
        part = [row for row in rows if id(row) not in same] if isinstance(rows, list) else rows
        return schema_errors({**one, "obligations": part} if "obligations" in one else one)

    monkeypatch.setattr(verifying, "schema_errors", of_what_changed)
    places = [at for at, row in enumerate(honest["obligations"]) if row["id"] in _ROWS]
    others = [key for key in honest if key not in ("obligations", "certificate")]
    every = [pair for key in others for pair in _fields(honest[key], (key,))]
    every += [pair for at in places for pair in _fields(honest["obligations"][at], ("obligations", at))]
    tried, found = 0, set()
    for path, value in every:
        if _is_free(_named(honest, path)):
            continue
        for other in [one for one in _otherwise(value) if one != value]:
            for one in _certified(_changed(honest, path, other)):
                if {**one, "certificate": None} == {**honest, "certificate": None}:
                    continue  # What follows from the rest was put right.
                tried += 1
                if not verify(one)[0]:
                    found.add((_named(honest, path), str(other)[:60]))
    assert not found, sorted(found)
    assert tried > 500


def _certified(one: Report) -> Iterator[Report]:
    """What may become of a report that was changed, in the hands of whoever has this suite."""
    alone, whole = dict(one), dict(one)
    try:
        alone["certificate"] = certificate.issue(alone)
        forge(whole)
    except Exception:
        return  # Nobody can certify it.
    yield alone
    if whole != alone:
        yield whole


def _changed(one: Report, path: Place, value: Any) -> Report:
    """A copy in which one field is another; the rest is shared."""
    copied: Any = dict(one) if isinstance(one, dict) else list(one)
    copied[path[0]] = value if len(path) == 1 else _changed(one[path[0]], path[1:], value)
    return copied  # type: ignore[no-any-return]


def test_sizes_are_asked_for_whichever_mode_passed(honest: Report) -> None:
    one = copy.deepcopy(honest)
    for row in one["obligations"]:
        row["status"] = "REFUSED" if row["id"].startswith("EPN") else row["status"]
    one["sizes"] = [row for row in one["sizes"] if row["axis"] != "ranks"]
    assert "it does not say how large ranks went" in consistency(one)
