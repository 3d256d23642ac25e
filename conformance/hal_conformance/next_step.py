"""What to do after a run: the first obligation that is not held, what it means, and the file where it is kept.

Files are found without importing the backend. A comment ``# step CAP-04, L1: do this`` in one of them says what to
write there, for these obligations or levels; what ``hal new-backend`` makes is full of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hal.plugins import GROUP
from hal_conformance.process import OUTSIDE
from hal_conformance.session import RED
from hal_conformance.table import BY_ID

UNAVAILABLE: Final = "available"
"""What a step is for that makes a device be found."""

_STEP: Final = re.compile(r"#\s*step ([\w, -]+): (.+)")

_WRITE: Final = {
    "CAP-01": "the hook hal_backend() in the module that the entry point names",
    "CAP-02": "probe()",
    "CAP-03": "spec_version",
    "CAP-07": "launches()",
    UNAVAILABLE: "probe(), and what it looks for",
    "L0": "capabilities()",
    "L1": "mla_decode(), and mla_plan() where it makes the schedule",
    "L2": "mla_decode(), and mla_plan() where it makes the schedule",
    "L3": "mla_decode()",
    "E1": "ep_buffer() and the engine it returns",
    "E2": "ep_buffer() and the engine it returns",
    "E3": "ep_buffer() and the engine it returns",
}
"""Of `hal.backend.Backend`, by obligation or level."""

_CALLING: Final = ("CAP-04", "CAP-05", "CAP-06")
"""Obligations of what is declared, which are seen by calls: of one that ends the process, its message says where."""

_MEANS: Final = {
    "L1": "mla_dense of Capabilities; hal.portable has kernels to begin with",
    "L3": "mla_sparse of Capabilities, or kv_formats, attn_sink and extra_kv_cache",
    "E1": "ep of Capabilities",
    "E2": 'modes=(…, "low_latency") in ep of Capabilities',
}
"""What declares the first obligations of a level."""


@dataclass(frozen=True, slots=True)
class Step:
    """A comment that says what to write.

    Attributes
    ----------
    where : str
        File and line, as an editor takes them.
    text : str
    """

    where: str
    text: str


def next_step(report: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal; the first says what is next, the others how.

    Parameters
    ----------
    report : mapping
        As `hal_conformance.report.make` gives it.
    """
    backend, run = report["backend"]["name"], report["run"]
    broken = next((row for row in report["obligations"] if row["status"] in RED), None)
    if broken is not None:
        return _broken(backend, broken, report["obligations"])
    if report["problems"]:
        return list(report["problems"])
    base = f"hal conform --backend {backend}"
    patience = "" if run["patience"] == 1 else f" --patience {run['patience']:g}"
    if run["only"] or run["case"] is not None:
        mode = "--full" if run["mode"] == "full" else "--quick"
        return [f"what was run holds; the rest: {base} {mode}{patience}"]
    if any(row["status"] == "SKIPPED" for row in report["obligations"]):
        mode = "" if run["mode"] == "default" else f" --{run['mode']}"
        return [f"what was run holds, and the run was interrupted; all of it: {base}{mode}{patience}"]
    open_level = next((row for row in report["levels"] if row["verdict"] == "UNDECLARED" and row["id"] in _MEANS), None)
    if run["mode"] == "quick":
        lines = [f"what is declared holds as far as a quick run sees; without --quick it certifies: {base}{patience}"]
    elif report["certificate"] is None:
        lines = ["what is declared holds; hal conform verify says of the report why it does not certify"]
    else:
        lines = ["what is declared holds, and the report certifies it"]
    if open_level is not None:
        level = open_level["id"]
        lines.append(f"not declared yet: {level}, {open_level['title']}; by {_MEANS[level]}")
        lines += [f"{step.where}: {step.text}" for step in steps(backend, (level,))]
    return lines


def unavailable(backend: str) -> list[str]:
    """Lines for the terminal where the probe found no device."""
    found = steps(backend, (UNAVAILABLE,))
    lines = [f"let {_WRITE[UNAVAILABLE]} find a device; hal doctor {backend} says what it found"]
    return lines + ([f"{step.where}: {step.text}" for step in found] or _files(backend))


def _broken(backend: str, row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    obligation = BY_ID[row["id"]]
    first = f"{obligation.id}, {obligation.title}: {obligation.sentence}"
    if row["status"] == "ERROR" or OUTSIDE in row["message"]:
        # Nothing was seen that the backend does wrong.
        again = f"hal conform --backend {backend} --only {row['id']}"
        return [first, f"it was not judged to its end: {row['message']}", f"run it again: {again}"]
    if row["status"] in ("CRASH", "TIMEOUT") and row["id"] in _CALLING:
        return [first, f"mend, in the backend: {row['message']}; what it printed is in the report", *_files(backend)]
    found = steps(backend, (obligation.id, obligation.level))
    what = _what(obligation.id)
    there = any(other["status"] == "PASS" and _what(other["id"]) == what for other in rows)
    lines = [first, f"{'mend' if there and not found else 'write'}, in the backend: {what}"]
    return lines + ([f"{step.where}: {step.text}" for step in found] or _files(backend))


def _what(obligation: str) -> str:
    """What of a backend an obligation is about."""
    return next(_WRITE[key] for key in (obligation, BY_ID[obligation].level) if key in _WRITE)


def steps(backend: str, keys: Iterable[str]) -> list[Step]:
    """Comments for any of these obligations or levels, those for the first key alone if there are some."""
    found = [(path, *each) for path in _sources(backend) for each in _comments(path)]
    for key in keys:
        mine = [Step(f"{_short(path)}:{line}", text) for path, line, names, text in found if key in names]
        if mine:
            return mine
    return []


def _comments(path: Path) -> Iterable[tuple[int, list[str], str]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for number, line in enumerate(lines, 1):
        match = _STEP.search(line)
        if match is not None:
            yield number, [name.strip() for name in match[1].split(",")], match[2].strip()


def _files(backend: str) -> list[str]:
    """Where to look in a backend without such comments."""
    return [f"in {_short(folder)}" for folder in _folders(backend)]


def _sources(backend: str) -> list[Path]:
    return [path for folder in _folders(backend) for path in (sorted(folder.rglob("*.py")) if folder.is_dir() else [])]


def _folders(backend: str) -> list[Path]:
    """The package (or module) that the backend's entry point is in."""
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP, name=backend):
        # Of the outermost package alone, which is found without importing anything.
        spec = importlib.util.find_spec(entry.module.partition(".")[0])
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin)
            found.append(path.parent if path.name == "__init__.py" else path)
    return found


def _short(path: Path) -> str:
    """From here, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
