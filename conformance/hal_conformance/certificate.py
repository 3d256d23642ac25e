"""What a complete, passing run binds together; `hal_conformance.verify` checks it again later.

A certificate is no signature: it names, by hash, exactly which suite judged exactly which files on which device, so
that a claim can be compared with what is installed and repeated from its seed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hal_conformance.consistency import declared_in
from hal_conformance.witness import is_judged_twice

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
        found.append(f"not all cases were judged apart from the backend: {', '.join(alone)}")
    readable = declared_in(report)
    if isinstance(readable, str):
        found.append(readable)
    if backend["evidence"] == "compiled" or backend["evidence"] is None:
        found.append("kernels are not executed on this machine")
    return found


def _judged_once(row: dict[str, Any]) -> bool:
    judged = len(row.get("witnessed", []))
    return row["status"] == "PASS" and is_judged_twice(row["id"]) and judged < row["executed"]


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
        "issued": report["run"].get("ended"),
        "report_hash": report_hash(report),
    }
