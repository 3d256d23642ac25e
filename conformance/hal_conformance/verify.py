"""Checking a report and its certificate again later, without the backend's machine."""

from __future__ import annotations

import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

import hal
from hal import plugins
from hal.spec.errors import SpecError
from hal_conformance import SUITE_VERSION
from hal_conformance.certificate import issue, obstacles
from hal_conformance.consistency import consistency
from hal_conformance.consistency_run import moment
from hal_conformance.facts import distribution, suite_hash
from hal_conformance.headline import headline
from hal_conformance.report import read
from hal_conformance.schema import schema_errors

_CLOCKS: Final = datetime.timedelta(hours=1)
"""By which the clocks of two machines may differ."""


def verify(report: Any, today: datetime.date | None = None) -> tuple[list[str], list[str]]:
    """Check a report again, offline.

    Returns
    -------
    errors, notes : list of str
        Any error means that the certificate does not hold. Notes say what could not be checked here.
    """
    broken = schema_errors(report)
    if broken:
        return [f"not a report of this schema: {text}" for text in broken[:3]], []
    errors = consistency(report)
    certificate = report["certificate"]
    if certificate is None:
        return [*errors, f"there is no certificate: {'; '.join(obstacles(report)) or 'it was removed'}"], []
    if issue(report) != certificate:
        # Nothing in it can be taken at its word, not even that it is there.
        return [*errors, "the certificate is not the one this report gives: one of them was changed"], []
    if report["headline"] != headline(report, []):
        errors.append(f"the headline does not follow from the rest, which is: {headline(report, [])}")
    errors += _suite(report)
    errors += _by_now(report, today)
    notes = []
    if not list(entry_points(group=plugins.GROUP, name=certificate["backend"])):
        notes.append(f"backend {certificate['backend']!r} is not installed here: its files were not compared")
    else:
        here, was = distribution(certificate["backend"]), report["backend"]["distribution"]
        if any(here[key] != was[key] for key in ("name", "version", "hash")):
            errors.append(
                f"the installed files of {certificate['backend']!r} ({here['name']} {here['version']}) "
                f"are not the certified ones ({was['name']} {was['version']})"
            )
        errors += _changed(certificate["requires"], here["requires"])
        errors += [f"it reaches beyond its package here: {text}" for text in here["reaches"]]
    return errors, notes


def read_to_compare(path: Path) -> dict[str, Any]:
    """A report beside which others are to be shown: one of this suite's that does not follow from itself shows nothing.

    Raises
    ------
    SpecError
        It cannot be read, or was changed. Of another suite's only the certificate can be held against the rest.
    """
    report = read(path)
    wrong = consistency(report) if report["suite"]["hash"] == suite_hash() else []
    if report["certificate"] is not None and issue(report) != report["certificate"]:
        wrong = ["the certificate is not the one this report gives", *wrong]
    if wrong:
        raise SpecError("report", f"{path}, which was changed: {wrong[0]}", "a report as hal conform wrote it")
    return report


def _suite(report: dict[str, Any]) -> list[str]:
    """Whether it was judged by the suite that is installed here, and says so."""
    judged, installed = report["suite"], suite_hash()
    if judged["hash"] != installed:
        # Two states of a checkout have one version: their hashes tell them apart.
        return [
            f"judged by the suite {judged['version']} of hash {judged['hash'][:12]}, and the one "
            f"installed here is {SUITE_VERSION} of hash {installed[:12]}: verify with the one that judged"
        ]
    here = {"suite": SUITE_VERSION, "hal": hal.__version__, "specification": hal.SPEC_VERSION}
    said = {name: report["environment"].get(name) for name in here}
    return [
        f"the suite of this hash is of {name} {version}, and the report says {said[name]}"
        for name, version in here.items()
        if said[name] != version
    ]


def _by_now(report: dict[str, Any], today: datetime.date | None) -> list[str]:
    """Whether the run is over, and its waivers are not."""
    now = datetime.datetime.now(datetime.timezone.utc)
    ended = moment(report["run"].get("ended"))
    errors = []
    if ended is not None and ended > now + _CLOCKS:
        errors.append(f"the run ended at {report['run']['ended']}, and it is {now.isoformat('T', 'seconds')}")
    day = today or datetime.date.today()
    for waiver in report["waivers"]:
        if waiver["expires"] < day.isoformat():
            errors.append(f"the waiver of {waiver['obligation']} expired on {waiver['expires']}")
    return errors


def _changed(certified: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    """Dependencies of a backend that are other ones here."""
    was, now = ({one["name"]: (one["version"], one["hash"]) for one in every} for every in (certified, here))
    return [
        f"its dependency {name} is not the certified one"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
