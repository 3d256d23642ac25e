"""What a complete, passing run binds together, and checking it again later without the backend's machine.

A certificate is no signature: it names, by hash, exactly which suite judged exactly which files on which device, so
that a claim can be compared with what is installed and repeated from its seed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from importlib.metadata import entry_points
from typing import Any

from hal import plugins
from hal_conformance import SUITE_VERSION
from hal_conformance.consistency import consistency, declared_in
from hal_conformance.facts import distribution, suite_hash
from hal_conformance.schema import schema_errors
from hal_conformance.waivers import LONGEST
from hal_conformance.witness import is_judged_apart, is_judged_twice

REQUIRED = ("L0",)
"""Levels without which there is nothing to certify; beside them at least one level of work."""


def report_hash(report: dict[str, Any]) -> str:
    """Over the report without its certificate, in one canonical spelling."""
    body = {key: value for key, value in report.items() if key != "certificate"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def obstacles(report: dict[str, Any]) -> list[str]:
    """Why this report cannot certify; empty if it can."""
    found = []
    run, backend = report["run"], report["backend"]
    if run["filtered"]:
        found.append("quick mode or a filter was used, or the run was interrupted")
    if not run.get("fresh"):
        found.append("the seed was chosen: run without --seed")
    if run.get("host") != "hal conform":
        found.append("pytest executes whatever plugins and files it finds: run hal conform")
    if report["verdict"] not in ("PASS", "WAIVED"):
        found.append(f"the verdict is {report['verdict']}")
    verdicts = {row["id"]: row["verdict"] for row in report["levels"]}
    held = [level for level, verdict in verdicts.items() if verdict in ("PASS", "WAIVED")]
    if not set(REQUIRED) <= set(held) or len(held) < 2:
        found.append("no level of work is held")
    made = backend["distribution"]
    if not made["hash"]:
        found.append("the backend's files could not be hashed")
    if made["editable"]:
        found.append("the backend is an editable install: its files are not fixed; install its wheel")
    found += [
        f"its dependency {one['name']} is an editable install, or has no files: install its wheel"
        for one in made.get("requires", [])
        if not one["hash"]
    ]
    found += [f"its distribution reaches beyond its package: {text}" for text in made.get("reaches", [])]
    alone = [o["id"] for o in report["obligations"] if _judged_once(o)]
    if alone:
        found.append(f"too few cases were judged apart from the backend: {', '.join(alone)}")
    readable = declared_in(report)
    if isinstance(readable, str):
        found.append(readable)
    if backend["evidence"] == "compiled" or backend["evidence"] is None:
        found.append("kernels are not executed on this machine")
    return found


def _judged_once(row: dict[str, Any]) -> bool:
    least = row["executed"] if is_judged_apart(row["id"]) else 1
    return row["status"] == "PASS" and is_judged_twice(row["id"]) and len(row.get("witnessed", [])) < least


def issue(report: dict[str, Any]) -> dict[str, Any] | None:
    """The certificate of a report that can certify, else None."""
    if obstacles(report):
        return None
    backend = report["backend"]
    return {
        "backend": backend["name"],
        "distribution": f"{backend['distribution']['name']} {backend['distribution']['version']}",
        "backend_hash": backend["distribution"]["hash"],
        "requires": backend["distribution"].get("requires", []),
        "suite": report["suite"]["version"],
        "suite_hash": report["suite"]["hash"],
        "specification": report["environment"]["specification"],
        "device": backend["reason"],
        "torch_device": report["run"]["device"] or backend["capabilities"]["device_types"][0],
        "patience": report["run"]["patience"],
        "driver": backend["details"],
        "evidence": backend["evidence"],
        "levels": {r["id"]: r["verdict"] for r in report["levels"] if r["verdict"] in ("PASS", "WAIVED")},
        "undeclared": [r["id"] for r in report["levels"] if r["verdict"] == "UNDECLARED"],
        "waivers": report["waivers"],
        "sizes": report.get("sizes", []),
        "seed": report["run"]["seed"],
        "issued": report["run"]["started"],
        "report_hash": report_hash(report),
    }


def verify(report: Any, today: datetime.date | None = None) -> tuple[list[str], list[str]]:
    """Check a report again, offline.

    Returns
    -------
    errors, notes : list of str
        Any error means that the certificate does not hold. Notes say what could not be checked here.
    """
    broken = schema_errors(report)
    if broken:
        return [f"not a report of this schema: {text}" for text in broken[:3]], []
    errors = consistency(report)
    certificate = report["certificate"]
    if certificate is None:
        return [*errors, f"there is no certificate: {'; '.join(obstacles(report)) or 'it was removed'}"], []
    if issue(report) != certificate:
        # Nothing in it can be taken at its word, not even that it is there.
        return [*errors, "the certificate is not the one this report gives: one of them was changed"], []
    installed = suite_hash()
    if certificate["suite_hash"] != installed:
        # Two states of a checkout have one version: their hashes tell them apart.
        errors.append(
            f"judged by the suite {certificate['suite']} of hash {certificate['suite_hash'][:12]}, and the one "
            f"installed here is {SUITE_VERSION} of hash {installed[:12]}: verify with the one that judged"
        )
    day = today or datetime.date.today()
    for waiver in certificate["waivers"]:
        if waiver["expires"] < day.isoformat():
            errors.append(f"the waiver of {waiver['obligation']} expired on {waiver['expires']}")
        if waiver["expires"] > (day + LONGEST).isoformat():
            errors.append(
                f"the waiver of {waiver['obligation']} lasts until {waiver['expires']}: a year is the longest"
            )
    notes = []
    if not list(entry_points(group=plugins.GROUP, name=certificate["backend"])):
        notes.append(f"backend {certificate['backend']!r} is not installed here: its files were not compared")
    else:
        here = distribution(certificate["backend"])
        if here["hash"] != certificate["backend_hash"]:
            errors.append(
                f"the installed files of {certificate['backend']!r} ({here['name']} {here['version']}) "
                "are not the certified ones"
            )
        errors += _changed(certificate["requires"], here["requires"])
        errors += [f"it reaches beyond its package here: {text}" for text in here["reaches"]]
    return errors, notes


def _changed(certified: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    """Dependencies of a backend that are other ones here."""
    was, now = ({one["name"]: one["hash"] for one in every} for every in (certified, here))
    return [
        f"its dependency {name} is not the certified one"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
