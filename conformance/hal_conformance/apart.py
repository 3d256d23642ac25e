"""What becomes of a case: its calls are made beside the backend, and judged in a process that never saw it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hal_conformance.process import WorkerDied, WorkerHangs
from hal_conformance.table import Obligation
from hal_conformance.witness import is_judged_apart, is_judged_twice

if TYPE_CHECKING:
    from hal_conformance.session import Session

_STARTING: Final = 60.0
"""Seconds the witness has to import what it needs."""


def ask(session: Session, obligation: Obligation, request: dict[str, Any]) -> dict[str, Any]:
    """Play a case and have it judged; ``witnessed`` in the answer says that this was done apart from the backend.

    Raises
    ------
    WorkerDied, WorkerHangs
        The backend took its process with it, or did not answer.
    """
    limit = obligation.timeout * session.settings.patience
    # Where all is judged apart, the numbers are not even looked at beside the backend.
    blind = request["op"] == "case" and is_judged_apart(obligation.id)
    answer = session.worker.ask(request | {"blind": blind}, limit)
    if "error" in answer or request["op"] != "case" or not is_judged_twice(obligation.id):
        return answer
    if not answer["problems"]:
        judged = _apart(session, obligation, request["index"])
        if "error" in judged:
            return judged
        if not judged["problems"]:
            if judged["calls"] != answer["calls"]:
                # What is told of a case beside the backend is believed no more than what is judged there.
                told = f"tells of {answer['calls']} calls, and judged apart from it {judged['calls']} were made"
                return {"error": f"of case {request['index']} the process in which the backend is called {told}"}
            if not answer["calls"]:
                return {"error": f"nothing was executed in case {request['index']}"}
            seen = {key: judged[key] for key in ("errors", "tried", "sizes")} if blind else {}
            return answer | seen | {"witnessed": True}
        said = "passed beside the backend, but judged apart from it"
        answer |= {"problems": [f"{said}: {text}" for text in judged["problems"]], "witnessed": True}
    return _explained(session, request, limit, answer) if blind else answer


def _apart(session: Session, obligation: Obligation, index: int) -> dict[str, Any]:
    """Judge what the backend gave in the case it just answered."""
    limit = obligation.timeout * session.settings.patience
    with tempfile.TemporaryDirectory() as folder:
        tape = {"tape": str(Path(folder) / "tape")}
        try:
            answer = session.worker.ask(session.request("tape", obligation, index) | tape, limit)
            if "error" in answer:
                return answer
            assert session.capabilities is not None
            request = session.request("witness", obligation, index) | tape
            request["capabilities"] = session.capabilities.to_dict()
            return session.witness.ask(request, limit + _STARTING)
        except (WorkerDied, WorkerHangs) as error:
            # The last line is the one that is told.
            return {"error": f"{error.output}\nthe case could not be judged: {error}"}


def _explained(session: Session, request: dict[str, Any], limit: float, answer: dict[str, Any]) -> dict[str, Any]:
    """Make the calls of a case that failed once more, now beside the reference, to say what is wrong and why."""
    again = session.worker.ask(request, limit)
    if session.waivers:
        # A copy of the reference may lie there now, and what is waived ends no run: a new process goes on.
        session.worker.stop()
    if not again.get("problems"):
        return answer
    return again | {"witnessed": answer.get("witnessed", False)}
