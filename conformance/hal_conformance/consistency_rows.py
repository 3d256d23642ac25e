"""What an obligation's row of a report may hold, by what became of the obligation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from hal.spec.limits import DENSE_LSE, DENSE_OUT
from hal_conformance import again
from hal_conformance.context import Settings
from hal_conformance.limits import RATIO_EDGES, ULP_EDGES
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.session import NOT_DECLARED, STOP_AFTER
from hal_conformance.table import BY_ID
from hal_conformance.witness import is_judged_apart, is_judged_twice

_LOST: Final = ("CRASH", "TIMEOUT", "ERROR")
"""Failures of which there is no case to tell of."""

_LAUNCHED: Final = re.compile(r"[^@]*:[^@]*@.*", re.S)

_WORKING: Final = ("MLA", "EPN", "EPL")
_IDLE: Final = ("MLA-38", "MLA-51")
"""Obligations whose calls have nothing to do, or are not watched one by one, as those of others are."""

_LIMITS: Final = {"out": DENSE_OUT, "lse": DENSE_LSE}

_AT_ONCE: Final = 64
"""Ranks and threads whose time inside the backend is added up."""

_ROUNDING: Final = 1e-5
"""Of numbers that a report has 6 digits of."""


def row_errors(
    row: dict[str, Any], settings: Settings, waiver: dict[str, str] | None, case: int | None = None
) -> Iterator[str]:
    """What is wrong with it, each in a sentence that names the obligation; ``case`` if only that one was to run."""
    chosen = range(row["planned"]) if case is None else range(case, case + 1)
    obligation, status = BY_ID[row["id"]], row["status"]
    if (row["level"], row["title"]) != (obligation.level, obligation.title):
        yield f"{row['id']} is {obligation.title!r} of {obligation.level}, and the report names it otherwise"
    for text in _status(row, chosen, settings, waiver):
        yield f"{row['id']} says {status}, but {text}"
    for text in (*_sums(row, chosen), *_witnessed(row), *_durations(row, settings), *_measured(row, settings.tighten)):
        yield f"{row['id']} {text}"


def _status(row: dict[str, Any], chosen: range, settings: Settings, waiver: dict[str, str] | None) -> Iterator[str]:
    status, indices = row["status"], [case["index"] for case in row["cases"]]
    ran = f"{row['executed']} of {row['planned']} cases ran, of {row['calls']} calls"
    if waiver is not None and status != "WAIVED":
        yield "it has a waiver, and none was used"
    if status in ("PASS", "REFUSED"):
        if row["failures"] or not row["calls"] or row["executed"] != row["planned"]:
            yield f"{ran}, and {len(row['failures'])} failed"
        if len(indices) != row["planned"] or not all(index in chosen for index in indices):
            yield f"it tells of the cases {indices[:8]}, not of {row['planned']}, each once"
        if row["message"] != (NOT_DECLARED if status == "REFUSED" else ""):
            yield f"its message is {row['message'][:80]!r}"
    if status == "REFUSED" and ((row["planned"], row["calls"]) != (1, 1) or row["launches"]):
        yield f"{ran}: what is not declared is called once, and launches nothing"
    if status in ("UNCOVERED", "BLOCKED", "SKIPPED") and (row["executed"] or row["calls"] or row["cases"]):
        yield f"{ran}, and then nothing runs"
    if status == "UNCOVERED" and not row["message"].startswith(REQUIREMENTS[BY_ID[row["id"]].requires].title):
        yield f"its message is {row['message'][:80]!r}"
    if status == "WAIVED" or status in ("FAIL", *_LOST):
        yield from _failed(row, chosen, settings, waiver)


def _failed(row: dict[str, Any], chosen: range, settings: Settings, waiver: dict[str, str] | None) -> Iterator[str]:
    """Of what failed, with a waiver or without: which cases, and how each is run again."""
    failures = row["failures"]
    if not failures and row["status"] != "ERROR":
        yield "none of its cases failed"
    if not failures:
        return
    first = failures[0]
    said = f"{first['problems'][0]}"
    if row["status"] == "WAIVED":
        if waiver is None:
            yield "there is no waiver for it"
            return
        if first["status"] not in ("FAIL", "CRASH", "TIMEOUT"):
            yield f"it ended with {first['status']}, for which there is no waiver"
        said = f"{first['status']}: {said}; waived until {waiver['expires']}: {waiver['reason']}"
    elif row["status"] != first["status"]:
        yield f"its first failure is {first['status']}"
    if row["message"] != said:
        yield "its message is not that of its first failure" + (" and its waiver" if waiver else "")
    at = [failure["index"] for failure in failures]
    if (
        at != sorted(set(at))
        or not all(index in chosen or not index for index in at)
        or row["executed"] > max(row["planned"], 1)
    ):
        yield f"it names the cases {at[:8]} as failed, of {row['planned']}"
    if len(failures) < STOP_AFTER and row["executed"] < row["planned"]:
        yield f"only {row['executed']} of {row['planned']} cases ran, and {len(failures)} failed"
    if len(row["cases"]) + sum(failure["status"] in _LOST for failure in failures) != row["executed"]:
        yield f"{row['executed']} cases ran, and it tells of {len(row['cases'])} that ended"
    for failure in failures:
        line = again.of_case(settings, row["id"], failure["index"])
        if failure["reproduce"] != line:
            yield f"case {failure['index']} of this run is repeated by {line!r}, and the report says otherwise"


def _sums(row: dict[str, Any], chosen: range) -> Iterator[str]:
    """Whether its cases make up its totals."""
    cases = row["cases"]
    indices = [case["index"] for case in cases]
    if indices != sorted(set(indices)) or not all(index in chosen for index in indices):
        yield f"tells of the cases {indices[:8]}, of {row['planned']}"
    if sum(case["calls"] for case in cases) != row["calls"]:
        yield f"says {row['calls']} calls, and its cases made others"
    launches: Counter[str] = Counter()
    for case in cases:
        launches.update(case["launches"])
        passed = row["status"] == "PASS" and is_judged_twice(row["id"])
        if not case["calls"] and (passed or any(case["launches"].values())):
            yield f"launched kernels in case {case['index']}, or passed it, and made no call there"
    working = row["id"].startswith(_WORKING) and row["id"] not in _IDLE and row["status"] == "PASS"
    if working and not any(row["launches"].values()):
        yield "launched nothing, so something else computed its results"
    if {k: n for k, n in launches.items() if n} != {k: n for k, n in row["launches"].items() if n}:
        yield "tells of other launches than its cases"
    odd = [name for name in row["launches"] if not _LAUNCHED.fullmatch(name)]
    if odd:
        yield f"launched {odd[0]!r}, which does not read driver:kernel@device"


def _witnessed(row: dict[str, Any]) -> Iterator[str]:
    """Whether the cases that were judged apart are those that are."""
    judged = row.get("witnessed", [])
    ended = {case["index"] for case in row["cases"]}
    if judged != sorted(set(judged)) or not ended.issuperset(judged):
        yield f"was judged apart in the cases {judged[:8]}, and those that ended are others"
    twice = is_judged_twice(row["id"]) and row["status"] != "REFUSED"
    if judged and not twice:
        yield "was judged apart, and nothing of it is"
    missing = sorted(ended - {failure["index"] for failure in row["failures"]} - set(judged))
    if missing and twice:
        yield f"was not judged apart from the backend in {len(missing)} cases, of which {missing[0]} is the first"


def _durations(row: dict[str, Any], settings: Settings) -> Iterator[str]:
    """Whether its cases can have taken as long as they say."""
    limit = BY_ID[row["id"]].timeout * settings.patience
    spent = sum(case["seconds"] for case in row["cases"])
    slow = [case["index"] for case in row["cases"] if case["seconds"] > limit * _AT_ONCE]
    if slow:
        yield f"spent longer in case {slow[0]} than the {limit:g} s that a case has"
    elif spent > (row["seconds"] + 0.001) * _AT_ONCE:
        yield f"took {row['seconds']:g} s, and its cases {spent:g} s of them"


def _measured(row: dict[str, Any], tighten: float) -> Iterator[str]:
    """Whether the errors it measured can be those of the same calls, and of some that passed."""
    errors = row["errors"]
    if errors and (not is_judged_apart(row["id"]) or set(errors) != {"out", "lse"}):
        yield f"measured errors of {', '.join(sorted(errors))}: of a decode they are of out and lse, of the rest none"
        return
    if len({error["rows"] for error in errors.values()}) > 1:
        yield "compared more rows of out or of lse than of the other"
    for name, error in errors.items():
        counts = error["ratio"], error["ulp"]
        if tuple(map(len, counts)) != (len(RATIO_EDGES) + 1, len(ULP_EDGES) + 1) or sum(counts[0]) != sum(counts[1]):
            yield f"has histograms of {name} that are not of the same elements"
            continue
        numbers = [error[key] for key in ("worst", "max_abs", "max_cosine")]
        finite = all(isinstance(number, (int, float)) for number in numbers)
        if row["status"] == "PASS" and not (finite and error["worst"] <= 1 and not counts[0][-1]):
            yield f"measured an error of {name} over its limit, and passed"
        if name == "lse" and sum(counts[0]) > error["rows"]:
            yield f"compared {sum(counts[0])} values of lse in {error['rows']} rows"
        highest = max((at for at, count in enumerate(counts[0]) if count), default=0)
        least = RATIO_EDGES[highest - 1] if highest else 0.0
        if not finite:
            continue
        worst = error["worst"] * (1 + _ROUNDING)
        if worst < least:
            yield f"says the worst error of {name} is {error['worst']:g} of its limit, and counts some above {least:g}"
        if error["max_cosine"] > worst * _LIMITS[name].tightened(tighten).row_cosine:
            yield f"says the worst error of {name} is {error['worst']:g} of its limit, and its direction is off by more"
