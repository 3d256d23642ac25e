"""The first line of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hal_conformance.certificate import obstacles

_SAID: Final = 3
"""Obstacles to a certificate that are named; the page has all."""


def headline(report: Mapping[str, Any], reasons: list[str]) -> str:
    """One sentence a person repeats to another."""
    name, verdict = report["backend"]["name"], report["verdict"]
    held = [row["id"] for row in report["levels"] if row["verdict"] in ("PASS", "WAIVED")]
    if verdict == "FAIL":
        broken = _obligations(report, "FAIL", "CRASH", "TIMEOUT")
        unjudged = _obligations(report, "ERROR")
        if unjudged:
            unjudged += " could not be judged"
        if broken:
            text = f"{name} does not conform: it breaks {broken}" + (f"; {unjudged}" if unjudged else "")
        elif unjudged:
            text = f"{name} was not judged to the end: {unjudged}"
        else:
            text = f"{name} does not conform: {'; '.join(reasons)}"
    elif verdict == "INCOMPLETE":
        met = report["coverage"]
        of_pairs = f" (quick: {met['covered']} of {met['pairs']} pairs)" if report["run"]["mode"] == "quick" else ""
        waived = any(o["status"] == "WAIVED" for o in report["obligations"])
        sound = "nothing beyond what is waived is broken" if waived else "nothing broken"
        text = f"{name}: {sound} in what was run, which is not everything{of_pairs}; cannot certify"
    else:
        text = f"{name} conforms: {', '.join(held)}"
    untested = [row["id"] for row in report["levels"] if row["verdict"] == "UNCOVERED"]
    if untested and verdict in ("PASS", "WAIVED"):
        text += f"; declared, and not tested by this suite: {', '.join(untested)}"
    if report["waivers"]:
        text += f", with {len(report['waivers'])} waived: {', '.join(w['obligation'] for w in report['waivers'])}"
    elif verdict == "PASS" and (found := obstacles(dict(report))):
        more = f"; and {len(found) - _SAID} more" if len(found) > _SAID else ""
        text += f"; not certified: {'; '.join(found[:_SAID])}{more}"
    return text


def _obligations(report: Mapping[str, Any], *statuses: str) -> str:
    """How many have one of these statuses, and which; empty if none has."""
    found = [row["id"] for row in report["obligations"] if row["status"] in statuses]
    named = f"{', '.join(found[:5])}{' …' if len(found) > 5 else ''}"
    return f"{len(found)} obligation{'s' * (len(found) != 1)} ({named})" if found else ""
