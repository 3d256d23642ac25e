"""The process in which a backend is touched; its arguments are the descriptors of its pipes, and its role.

It answers one JSON line with one JSON line. It may crash or hang: the other end of the pipe is `process.Worker`, which
records that and starts another. Nothing here decides what is tested.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hal import plugins
from hal.spec.capability import Capabilities
from hal_conformance import manners
from hal_conformance.checks import Check, load, planned
from hal_conformance.checks.capability import as_it_was
from hal_conformance.context import BackendRaised, Context, Settings, Stop
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import BY_ID, Mode
from hal_conformance.witness import Tape, close_the_reference, recording, within_reach, witness

_MODES: Final[tuple[Mode, ...]] = ("quick", "default", "full")

_PR_SET_PDEATHSIG: Final = 1

_LAST = Tape()
"""Of the last case."""

NOTHING = Capabilities(("cpu",), None, None, None)
"""Stands for a backend that could not be asked."""


def main() -> None:
    """Serve until the pipe closes."""
    _end_with_who_asks()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    read, write = (int(text) for text in sys.argv[1:3])
    if sys.argv[3:] == ["backend"]:
        close_the_reference()
    as_it_was.update(manners.shared())
    with os.fdopen(read) as requests, os.fdopen(write, "w") as answers:
        for line in requests:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()


def _end_with_who_asks() -> None:
    """Whoever started this process may be killed while a call hangs here, and nobody else would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks; a failure of the suite itself comes back as ``error``."""
    try:
        settings = Settings(**request["settings"])
        operation = request["op"]
        if operation == "witness":
            return witness(request)
        if operation == "tape":
            _LAST.save(Path(request["tape"]))
            return {"calls": len(_LAST.entries)}
        if operation == "facts":
            from hal_conformance.facts import facts

            return facts(settings.backend)
        if operation == "roofline":
            from hal_conformance.roofline import measure

            return measure(_context(settings, "MLA-01", 0))
        if operation == "bisect":
            from hal_conformance.bisect import bisect

            context = _context(settings, request["obligation"], 0)
            requirement = REQUIREMENTS[context.obligation.requires]
            if not requirement.declared(context.capabilities):
                return {"refused": f"{requirement.title} is not declared"}
            contexts = (_context(replace(settings, mode=mode), request["obligation"], 0) for mode in _MODES)
            count = max(map(planned, contexts))
            if request["index"] >= count:
                return {"legal": f"0…{count - 1}"}
            with within_reach():
                return bisect(_context(settings, request["obligation"], request["index"]))
        context = _context(settings, request["obligation"], request.get("index", 0))
        if operation == "count":
            return {"count": planned(context)}
        if operation == "refusal":
            return _refusal(context)
        assert operation == "case", operation
        context.wants_diagnosis = request.get("diagnose", True)
        context.blind = request.get("blind", False)
        if context.blind:
            return _case(context)
        with within_reach():
            return _case(context)
    except Exception:
        return {"error": traceback.format_exc()}


def _context(settings: Settings, obligation: str, index: int) -> Context:
    status = plugins.registry().status(settings.backend)
    return Context(settings, status.capabilities or NOTHING, BY_ID[obligation], index)


def _check(context: Context) -> Check:
    return load()[context.obligation.id]


def _refusal(context: Context) -> dict[str, Any]:
    requirement = REQUIREMENTS[context.obligation.requires]
    assert requirement.refusal is not None
    instead = requirement.refusal(context)
    problems = [f"{requirement.title}: not declared, but the call {instead}"] if instead else []
    return {"problems": problems, "calls": 1}


def _case(context: Context) -> dict[str, Any]:
    global _LAST
    record = context.record
    _LAST = Tape()
    try:
        with recording(context, _LAST):
            _check(context).run(context)
        context.look_back()
    except Stop:
        pass
    except BackendRaised as raised:
        record.case = raised.case.to_dict()
        record.problems.append(str(raised))
    return record.to_dict()
