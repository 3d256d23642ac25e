"""JSON documents of runs: written, read again, and compared case by case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document for people and programs."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Change:
    """One case in two runs.

    Attributes
    ----------
    name : str
    before, after : float
        Median times, in the unit of the documents.
    faster : float
        Earlier time over this one.
    fraction : float
        This fraction of the limit over the earlier one. The limits are measured in each run, so this is the ratio to
        believe where the machine, or what else it was doing, differs.
    """

    name: str
    before: float
    after: float
    faster: float
    fraction: float


class DocumentError(ValueError):
    """A file that is not the document of an earlier run."""


def load(path: Path) -> dict[str, Any]:
    """Read what ``--json`` wrote.

    Raises
    ------
    DocumentError
        It cannot be read, or is something else; says what is wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DocumentError(f"{path} is not JSON: {error}") from None
    cases = found.get("cases") if isinstance(found, dict) else None
    if not isinstance(cases, list) or not all(isinstance(case, dict) and "name" in case for case in cases):
        raise DocumentError(f"{path} is not the JSON document of a bench run: it has no list of named cases")
    return dict(found)


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], time: str = "ms_p50", fraction: str = "fraction_of_limit"
) -> tuple[list[Change], list[str]]:
    """Cases both documents have numbers for, and the names of all others; ``time`` and ``fraction`` are their keys."""
    earlier = {case["name"]: case for case in before["cases"]}
    later = {case["name"]: case for case in after["cases"]}
    made = []
    for name, new in later.items():
        old = earlier.get(name, {})
        if all(_is_number(case.get(key)) for case in (old, new) for key in (time, fraction)):
            made.append(Change(name, old[time], new[time], old[time] / new[time], new[fraction] / old[fraction]))
    compared = {change.name for change in made}
    return made, [name for name in dict.fromkeys([*earlier, *later]) if name not in compared]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
