"""Whether what a report says follows from what it holds: verdicts, counts, sizes, and what is declared."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hal.spec.capability import Capabilities
from hal_conformance.case import MlaCase
from hal_conformance.checks import planned
from hal_conformance.context import Context, Settings
from hal_conformance.covers import covers
from hal_conformance.ep_case import EpCase
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import BY_ID, OBLIGATIONS
from hal_conformance.verdict import levels, overall


def consistency(report: dict[str, Any]) -> list[str]:
    """Whether the verdicts follow from the results, and the results are complete."""
    errors = []
    results = {row["id"]: row for row in report["obligations"]}
    if set(results) != {o.id for o in OBLIGATIONS} or len(results) != len(report["obligations"]):
        errors.append("the obligations are not those of this suite, each once")
        return errors
    for row in report["obligations"]:
        if row["status"] == "PASS" and (row["failures"] or not row["calls"] or row["executed"] != row["planned"]):
            ran = f"{row['executed']} of {row['planned']} cases ran, of {row['calls']} calls"
            errors.append(f"{row['id']} says PASS, but {ran}, and {len(row['failures'])} failed")
        errors += _sums(row)
        if row["status"] == "WAIVED" and row["id"] not in {w["obligation"] for w in report["waivers"]}:
            errors.append(f"{row['id']} says WAIVED without a waiver")
    waived = {row["id"] for row in report["obligations"] if row["status"] == "WAIVED"}
    errors += [
        f"{w['obligation']} has a waiver, but none was used" for w in report["waivers"] if w["obligation"] not in waived
    ]
    capabilities = declared_in(report)
    if isinstance(capabilities, str):
        errors.append(capabilities)
    else:
        errors += _undeclared(report, capabilities)
        errors += _planned(report, capabilities)
        errors += _measured(report, capabilities)
    rows = levels({row["id"]: row["status"] for row in report["obligations"]})
    if rows != report["levels"]:
        errors.append("the verdicts of the levels do not follow from the obligations")
    if overall(rows, report["run"]["filtered"], report["problems"])[0] != report["verdict"]:
        errors.append("the verdict does not follow from the levels")
    return errors


def declared_in(report: dict[str, Any]) -> Capabilities | str:
    """What the report says is declared, or why it says nothing."""
    try:
        found = Capabilities.from_dict(report["backend"]["capabilities"])
    except Exception as error:
        return f"the capabilities cannot be read: {error}"
    return found if found.device_types else "the capabilities cannot be read: they name no device_types"


def _sums(row: dict[str, Any]) -> list[str]:
    """Whether the cases of an obligation make up its totals."""
    cases, errors = row["cases"], []
    if row["status"] == "PASS" and len({case["index"] for case in cases}) != row["executed"]:
        errors.append(f"{row['id']} says that {row['executed']} cases ran, and tells of {len(cases)}")
    if sum(case["calls"] for case in cases) != row["calls"]:
        errors.append(f"{row['id']} says {row['calls']} calls, and its cases made others")
    launches: Counter[str] = Counter()
    for case in cases:
        launches.update(case["launches"])
    if {k: n for k, n in launches.items() if n} != {k: n for k, n in row["launches"].items() if n}:
        errors.append(f"{row['id']} tells of other launches than its cases")
    return errors


def _planned(report: dict[str, Any], capabilities: Capabilities) -> list[str]:
    """Obligations of which a whole run has more cases."""
    run, errors = report["run"], []
    if run["filtered"]:
        return []
    settings = Settings(report["backend"]["name"], run["seed"], run["mode"], device=run["device"])
    for row in report["obligations"]:
        if row["status"] == "PASS" and REQUIREMENTS[BY_ID[row["id"]].requires].declared(capabilities):
            least = planned(Context(settings, capabilities, BY_ID[row["id"]], 0))
            if row["planned"] < least:
                errors.append(f"{row['id']} ran {row['planned']} cases where this mode has {least}")
    return errors


def _measured(report: dict[str, Any], capabilities: Capabilities) -> list[str]:
    """Whether it says how far every axis went, and of how many pairs."""
    errors = []
    pairs = sum(len(cover.legal_pairs()) for cover in covers(capabilities).values())
    if not report["run"]["filtered"] and report.get("coverage", {}).get("pairs") != pairs:
        errors.append(f"what is declared makes {pairs} pairs of values, and the report tells of others")
    passed = {row["id"] for row in report["obligations"] if row["status"] == "PASS"}
    axes = set(MlaCase().sizes()) if "MLA-01" in passed else set()
    if "EPN-01" in passed:
        axes |= set(EpCase(scales="float32" if "EPN-08" in passed else "").sizes())
    missing = axes - {row["axis"] for row in report.get("sizes", [])}
    if missing:
        errors.append(f"it does not say how large {', '.join(sorted(missing))} went")
    return errors


def _undeclared(report: dict[str, Any], capabilities: Capabilities) -> list[str]:
    """Obligations left out as not declared that are, and the reverse."""
    errors = []
    for row in report["obligations"]:
        declared = REQUIREMENTS[BY_ID[row["id"]].requires].declared(capabilities)
        if declared and row["status"] == "REFUSED":
            errors.append(f"{row['id']} says REFUSED, but {BY_ID[row['id']].requires} is declared")
        if not declared and row["status"] in ("PASS", "UNCOVERED"):
            errors.append(f"{row['id']} says {row['status']}, but {BY_ID[row['id']].requires} is not declared")
        if row["status"] == "UNCOVERED" and BY_ID[row["id"]].covered:
            errors.append(f"{row['id']} says UNCOVERED, but this suite tests it")
    return errors
