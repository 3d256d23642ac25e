"""Reports of runs that never were, for tests of what is made from them; in themselves they are right."""

from __future__ import annotations

from typing import Any

from hal_conformance import again, certificate, report, verdict
from hal_conformance.case import MlaCase
from hal_conformance.checks import planned
from hal_conformance.context import Context, Settings
from hal_conformance.ep_case import EpCase
from hal_conformance.facts import environment
from hal_conformance.headline import headline
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.session import NOT_DECLARED, Result, Session
from hal_conformance.table import OBLIGATIONS, Obligation
from hal_conformance.waivers import Waiver

import hal

_ERRORS = {
    "rows": 10,
    "worst": 0.4,
    "max_abs": 1e-4,
    "max_cosine": 1e-7,
    "ulp": [9, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    "ratio": [5, 3, 2, 0, 0, 0, 0, 0],
}
_LASTED = 3600.0


def made(*waivers: Waiver, mode: Any = "default", only: tuple[str, ...] = (), **changed: str) -> dict[str, Any]:
    """A report of a backend that passes, but for the named obligations; of the others than ``only`` none was run."""
    session = Session(Settings("acme", 5, mode), only, waivers={w.obligation: w for w in waivers}, fresh=True)
    session.started -= _LASTED
    session._clock -= _LASTED
    session.capabilities = hal.capabilities("cpu")
    session.facts = {
        "state": "available",
        "reason": "chip 7, <b>rev B</b>",
        "capabilities": session.capabilities.to_dict(),
        "evidence": "simulation",
        "details": {"driver": "acme 3"},
        "distribution": {
            "name": "hal-acme",
            "version": "1.0",
            "editable": False,
            "hash": "ab" * 32,
            "requires": [{"name": "acme-kernels", "version": "1.0", "hash": "ef" * 32}],
            "reaches": [],
        },
        "environment": environment(),
    }
    for o in OBLIGATIONS:
        left_out = "SKIPPED" if only and o.id not in only else ""
        result = _result(session, o, left_out or changed.get(o.id.replace("-", "_"), ""))
        session._waive(result)
        session.results[o.id] = result
    for case in (MlaCase(), EpCase(scales="float32")):
        session.sizes.add(case)
    points = [{"name": "b1 h16 s4096", "seconds": 1e-3, "flops": 1e8, "bytes": 5e6}]
    return report.make(session, {"points": points, "flops": 2e11, "bytes": 1e10, "dtype": "bfloat16"})


def _result(session: Session, o: Obligation, status: str) -> Result:
    """What became of one obligation; where nothing is said, what a right backend gives."""
    assert session.capabilities is not None
    declared = REQUIREMENTS[o.requires].declared(session.capabilities)
    status = status or ("PASS" if declared else "REFUSED")
    if status in ("SKIPPED", "BLOCKED"):
        return Result(o.id, status, "filtered out")  # type: ignore[arg-type]
    count = planned(Context(session.settings, session.capabilities, o, 0)) if declared else 1
    result = Result(o.id, status, "", count, count, count, seconds=1.0)  # type: ignore[arg-type]
    kernel = {"MLA": "decode", "EPN": "dispatch", "EPL": "pack"}.get(o.id[:3]) if declared else None
    launched = {f"acme:{kernel}@acme0": 1} if kernel else {}
    result.cases = [{"index": i, "calls": 1, "launches": launched, "seconds": 0.01} for i in range(count)]
    result.launches = dict.fromkeys(launched, count)
    if kernel == "decode":
        result.errors = {"out": dict(_ERRORS), "lse": _ERRORS | {"max_cosine": 0.0}}
    if status == "REFUSED":
        result.message = NOT_DECLARED
    elif o.level != "L0":
        result.witnessed = [*range(count)]
    if status == "FAIL":
        result.message = "out differs"
        line = again.of_case(session.settings, o.id, 0)
        result.failures = [{"status": "FAIL", "problems": ["out differs"], "reproduce": line, "index": 0}]
    return result


def forge(one: dict[str, Any]) -> None:
    """Make everything that the suite itself would make of a report that was changed, the certificate last."""
    one["levels"] = verdict.levels({row["id"]: row["status"] for row in one["obligations"]})
    one["verdict"], reasons = verdict.overall(one["levels"], one["run"]["filtered"], one["problems"])
    one["headline"] = headline(one, reasons)
    one["certificate"] = certificate.issue(one)
