"""``report.html``: one self-contained page, light and dark, readable on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hal_conformance import plots
from hal_conformance.certificate import obstacles
from hal_conformance.declared import OPERATIONS, fields
from hal_conformance.table import BY_ID
from hal_conformance.verdict import MEANING

_RED = ("FAIL", "CRASH", "TIMEOUT", "ERROR")


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("hal_conformance", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def render(report: dict[str, Any], against: list[dict[str, Any]] | None = None, older: str = "") -> str:
    """The page of one report. ``against`` are the rows of a diff with another, which ``older`` names."""
    rows = report["obligations"]
    totals = {name: _sum(rows, name) for name in ("out", "lse")}
    launches: dict[str, int] = {}
    for row in rows:
        for name, count in row["launches"].items():
            launches[name] = launches.get(name, 0) + count
    roof = report["roofline"] or {}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            broken=[row for row in rows if row["status"] in _RED],
            by_level=[(level, [r for r in rows if r["level"] == level["id"]]) for level in report["levels"]],
            sentences={o.id: o.sentence for o in BY_ID.values()},
            meaning=MEANING,
            capabilities=_capabilities(report["backend"]["capabilities"]),
            operations=[(k, v) for k, v in OPERATIONS.items() if (report["backend"]["capabilities"] or {}).get(k)],
            errors={
                name: t | {"ratio": Markup(plots.ratio_bars(t["ratio"])), "ulp": Markup(plots.ulp_bars(t["ulp"]))}
                for name, t in totals.items()
                if t["ratio"]
            },
            launches=sorted(launches.items()),
            roofline=Markup(plots.roofline(roof)) if roof else "",
            roof=roof,
            calls=sum(row["calls"] for row in rows),
            witnessed=sum(len(row.get("witnessed", [])) for row in rows),
            obstacles=obstacles(report),
            waived=[row for row in rows if row["status"] == "WAIVED"],
            waivers={waiver["obligation"]: waiver for waiver in report["waivers"]},
            against=against,
            older=older,
        )
    )


def _sum(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"ratio": [], "ulp": [], "rows": 0, "worst": 0.0}
    for error in (row["errors"].get(name) for row in rows):
        if not error:
            continue
        for key in ("ratio", "ulp"):
            found[key] = [a + b for a, b in zip(found[key] or [0] * len(error[key]), error[key], strict=True)]
        found["rows"] += error["rows"]
        if isinstance(error["worst"], str) or isinstance(found["worst"], str):
            found["worst"] = error["worst"] if isinstance(error["worst"], str) else found["worst"]
        else:
            found["worst"] = max(found["worst"], error["worst"])
    return found


def _capabilities(declared: dict[str, Any] | None) -> list[tuple[str, dict[str, str]]]:
    """Rows of the capability matrix: field, and for each operation what is declared."""
    rows: dict[str, dict[str, str]] = {}
    for operation in OPERATIONS:
        for field, value in fields(declared, operation).items():
            rows.setdefault(field, {})[operation] = value
    return sorted(rows.items())


def write(report: dict[str, Any], path: Path, against: list[dict[str, Any]] | None = None, older: str = "") -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report, against, older))


def write_matrix(table: dict[str, Any], path: Path) -> None:
    """Write the compatibility matrix of many reports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_environment().get_template("matrix.html.j2").render(**table))
