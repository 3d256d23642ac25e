"""What changed between two reports of a backend, and many reports side by side."""

from __future__ import annotations

from typing import Any, Final

from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import LEVELS, OBLIGATIONS
from hal_conformance.used import used

_RED: Final = ("FAIL", "CRASH", "TIMEOUT", "ERROR")
_UNSEEN: Final = ("SKIPPED", "BLOCKED")
_KINDS: Final = ("broken", "worse", "fixed", "changed")
"""In the order a reader wants them."""

_GOOD: Final = ("PASS", "WAIVED")

MARKS: Final = {
    "certified": "certified: a whole run, of files named by hash",
    "whole": "a whole run that does not certify",
    "part": "a quick or filtered run: only a part of what there is was tried",
}
"""How much a PASS says, by the run it was seen in."""

_WORSE: Final = 2.0
"""Worst errors that grew by this factor are shown even though they still pass."""


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of what differs: ``what``, ``then``, ``now``, ``kind`` (``broken``, ``fixed``, ``worse`` or ``changed``)."""
    rows: list[dict[str, str]] = []

    def add(kind: str, what: str, then: object, now: object) -> None:
        if then != now:
            rows.append({"kind": kind, "what": what, "then": str(then), "now": str(now)})

    add("changed", "verdict", old["verdict"], new["verdict"])
    levels = {row["id"]: row["verdict"] for row in old["levels"]}
    for row in new["levels"]:
        add("changed", f"level {row['id']}", levels.pop(row["id"], "absent"), row["verdict"])
    then = {row["id"]: row for row in old["obligations"]}
    unseen = [sum(row["status"] in _UNSEEN for row in report["obligations"]) for report in (old, new)]
    add("changed", "obligations not run", *unseen)
    for row in new["obligations"]:
        before = then.pop(row["id"], None)
        was, now = "absent" if before is None else before["status"], row["status"]
        if (was in _UNSEEN or now in _UNSEEN) and not {was, now} & {*_RED}:
            # Nothing is known of it then or now; how many there are is said once.
            continue
        broken, fixed = now in _RED and was not in _RED, was in _RED and now in ("PASS", "REFUSED")
        add("broken" if broken else "fixed" if fixed else "changed", f"{row['id']} {row['title']}", was, now)
        if before is not None and was == now:
            _worse(before, row, add)
    for gone in then.values():
        add("changed", f"{gone['id']} {gone['title']}", gone["status"], "absent")
    for section in ("suite", "environment"):
        for key in sorted(set(old[section]) | set(new[section])):
            add("changed", f"{section} {key}", *(_short(key, r[section].get(key, "–")) for r in (old, new)))
    for key in ("version", "hash"):
        add("changed", f"backend {key}", *(_short(key, r["backend"]["distribution"][key]) for r in (old, new)))
    return sorted(rows, key=lambda row: _KINDS.index(row["kind"]))


def _short(key: str, value: Any) -> Any:
    """A hash by its beginning: the reports have all of it."""
    return f"{value[:12]}…" if key == "hash" and value else value


def _worse(before: dict[str, Any], row: dict[str, Any], add: Any) -> None:
    for name, error in row["errors"].items():
        was, now = before["errors"].get(name, {}).get("worst"), error["worst"]
        if isinstance(was, (int, float)) and isinstance(now, (int, float)) and now > 0.1 and now > _WORSE * was > 0:
            add("worse", f"{row['id']} worst error of {name} over its limit", f"{was:.3g}", f"{now:.3g}")


def _mark(report: dict[str, Any]) -> str:
    """How much a PASS of this report says."""
    if report["certificate"]:
        return "certified"
    return "part" if report["run"]["filtered"] else "whole"


def matrix(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The compatibility matrix: what was seen, by level, by requirement and by obligation."""
    by_id = [{row["id"]: row for row in report["obligations"]} for report in reports]

    def cell(text: str, tag: bool = True, mark: str = "") -> dict[str, Any]:
        return {"text": text, "tag": tag, "mark": mark if text in _GOOD else ""}

    marks = [_mark(report) for report in reports]
    facts = [
        ("evidence", [cell(r["backend"]["evidence"] or "none", False) for r in reports]),
        ("certificate", [cell("yes" if r["certificate"] else "no", False) for r in reports]),
        ("waived", [cell(", ".join(w["obligation"] for w in r["waivers"]) or "–", False) for r in reports]),
        ("run", [cell(f"{r['run']['mode']}, {r['run']['started'][:10]}", False) for r in reports]),
    ]
    levels = [
        (
            f"{level.id} {level.title}",
            [
                cell(next((x["verdict"] for x in r["levels"] if x["id"] == level.id), "INCOMPLETE"), mark=mark)
                for r, mark in zip(reports, marks, strict=True)
            ],
        )
        for level in LEVELS
    ]
    used = {o.requires for o in OBLIGATIONS} - {"nothing"}
    wanted = [(name, requirement) for name, requirement in REQUIREMENTS.items() if name in used]
    seen = list(zip(by_id, marks, strict=True))
    features = [
        (requirement.title, [cell(_feature(name, rows), mark=mark) for rows, mark in seen])
        for name, requirement in wanted
    ]
    obligations = [
        (
            f"{o.id} {o.title}",
            [cell(rows[o.id]["status"] if o.id in rows else "SKIPPED", mark=mark) for rows, mark in seen],
        )
        for o in OBLIGATIONS
    ]
    sections = [("Reports", facts), ("Levels", levels), ("Features", features), ("Obligations", obligations)]
    return {
        "backends": [{"name": r["backend"]["name"]} for r in reports],
        "legend": [{"mark": mark, "text": text} for mark, text in MARKS.items() if mark in marks],
        "sections": [
            {"title": title, "rows": [{"title": t, "cells": cells} for t, cells in rows]} for title, rows in sections
        ],
    }


def _feature(name: str, rows: dict[str, dict[str, Any]]) -> str:
    """What the obligations that require a feature showed of it, and the failing calls of others that made use of it."""
    seen = {rows[o.id]["status"] for o in OBLIGATIONS if o.requires == name and o.id in rows}
    seen |= {row["status"] for row in rows.values() if any(name in used(f.get("case")) for f in row["failures"])}
    for status in (*_RED, "BLOCKED", "SKIPPED", "WAIVED", "UNCOVERED", "PASS", "REFUSED"):
        if status in seen:
            return status
    return "SKIPPED"
