"""From obligations to levels, from levels to one word. Reports and `verify` use the same rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from hal_conformance.table import LEVELS, of_level

LevelVerdict = Literal["PASS", "WAIVED", "FAIL", "BLOCKED", "INCOMPLETE", "UNCOVERED", "UNDECLARED", "EMPTY"]

MEANING: Final[dict[str, str]] = {
    "PASS": "every obligation is held",
    "WAIVED": "failures, each with a waiver in force",
    "FAIL": "at least one obligation is broken",
    "BLOCKED": "not tested: a level below failed",
    "INCOMPLETE": "not everything was run",
    "UNCOVERED": "declared, and this suite does not test it yet",
    "UNDECLARED": "nothing of it is declared; every call of it is refused as it must be",
    "EMPTY": "this suite has no obligations here yet",
}

_RED: Final = {"FAIL", "CRASH", "TIMEOUT", "ERROR"}


def level_verdict(statuses: Iterable[str]) -> LevelVerdict:
    """What the statuses of a level's obligations make of the level."""
    seen = set(statuses)
    if not seen:
        return "EMPTY"
    if seen & _RED:
        return "FAIL"
    if "BLOCKED" in seen:
        return "BLOCKED"
    if "SKIPPED" in seen:
        return "INCOMPLETE"
    if "WAIVED" in seen:
        return "WAIVED"
    if "UNCOVERED" in seen:
        return "UNCOVERED"
    return "PASS" if "PASS" in seen else "UNDECLARED"


def levels(statuses: Mapping[str, str]) -> list[dict[str, Any]]:
    """The verdict of every level; an obligation that is missing was not run."""
    rows = []
    for level in LEVELS:
        here = [statuses.get(o.id, "SKIPPED") for o in of_level(level.id)]
        counts = {status: here.count(status) for status in sorted(set(here))}
        rows.append({"id": level.id, "title": level.title, "verdict": level_verdict(here), "counts": counts})
    return rows


def overall(rows: list[dict[str, Any]], filtered: bool, problems: list[str]) -> tuple[str, list[str]]:
    """``PASS``, ``WAIVED``, ``FAIL`` or ``INCOMPLETE``, and why it is not more."""
    reasons = list(problems)
    reasons += [f"{row['id']} {row['verdict']}: {MEANING[row['verdict']]}" for row in rows if row["verdict"] == "FAIL"]
    if reasons:
        return "FAIL", reasons
    executed = [row for row in rows if row["verdict"] in ("PASS", "WAIVED")]
    if filtered or any(row["verdict"] in ("INCOMPLETE", "BLOCKED") for row in rows):
        return "INCOMPLETE", ["not everything was run: such a run shows nothing about the rest"]
    if not executed:
        return "FAIL", ["nothing was executed"]
    return ("WAIVED" if any(row["verdict"] == "WAIVED" for row in rows) else "PASS"), []
