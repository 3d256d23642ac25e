"""Whether what a report says follows from what it holds: verdicts, counts, sizes, and what is declared.

A report can be changed and certified again by whoever holds it. So every field is held against all that the others, the
table and the seed say of it; what nothing else follows from stays a claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hal.spec.capability import Capabilities
from hal_conformance.case import MlaCase
from hal_conformance.checks import planned
from hal_conformance.checks.capability import illegal
from hal_conformance.consistency_rows import row_errors
from hal_conformance.consistency_run import run_errors, settings_of
from hal_conformance.context import Context
from hal_conformance.covers import covers
from hal_conformance.ep_case import EpCase
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.sizes import impossible
from hal_conformance.table import BY_ID, OBLIGATIONS
from hal_conformance.verdict import levels, overall


def consistency(report: dict[str, Any]) -> list[str]:
    """What does not follow, each in a sentence; empty if all does."""
    if [row["id"] for row in report["obligations"]] != [o.id for o in OBLIGATIONS]:
        return ["the obligations are not those of this suite, each once and in their order"]
    settings = settings_of(report)
    waivers = {waiver["obligation"]: waiver for waiver in report["waivers"]}
    errors: list[str] = []
    for row in report["obligations"]:
        errors += row_errors(row, settings, waivers.get(row["id"]), report["run"]["case"])
    found = declared_in(report)
    if isinstance(found, str):
        errors += [*run_errors(report, None), found]
    else:
        errors += [*run_errors(report, found), *_by_declaration(report, found)]
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


def _by_declaration(report: dict[str, Any], capabilities: Capabilities) -> list[str]:
    """What does not follow from what is declared; of what is not legal nothing follows, but that CAP-04 failed."""
    wrong = list(illegal(capabilities))
    if not wrong:
        return [*_declared(report, capabilities), *_planned(report, capabilities), *_measured(report, capabilities)]
    passed = any(row["id"] == "CAP-04" and row["status"] == "PASS" for row in report["obligations"])
    return [f"CAP-04 says PASS, but {text}" for text in wrong if passed]


def _declared(report: dict[str, Any], capabilities: Capabilities) -> Iterator[str]:
    """Obligations left out as not declared that are, and the reverse."""
    for row in report["obligations"]:
        requires = REQUIREMENTS[BY_ID[row["id"]].requires]
        declared = requires.declared(capabilities)
        if declared and row["status"] == "REFUSED":
            yield f"{row['id']} says REFUSED, but {requires.title} is declared"
        if not declared and row["status"] in ("PASS", "UNCOVERED"):
            yield f"{row['id']} says {row['status']}, but {requires.title} is not declared"
        if row["status"] == "UNCOVERED" and BY_ID[row["id"]].covered:
            yield f"{row['id']} says UNCOVERED, but this suite tests it"


def _planned(report: dict[str, Any], capabilities: Capabilities) -> Iterator[str]:
    """Obligations of which a run of this mode and seed has more or fewer cases."""
    if report["run"]["case"] is not None:
        return
    settings = settings_of(report)
    for row in report["obligations"]:
        if row["planned"] and REQUIREMENTS[BY_ID[row["id"]].requires].declared(capabilities):
            count = planned(Context(settings, capabilities, BY_ID[row["id"]], 0))
            if row["planned"] != count:
                yield f"{row['id']} ran {row['planned']} cases where this mode and seed have {count}"


def _measured(report: dict[str, Any], capabilities: Capabilities) -> Iterator[str]:
    """Whether it says how far every axis went, and of how many pairs."""
    told = report.get("coverage", {"covered": 0, "pairs": 0})
    pairs = sum(len(cover.legal_pairs()) for cover in covers(capabilities, report["run"].get("ranks", 0)).values())
    if told["pairs"] != pairs:
        yield f"what is declared makes {pairs} pairs of values, and the report tells of others"
    if told["covered"] > told["pairs"]:
        yield f"{told['covered']} pairs of values met, of {told['pairs']}"
    passed = {row["id"] for row in report["obligations"] if row["status"] == "PASS"}
    axes = set(MlaCase().sizes()) if "MLA-01" in passed else set()
    if passed & {"EPN-01", "EPL-01"}:
        axes |= set(EpCase(scales="float32" if "EPN-08" in passed else "").sizes())
    missing = axes - {row["axis"] for row in report.get("sizes", [])}
    if missing:
        yield f"it does not say how large {', '.join(sorted(missing))} went"
    yield from impossible(report.get("sizes", []), capabilities)
