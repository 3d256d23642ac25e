"""What changed between two reports of a backend, and many reports side by side."""

from __future__ import annotations

from typing import Any, Final

from hal_conformance.declared import OPERATIONS, fields
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import LEVELS, OBLIGATIONS
from hal_conformance.used import used

_RED: Final = ("FAIL", "CRASH", "TIMEOUT", "ERROR")
_UNSEEN: Final = ("SKIPPED", "BLOCKED")
_KINDS: Final = ("broken", "worse", "fixed", "unclear", "not run", "changed")
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
    """Rows of what differs: ``what``, ``then``, ``now``, and ``kind``.

    Of what one of the two did not run nothing is known, so nothing has changed: how much that is, is one row, ``not
    run``. Kinds of what both ran are ``broken``, ``fixed``, ``worse``; ``unclear``, where the run that it passed in
    tried fewer cases than the one that it failed in, or none; and ``changed``, of everything else.
    """
    rows: list[dict[str, str]] = []

    def add(kind: str, what: str, then: object, now: object) -> None:
        if then != now:
            rows.append({"kind": kind, "what": what, "then": str(then), "now": str(now)})

    if _scope(old) == _scope(new):
        add("changed", "verdict", old["verdict"], new["verdict"])
    unseen = [{row["id"] for row in report["obligations"] if row["status"] in _UNSEEN} for report in (old, new)]
    left_out = _left_out(old) ^ _left_out(new)
    then = {row["id"]: row for row in old["obligations"]}
    levels = {row["id"]: row["verdict"] for row in old["levels"]}
    for row in new["levels"]:
        before = levels.get(row["id"], "absent")
        if not any(one["level"] == row["id"] and one["id"] in left_out for one in new["obligations"]):
            add("changed", f"level {row['id']}", before, row["verdict"])
    add("not run", f"obligations{_unknown(then, new, unseen)}", *map(len, unseen))
    for row in new["obligations"]:
        before = then.pop(row["id"], None)
        if row["id"] in unseen[0] | unseen[1]:
            continue
        if before is None:
            if row["status"] in _RED:
                add("unclear", _name(row), "not in that suite", row["status"])
        elif before["status"] == row["status"]:
            _worse(before, row, add)
        else:
            kind = _kind(before, row)
            add(kind, _name(row), *(_said(one, kind) for one in (before, row)))
    add("changed", "obligations in the suite", len(old["obligations"]), len(new["obligations"]))
    for section in ("suite", "environment"):
        for key in sorted(set(old[section]) | set(new[section])):
            add("changed", f"{section} {key}", *(_short(key, r[section].get(key, "–")) for r in (old, new)))
    for name, key in (("name", "name"), ("device", "reason"), ("evidence", "evidence")):
        add("changed", f"backend {name}", *(r["backend"][key] for r in (old, new)))
    for key in ("version", "hash"):
        add("changed", f"backend {key}", *(_short(key, r["backend"]["distribution"][key]) for r in (old, new)))
    for operation, title in OPERATIONS.items():
        was, now = (fields(r["backend"]["capabilities"], operation) for r in (old, new))
        add("changed", f"declared: {title}", *("yes" if one else "no" for one in (was, now)))
        for field in sorted(was.keys() & now.keys()):
            add("changed", f"declared for {title}: {field}", was[field], now[field])
    return sorted(rows, key=lambda row: _KINDS.index(row["kind"]))


def name_of(report: dict[str, Any]) -> str:
    """Which report it is, to somebody who has several."""
    run, made = report["run"], report["backend"]["distribution"]
    backend = f"{report['backend']['name']} {made['version'] or ''}".strip()
    return f"the report of {backend}, {run['mode']} run of {run['started']}, seed {run['seed']}"


def _scope(report: dict[str, Any]) -> tuple[object, ...]:
    """What a run was to be of."""
    run = report["run"]
    return run["mode"], run["only"], run["case"], run["filtered"]


def _left_out(report: dict[str, Any]) -> set[str]:
    """Obligations that a filter left out, or an interruption."""
    return {row["id"] for row in report["obligations"] if row["status"] == "SKIPPED"}


def _name(row: dict[str, Any]) -> str:
    return f"{row['id']} {row['title']}"


def _unknown(then: dict[str, Any], new: dict[str, Any], unseen: list[set[str]]) -> str:
    """Failures of one run that the other says nothing of: neither broken nor fixed."""
    old_red = [name for name, row in then.items() if row["status"] in _RED and name in unseen[1]]
    new_red = [row["id"] for row in new["obligations"] if row["status"] in _RED and row["id"] in unseen[0]]
    found = [f"failed then, not run now: {', '.join(old_red)}"] if old_red else []
    found += [f"fail now, not run then: {', '.join(new_red)}"] if new_red else []
    return f" ({'; '.join(found)})" if found else ""


def _kind(before: dict[str, Any], row: dict[str, Any]) -> str:
    was, now = before["status"], row["status"]
    if _fewer(before, row) or _fewer(row, before):
        return "unclear"
    if now in _RED and was not in _RED:
        return "broken"
    if was in (*_RED, "WAIVED") and now in ("PASS", "REFUSED"):
        return "fixed"
    return "worse" if now == "WAIVED" and was not in _RED else "changed"


def _fewer(passed: dict[str, Any], failed: dict[str, Any]) -> bool:
    """Whether an obligation passed in fewer cases than it failed in."""
    return (
        passed["status"] == "PASS" and failed["status"] in (*_RED, "WAIVED") and passed["planned"] < failed["planned"]
    )


def _said(row: dict[str, Any], kind: str) -> str:
    """A status, with how many cases it is of where that is what matters."""
    return f"{row['status']} ({row['planned']} cases)" if kind == "unclear" else str(row["status"])


def _short(key: str, value: Any) -> Any:
    """A hash by its beginning: the reports have all of it."""
    return f"{value[:12]}…" if key == "hash" and value else value


def _worse(before: dict[str, Any], row: dict[str, Any], add: Any) -> None:
    if row["planned"] > before["planned"]:
        return  # Of more cases the worst is worse.
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
