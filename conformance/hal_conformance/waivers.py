"""A vendor's known failures: said, dated, shown in the headline, and never a pass.

::

    [[waiver]]
    obligation = "MLA-32"
    reason = "negative scales go through the slow path, due in 2.1"
    expires = 2027-03-01
"""

from __future__ import annotations

import datetime
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.spec.errors import SpecError
from hal_conformance.table import BY_ID

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

LONGEST = datetime.timedelta(days=366)
"""A waiver is looked at again at least once a year."""

_FIELDS = {"obligation", "reason", "expires"}


@dataclass(frozen=True, slots=True)
class Waiver:
    """One line of a waiver file.

    Attributes
    ----------
    obligation, reason : str
    expires : datetime.date
        The last day it counts.
    """

    obligation: str
    reason: str
    expires: datetime.date

    def expired(self, today: datetime.date | None = None) -> bool:
        """Whether its last day is over."""
        return (today or datetime.date.today()) > self.expires

    def to_dict(self) -> dict[str, str]:
        """For the report."""
        return {"obligation": self.obligation, "reason": self.reason, "expires": self.expires.isoformat()}


def read(path: Path) -> dict[str, Waiver]:
    """The waivers of a file, by obligation.

    Raises
    ------
    SpecError
        The file cannot be read, or a waiver is incomplete, unknown or there twice.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError("--waivers", f"{path}: {error}", "a TOML file of [[waiver]] tables") from error
    # A file whose last waiver was removed stays where the command names it.
    rows = data.get("waiver", [])
    if set(data) - {"waiver"} or not isinstance(rows, list):
        raise SpecError("--waivers", f"{path} with {sorted(data)}", "[[waiver]] tables and nothing else")
    found: dict[str, Waiver] = {}
    for number, row in enumerate(rows, 1):
        waiver = _waiver(f"{path}, waiver {number}", row)
        if waiver.obligation in found:
            raise SpecError("--waivers", f"{waiver.obligation} twice", "one waiver for an obligation")
        found[waiver.obligation] = waiver
    return found


def _waiver(where: str, row: object) -> Waiver:
    if not isinstance(row, dict) or set(row) != _FIELDS:
        got = sorted(row) if isinstance(row, dict) else row
        raise SpecError("--waivers", f"{where}: {got}", f"exactly {', '.join(sorted(_FIELDS))}")
    obligation, reason, expires = row["obligation"], row["reason"], row["expires"]
    if not isinstance(obligation, str) or obligation not in BY_ID:
        raise SpecError("--waivers", f"{where}: obligation {obligation!r}", "an id of docs/spec.md")
    if not isinstance(reason, str) or not reason.strip():
        raise SpecError("--waivers", f"{where}: no reason", "a reason in words")
    if type(expires) is not datetime.date:
        raise SpecError("--waivers", f"{where}: expires {expires!r}", "a date like 2027-03-01")
    if expires > datetime.date.today() + LONGEST:
        raise SpecError("--waivers", f"{where}: expires {expires}", f"a day within the next {LONGEST.days}")
    return Waiver(obligation, reason.strip(), expires)
