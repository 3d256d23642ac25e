"""``report.json``: everything a run found, in one document of a versioned schema."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from hal.spec.errors import SpecError
from hal_conformance import SUITE_VERSION
from hal_conformance.certificate import issue
from hal_conformance.facts import environment, suite_hash
from hal_conformance.headline import headline
from hal_conformance.schema import SCHEMA_VERSION, schema_errors
from hal_conformance.session import Result, Session
from hal_conformance.verdict import levels, overall

_NOBODY: dict[str, Any] = {
    "name": None,
    "version": None,
    "editable": False,
    "hash": None,
    "requires": [],
    "reaches": [],
}


def make(session: Session, roofline: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report of a session that has run."""
    settings, facts = session.settings, session.facts
    results = list(session.results.values())
    rows = levels({r.id: r.status for r in results})
    problems = session.waiver_problems()
    verdict, reasons = overall(rows, session.filtered, problems)
    red_when_filtered = [r for r in results if r.status in ("FAIL", "CRASH", "TIMEOUT", "ERROR")]
    assert not red_when_filtered or verdict == "FAIL"
    report: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "suite": {"version": SUITE_VERSION, "hash": suite_hash()},
        "run": {
            "seed": settings.seed,
            "fresh": session.fresh,
            "host": session.host,
            "mode": settings.mode,
            "tighten": settings.tighten,
            "patience": settings.patience,
            "device": settings.device,
            "ranks": settings.ranks,
            "started": _moment(session.started),
            "ended": _moment(session.now),
            "seconds": round(sum(r.seconds for r in results), 1),
            "filtered": session.filtered,
            "only": sorted(session.only),
            "case": session.case,
            "command": session.command(),
        },
        "backend": {
            "name": settings.backend,
            "state": facts.get("state", "unknown"),
            "reason": facts.get("reason", facts.get("error", "")),
            "evidence": facts.get("evidence")
            if facts.get("evidence") in ("hardware", "simulation", "compiled")
            else None,
            "details": facts.get("details", {}),
            "distribution": facts.get("distribution", _NOBODY),
            "capabilities": facts.get("capabilities"),
        },
        "environment": facts.get("environment") or environment(),
        "verdict": verdict,
        "headline": "",
        "problems": problems,
        "notes": session.notes(),
        "coverage": session.coverage(),
        "sizes": session.sizes.against(session.capabilities),
        "levels": rows,
        "obligations": [_row(result) for result in results],
        "waivers": [session.waivers[r.id].to_dict() for r in results if r.status == "WAIVED"],
        "roofline": roofline,
        "certificate": None,
    }
    report["headline"] = headline(report, reasons)
    report["certificate"] = issue(report)
    broken = schema_errors(report)
    assert not broken, broken
    return report


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat("T", "seconds")


def _row(result: Result) -> dict[str, Any]:
    obligation = result.obligation
    return {
        "id": result.id,
        "level": obligation.level,
        "title": obligation.title,
        "status": result.status,
        "message": result.message,
        "planned": result.planned,
        "executed": result.executed,
        "calls": result.calls,
        "seconds": result.seconds,
        "failures": result.failures,
        "errors": result.errors,
        "launches": result.launches,
        "cases": result.cases,
        "witnessed": result.witnessed,
        "notes": result.notes,
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read and validate a report.

    Raises
    ------
    SpecError
        The file cannot be read or is no report of this schema.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError("report", f"{path}: {error}", "a report.json of hal conform") from error
    broken = schema_errors(report)
    if broken:
        raise SpecError("report", f"{path}: {broken[0]}", f"a report of schema {SCHEMA_VERSION}")
    assert isinstance(report, dict)
    return report
