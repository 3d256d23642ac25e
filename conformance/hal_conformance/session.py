"""Runs obligations against one backend, level by level, and keeps what became of them."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from hal.spec.capability import Capabilities
from hal.spec.errors import SpecError
from hal_conformance import again
from hal_conformance.apart import ask
from hal_conformance.checks.capability import illegal
from hal_conformance.context import Settings
from hal_conformance.cover import Labels
from hal_conformance.covers import covers
from hal_conformance.process import Secluded, Worker, WorkerDied, WorkerHangs
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.sizes import Sizes
from hal_conformance.table import BY_ID, LEVELS, OBLIGATIONS, Obligation
from hal_conformance.totals import Totals
from hal_conformance.waivers import Waiver

Status = Literal["PASS", "FAIL", "CRASH", "TIMEOUT", "ERROR", "REFUSED", "UNCOVERED", "BLOCKED", "WAIVED", "SKIPPED"]
"""``REFUSED``: not declared, and the call was seen to raise `UnsupportedError`. ``UNCOVERED``: declared, but this suite
has no check for it. ``ERROR``: the suite itself failed. ``SKIPPED``: filtered out. ``WAIVED``: failed, and a waiver
says why; never a pass."""

RED: Final = ("FAIL", "CRASH", "TIMEOUT", "ERROR")

NOT_DECLARED: Final = "not declared; the call raises UnsupportedError"
"""What is said of an obligation that is refused."""

SEEDS: Final = 2**31
"""How many seeds there are to draw from."""

STOP_AFTER: Final = 3
"""Failing cases of an obligation after which the rest of its cases are not run."""


@dataclass(slots=True)
class Result:
    """What became of one obligation.

    Attributes
    ----------
    id : str
    status : Status
    message : str
        One line for people; empty for a pass.
    planned, executed, calls : int
        Cases, cases run, calls of the backend.
    failures : list of dict
        Each with ``index``, ``status``, ``problems``, ``reproduce``, and what is known of the case.
    errors : dict
        Worst values and summed histograms over all compared calls.
    launches : dict of str to int
    cases : list of dict
        For every case its ``index``, how many ``calls`` it made, what they launched, and seconds inside the backend.
    notes : list of str
        What could not be tried on this machine, and why.
    witnessed : list of int
        Cases that were judged again in a process without the backend.
    seconds : float
        Wall time.
    """

    id: str
    status: Status
    message: str = ""
    planned: int = 0
    executed: int = 0
    calls: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, Any] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    witnessed: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def obligation(self) -> Obligation:
        """Its row of the table."""
        return BY_ID[self.id]


def _require_case(obligation: Obligation, index: int, count: int, settings: Settings) -> None:
    """Refuse a case that a run of this kind does not have."""
    if not 0 <= index < count:
        name = f"{obligation.id}@{settings.seed}"
        legal = f"{name}.0" if count == 1 else f"{name}.0 to {name}.{count - 1}"
        raise SpecError("--case", f"{name}.{index}", f"{legal}, which a {settings.mode} run of this seed has")


def fresh_seed() -> int:
    """A seed nobody chose."""
    return random.SystemRandom().randrange(SEEDS)


class Session:
    """One run against one backend.

    Parameters
    ----------
    settings : Settings
    only : iterable of str
        Obligation ids to run; empty for all.
    case : int or None
        With exactly one obligation, the one case to run.
    waivers : mapping of str to Waiver
        By obligation.
    fresh : bool
        Whether the seed was drawn for this run. One that was known before shows nothing to others: results may have
        been prepared for it.
    witness : Worker, optional
        Judges cases apart from the backend; given, it outlives this session, and may serve the next one too.
    host : str
        What this process is: the command, or pytest, which executes whatever plugins and files it finds.
    """

    def __init__(
        self,
        settings: Settings,
        only: Iterable[str] = (),
        case: int | None = None,
        waivers: Mapping[str, Waiver] | None = None,
        fresh: bool = False,
        witness: Worker | None = None,
        host: str = "hal conform",
    ) -> None:
        self.settings = settings
        self.waivers = dict(waivers or {})
        self.only = frozenset(only)
        self.interrupted = False
        self.case = case
        self.fresh = fresh
        self.host = host
        self.worker = Worker()
        self.witness = witness or Secluded()
        self._owned = [self.worker] if witness else [self.worker, self.witness]
        self.stop_after = STOP_AFTER
        self.results: dict[str, Result] = {}
        self.started = time.time()
        self._clock = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.capabilities: Capabilities | None = None
        self.tried: dict[str, set[Labels]] = {}
        self.sizes = Sizes()

    @property
    def now(self) -> float:
        """The time, on a clock that was not set since the run started."""
        return self.started + time.monotonic() - self._clock

    @property
    def filtered(self) -> bool:
        """Whether this run can never certify, because it leaves something out."""
        chosen = bool(self.only) or self.case is not None or bool(self.settings.ranks)
        return chosen or self.settings.mode == "quick" or self.interrupted

    def chosen(self) -> list[Obligation]:
        """What will run, in order."""
        return [o for o in OBLIGATIONS if not self.only or o.id in self.only]

    def learn(self) -> None:
        """Ask the worker what it sees of the backend: capabilities, versions, hashes.

        Raises
        ------
        SpecError
            Groups are to be of a size that it does not declare.
        """
        try:
            self.facts = self.worker.ask(self.request("facts"), 60.0 * self.settings.patience)
        except (WorkerDied, WorkerHangs) as error:
            self.facts = {"error": f"asking the backend what it is: {error}\n{error.output}"}
        self.settings.evidence = self.facts.get("evidence") or ""
        declared = self.facts.get("capabilities")
        self.capabilities = Capabilities.from_dict(declared) if declared else None
        ranks, has = self.settings.ranks, self.capabilities and self.capabilities.ep
        if ranks and self.capabilities and (not has or ranks not in has.ranks):
            raise SpecError("--ranks", ranks, f"{has.ranks}, as declared" if has else "0: no groups are declared")

    def run(self, progress: Callable[[str, int, int], None] | None = None) -> list[Result]:
        """Run everything chosen. ``progress`` hears obligation, cases done, cases in all."""
        for obligation in OBLIGATIONS:
            self.run_one(obligation, progress)
        return list(self.results.values())

    def run_one(self, obligation: Obligation, progress: Callable[[str, int, int], None] | None = None) -> Result:
        """Run one obligation, once."""
        if obligation.id in self.results:
            return self.results[obligation.id]
        if not self.facts:
            self.learn()
        started = time.monotonic()
        result = self._result(obligation, progress or (lambda *_: None))
        result.seconds = round(time.monotonic() - started, 3)
        self._waive(result)
        self.results[obligation.id] = result
        return result

    def leave_the_rest(self) -> None:
        """Say of all that has not run that somebody interrupted this run."""
        self.interrupted = True
        for obligation in OBLIGATIONS:
            self.results.setdefault(obligation.id, Result(obligation.id, "SKIPPED", "interrupted"))

    def close(self) -> None:
        """End the processes."""
        for process in self._owned:
            process.stop()

    def _waive(self, result: Result) -> None:
        """Turn a failure with a waiver in force into a waived one; a failure of the suite itself has no waiver."""
        waiver = self.waivers.get(result.id)
        if waiver is not None and not waiver.expired() and result.status in ("FAIL", "CRASH", "TIMEOUT"):
            result.message = f"{result.status}: {result.message}; waived until {waiver.expires}: {waiver.reason}"
            result.status = "WAIVED"

    def coverage(self) -> dict[str, int]:
        """How many of the legal pairs of notable values met in a call that was compared, and of how many."""
        found = {"covered": 0, "pairs": 0}
        if self.capabilities is None or any(illegal(self.capabilities)):
            return found
        for name, cover in covers(self.capabilities, self.settings.ranks).items():
            legal = set(cover.legal_pairs())
            met = set().union(*(cover.pairs_of(row) for row in self.tried.get(name, ())))
            found["covered"] += len(met & legal)
            found["pairs"] += len(legal)
        return found

    def waiver_problems(self) -> list[str]:
        """Waivers that are expired, or that nothing needed."""
        problems = []
        for waiver in self.waivers.values():
            result = self.results.get(waiver.obligation)
            if waiver.expired():
                problems.append(f"the waiver of {waiver.obligation} expired on {waiver.expires}")
            elif result and result.status in ("PASS", "REFUSED", "UNCOVERED") and not self._unjudged(result):
                problems.append(f"the waiver of {waiver.obligation} is not used: it is {result.status}; remove it")
        return problems

    def _unjudged(self, result: Result | None) -> str:
        """Why a result does not say whether a waiver of it is needed; empty if it does."""
        if result is None or result.status in ("SKIPPED", "BLOCKED"):
            return f"it was not run ({result.message if result else 'filtered out'})"
        return "only one of its cases was run" if self.case is not None and result.status == "PASS" else ""

    def notes(self) -> list[str]:
        """What this run could not tell: waivers of what was not tested, and what this machine does not allow."""
        found = []
        for waiver in self.waivers.values():
            why = self._unjudged(self.results.get(waiver.obligation))
            if why and not waiver.expired():
                found.append(f"whether the waiver of {waiver.obligation} is needed was not judged: {why}")
        return found + [f"{result.id}: {text}" for result in self.results.values() for text in result.notes]

    def command(self) -> str:
        """The shell line that makes this run again."""
        return again.of_run(self.settings, self.only, self.case)

    def _result(self, obligation: Obligation, progress: Callable[[str, int, int], None]) -> Result:
        if self.only and obligation.id not in self.only:
            return Result(obligation.id, "SKIPPED", "filtered out")
        blocked = self._blocked(obligation)
        if blocked:
            return Result(obligation.id, "BLOCKED", blocked)
        requirement = REQUIREMENTS[obligation.requires]
        capabilities = self.capabilities
        if capabilities is None and not (obligation.gate and obligation.requires == "nothing"):
            why = self.facts.get("error") or self.facts.get("reason") or "what it answers are no capabilities"
            # Said once: without CAP-01, which names it, nothing has failed yet.
            status: Status = "BLOCKED" if any(r.status in RED for r in self.results.values()) else "ERROR"
            text = f"the backend could not be asked what it declares: {why.strip().splitlines()[-1]}"
            return Result(obligation.id, status, text)
        if capabilities is not None and not requirement.declared(capabilities):
            _require_case(obligation, self.case or 0, 1, self.settings)
            return self._cases(obligation, [0], "refusal", progress)
        if not obligation.covered:
            return Result(
                obligation.id, "UNCOVERED", f"{requirement.title}: declared, and not tested by this suite yet"
            )
        try:
            answer = self.worker.ask(self.request("count", obligation, 0), 60.0 * self.settings.patience)
        except (WorkerDied, WorkerHangs) as error:
            return self._lost(obligation, error)
        if "error" in answer:
            return Result(obligation.id, "ERROR", answer["error"])
        if self.case is None:
            return self._cases(obligation, list(range(answer["count"])), "case", progress)
        _require_case(obligation, self.case, answer["count"], self.settings)
        return self._cases(obligation, [self.case], "case", progress)

    def _blocked(self, obligation: Obligation) -> str:
        """Why an obligation cannot be tested after what failed before it; empty if it can."""
        for earlier in OBLIGATIONS:
            if earlier.id == obligation.id:
                break
            before = self.results.get(earlier.id)
            if before is None or before.status not in RED:
                continue
            if earlier.level == obligation.level and earlier.gate:
                return f"{earlier.id} failed, on which all of {earlier.level} stands"
        level = next(level for level in LEVELS if level.id == obligation.level)
        below = level.after
        while below:
            bad = [r.id for r in self.results.values() if r.obligation.level == below and r.status in RED]
            if bad:
                return f"level {below} failed ({', '.join(bad[:4])}{' …' if len(bad) > 4 else ''})"
            below = next(level for level in LEVELS if level.id == below).after
        return ""

    def _cases(
        self, obligation: Obligation, indices: list[int], operation: str, progress: Callable[[str, int, int], None]
    ) -> Result:
        result = Result(obligation.id, "PASS", planned=len(indices))
        totals = Totals()
        for done, index in enumerate(indices):
            progress(obligation.id, done, len(indices))
            failure = self._one(obligation, index, operation, result, totals)
            if failure is not None:
                failure["index"] = index
                failure["reproduce"] = self.reproduce(obligation, index)
                result.failures.append(failure)
            if len(result.failures) >= self.stop_after:
                break
        progress(obligation.id, len(indices), len(indices))
        result.errors = totals.to_dict()
        if result.failures:
            result.status = result.failures[0]["status"]
            result.message = result.failures[0]["problems"][0]
        elif operation == "refusal":
            result.status = "REFUSED"
            result.message = NOT_DECLARED
        elif result.calls == 0:
            # An obligation that called nothing has shown nothing.
            result.status, result.message = "ERROR", "nothing was executed"
        return result

    def _one(
        self, obligation: Obligation, index: int, operation: str, result: Result, totals: Totals
    ) -> dict[str, Any] | None:
        """Run one case; the failure, or None."""
        result.executed += 1
        request = self.request(operation, obligation, index)
        # Hypotheses are many runs of the reference: one diagnosis an obligation.
        request["diagnose"] = not result.failures
        try:
            answer = ask(self, obligation, request)
        except WorkerDied as died:
            return {"status": "CRASH", "problems": [str(died)], "output": died.output}
        except WorkerHangs as hangs:
            return {"status": "TIMEOUT", "problems": [str(hangs)], "output": hangs.output}
        if "error" in answer:
            return {
                "status": "ERROR",
                "problems": [answer["error"].strip().splitlines()[-1]],
                "output": answer["error"],
            }
        result.calls += answer["calls"]
        evidence = {"index": index, "calls": answer["calls"], "launches": answer.get("launches", {})}
        for name, rows in answer.get("tried", {}).items():
            self.tried.setdefault(name, set()).update(map(tuple, rows))
        if "sizes" in answer:
            self.sizes.merge(answer["sizes"])
        result.notes += [text for text in answer.get("notes", []) if text not in result.notes]
        result.cases.append(evidence | {"seconds": round(answer.get("seconds", 0.0), 6)})
        for name, count in answer.get("launches", {}).items():
            result.launches[name] = result.launches.get(name, 0) + count
        totals.add(answer.get("errors", []))
        if answer.get("witnessed"):
            result.witnessed.append(index)
        if not answer["problems"]:
            return None
        kept = {key: answer[key] for key in ("problems", "case", "diagnosis") if answer.get(key)}
        return {"status": "FAIL", **kept}

    def _lost(self, obligation: Obligation, error: WorkerDied | WorkerHangs) -> Result:
        status: Status = "CRASH" if isinstance(error, WorkerDied) else "TIMEOUT"
        failure = {"status": status, "problems": [str(error)], "output": error.output, "index": 0}
        failure["reproduce"] = self.reproduce(obligation, 0)
        return Result(obligation.id, status, str(error), executed=1, failures=[failure])

    def reproduce(self, obligation: Obligation, index: int) -> str:
        """The shell line that runs just this case again."""
        return again.of_case(self.settings, obligation.id, index)

    def request(self, operation: str, obligation: Obligation | None = None, index: int = 0) -> dict[str, Any]:
        """What a process is asked."""
        request: dict[str, Any] = {"op": operation, "settings": dataclasses.asdict(self.settings), "index": index}
        if obligation is not None:
            request["obligation"] = obligation.id
        return request
