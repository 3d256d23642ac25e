"""Whether what a report says of its run is possible: when it was, what it left out, what it names, whom it waived."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from typing import Any, Final

import torch

from hal.spec.capability import Capabilities
from hal_conformance import again
from hal_conformance.context import Settings
from hal_conformance.facts import environment
from hal_conformance.session import SEEDS
from hal_conformance.table import BY_ID
from hal_conformance.waivers import LONGEST

_UTC: Final = datetime.timezone.utc
_DAY: Final = datetime.timedelta(days=1)
"""By which the day of a run may differ from that of its waivers, which is its machine's own."""


def settings_of(report: dict[str, Any]) -> Settings:
    """As the run had them."""
    run = report["run"]
    return Settings(
        report["backend"]["name"],
        run["seed"],
        run["mode"],
        run["tighten"],
        run["device"],
        run["patience"],
        run.get("ranks", 0),
    )


def moment(text: Any) -> datetime.datetime | None:
    """A time as reports have it, or None if it is none."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo == _UTC and found.isoformat("T", "seconds") == text else None


def run_errors(report: dict[str, Any], capabilities: Capabilities | None) -> Iterator[str]:
    """What is wrong with it, each in a sentence."""
    yield from _times(report)
    yield from _choices(report)
    yield from _names(report, capabilities)
    yield from _waivers(report)
    yield from _notes(report)


def _times(report: dict[str, Any]) -> Iterator[str]:
    run = report["run"]
    started, ended = moment(run["started"]), moment(run.get("ended"))
    total = sum(row["seconds"] for row in report["obligations"])
    if not math.isclose(run["seconds"], total, abs_tol=0.1):
        yield f"the run took {run['seconds']:g} s, and its obligations {total:.1f} s"
    for name, text, found in (("started", run["started"], started), ("ended", run.get("ended"), ended)):
        if found is None:
            yield f"the run {name} at {text!r}, which is no time in UTC like 2026-01-31T12:00:00+00:00"
    if started is None or ended is None:
        return
    if ended < started:
        yield f"the run ended at {run['ended']}, before it started at {run['started']}"
    elif (ended - started).total_seconds() + 2 < run["seconds"]:
        yield f"the run lasted from {run['started']} to {run['ended']}, which is less than its {run['seconds']:g} s"


def _choices(report: dict[str, Any]) -> Iterator[str]:
    """What was chosen by whoever ran it."""
    run, settings = report["run"], settings_of(report)
    if run.get("fresh") and run["seed"] >= SEEDS:
        yield f"seed {run['seed']} was not drawn by this suite, whose seeds are below {SEEDS}"
    left_out = bool(run["only"]) or run["case"] is not None or bool(settings.ranks) or run["mode"] == "quick"
    skipped = [row["id"] for row in report["obligations"] if row["status"] == "SKIPPED"]
    if not run["filtered"] and (left_out or skipped):
        yield "the run says that nothing was left out, and was quick, filtered or interrupted"
    odd = [name for name in run["only"] if name not in BY_ID]
    if odd or run["only"] != sorted(set(run["only"])) or (run["case"] is not None and len(run["only"]) != 1):
        yield f"the run was of {', '.join(run['only'])} alone, which are not obligations of this suite, each once"
    elif run["command"] != again.of_run(settings, run["only"], run["case"]):
        yield f"this run is repeated by {again.of_run(settings, run['only'], run['case'])!r}, and it says otherwise"


def _names(report: dict[str, Any], capabilities: Capabilities | None) -> Iterator[str]:
    """Backend, device, distribution and environment."""
    run, backend = report["run"], report["backend"]
    passed = {row["id"] for row in report["obligations"] if row["status"] == "PASS"}
    if {"CAP-01", "CAP-02", "CAP-03"} <= passed and backend["state"] != "available":
        yield f"the backend is {backend['state']}, and CAP-01, CAP-02 and CAP-03 say that it is there"
    if "CAP-02" in passed and (not backend["reason"].strip() or "\n" in backend["reason"]):
        yield "the backend says of its device no line of text, and CAP-02 says that it does"
    if capabilities is not None and run["device"] and _type(run["device"]) not in capabilities.device_types:
        yield f"the run was on {run['device']!r}, and declared is {', '.join(capabilities.device_types)}"
    made = backend["distribution"]
    needed = [one["name"] for one in made.get("requires", [])]
    if (made["name"] is None) != (made["version"] is None) or (made["hash"] and not made["name"]):
        yield "the backend's files have a hash, and no distribution with a name and a version"
    if needed != sorted(set(needed)) or made["name"] in needed:
        yield "the distributions that the backend requires are not named each once"
    named = report["environment"]
    if set(named) != set(environment()) or named["suite"] != report["suite"]["version"]:
        yield f"the environment is not {', '.join(environment())}, with the version of this suite"


def _type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError:
        return ""


def _waivers(report: dict[str, Any]) -> Iterator[str]:
    given = [waiver["obligation"] for waiver in report["waivers"]]
    started = moment(report["run"]["started"])
    if given != [name for name in BY_ID if name in given]:
        yield "the waivers are not for obligations of this suite, each once and in their order"
    for waiver in report["waivers"]:
        name, until = f"the waiver of {waiver['obligation']}", waiver["expires"]
        try:
            last = datetime.date.fromisoformat(until)
        except ValueError:
            yield f"{name} lasts until {until}, which is no day"
            continue
        if not waiver["reason"].strip():
            yield f"{name} gives no reason"
        if started is None:
            continue
        if last < (started - _DAY).date():
            yield f"{name} expired on {until}, before the run of {started.date()}"
        if last > (started + _DAY).date() + LONGEST:
            yield f"{name} lasts until {until}: a year is the longest"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """Notes of the run are those of its obligations, and of waivers that were not judged."""
    of_rows = [f"{row['id']}: {text}" for row in report["obligations"] for text in row.get("notes", [])]
    notes = report.get("notes", [])
    others = notes[: len(notes) - len(of_rows)]
    if notes[len(others) :] != of_rows or not all("waiver" in text for text in others):
        yield "the notes are not those of the obligations and waivers"
