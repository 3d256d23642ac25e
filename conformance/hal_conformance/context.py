"""What a check gets: declared capabilities, a seeded source of cases, one way to call and compare, and a record."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

import hal
from hal.spec.capability import Capabilities, EpCapabilities, MlaCapabilities
from hal.spec.errors import HalError
from hal.spec.limits import DENSE_LSE, DENSE_OUT, Limits
from hal_conformance import manners
from hal_conformance.case import MlaCase
from hal_conformance.cover import Labels
from hal_conformance.cover_mla import decode
from hal_conformance.decode import Around, Expected, Outcome, Verdict, call, expect, judge
from hal_conformance.draw import SEARCH, Draw
from hal_conformance.inputs import Inputs, build
from hal_conformance.limits import unjudged
from hal_conformance.sizes import Sizes
from hal_conformance.table import Mode, Obligation
from hal_conformance.threads import few_threads, is_small, side_by_side

if TYPE_CHECKING:
    from hal_conformance.witness import Tape


Made = TypeVar("Made")

_DIAGNOSED = 10_000_000
"""Elements that the reference gathers for a case, up to which what is wrong is looked for."""

_QUICK_HAND = 3
"""Values of a range that one case of a quick run tries; a default run tries all of them."""


class BackendRaised(Exception):
    """A declared call raised: the backend's failure, told apart from a failure of the suite."""

    def __init__(self, case: MlaCase, error: BaseException) -> None:
        super().__init__(f"a declared call raised {type(error).__name__}: {error}")
        self.case = case
        self.error = error


class Stop(Exception):
    """The check has seen enough of this case; the problems are in the record."""


@dataclass(slots=True)
class Record:
    """What became of one case.

    Attributes
    ----------
    problems : list of str
        Empty if it passed.
    calls : int
        How many times the backend was called.
    case : dict or None
        The last call made, or the first that failed.
    tensors : int
        The seed its tensors were made from.
    diagnosis : dict or None
    errors : list of dict
        The comparison of out and of lse for every call compared.
    launches : dict of str to int
    tried : dict of str to set of tuple of str
        What the compared calls had of each factor, by the plan; see `hal_conformance.covers`.
    sizes : Sizes
        Of the calls that were compared.
    notes : list of str
        What could not be tried here, and why.
    seconds : float
        Spent inside the backend.
    """

    problems: list[str] = field(default_factory=list)
    calls: int = 0
    case: dict[str, Any] | None = None
    tensors: int = 0
    diagnosis: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    tried: dict[str, set[Labels]] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "problems": self.problems,
            "calls": self.calls,
            "case": self.case,
            "diagnosis": self.diagnosis,
            "errors": self.errors,
            "launches": self.launches,
            "seconds": self.seconds,
            "tried": {name: sorted(rows) for name, rows in self.tried.items()},
            "sizes": self.sizes.to_dict(),
            "notes": self.notes,
        }

    def met(self, plan: str, row: Labels) -> None:
        """Keep which values met in a call that was compared."""
        self.tried.setdefault(plan, set()).add(row)

    def add_launches(self, launches: dict[str, int]) -> None:
        """Sum up."""
        for name, count in launches.items():
            self.launches[name] = self.launches.get(name, 0) + count


@dataclass(slots=True)
class Settings:
    """Of the whole run, the same in every process of it.

    Attributes
    ----------
    backend : str
    seed : int
    mode : {"quick", "default", "full"}
    tighten : float
    device : str
        Empty for the first device type the backend declares.
    patience : float
        Times all timeouts: more than 1 for a simulator.
    ranks : int
        Of groups whose size does not matter; 0 for a few sizes in turn.
    evidence : str
        How kernels run here, once the backend was asked.
    """

    backend: str
    seed: int
    mode: Mode = "default"
    tighten: float = 1.0
    device: str = ""
    patience: float = 1.0
    ranks: int = 0
    evidence: str = ""


class Context:
    """One case of one obligation being checked.

    ``blind``: calls are made and numbers are not looked at, because another process judges them.
    """

    def __init__(self, settings: Settings, capabilities: Capabilities, obligation: Obligation, index: int) -> None:
        self.settings = settings
        self.backend = settings.backend
        self.capabilities = capabilities
        self.obligation = obligation
        self.index = index
        self.record = Record()
        self.wants_diagnosis = True
        self.tape: Tape | None = None
        self.blind = False
        self.rng = random.Random()
        self.device = settings.device or capabilities.device_types[0]
        self._outcomes: list[Outcome] = []
        self.restart()

    def restart(self) -> None:
        """Forget what went wrong and draw everything again as before."""
        self.rng.seed(f"{self.settings.seed}/{self.obligation.id}/{self.index}")
        self._built = 0
        self.record.problems.clear()
        self.record.notes.clear()
        self.record.diagnosis = None

    @property
    def dense(self) -> MlaCapabilities:
        """What is declared for dense decode; only for checks that require it."""
        assert self.capabilities.mla_dense is not None
        return self.capabilities.mla_dense

    @property
    def ep(self) -> EpCapabilities:
        """What is declared for expert-parallel calls; only for checks that require it."""
        assert self.capabilities.ep is not None
        return self.capabilities.ep

    def draw(self) -> Draw:
        """The source of declared sizes."""
        return Draw(
            self.rng,
            self.dense,
            self.index,
            self.device,
            gentle=self.obligation.level in ("L0", "L1"),
            deal=f"{self.settings.seed}/{self.obligation.id}",
            cases=self.obligation.count("default") or 24,
            most=_QUICK_HAND if self.settings.mode == "quick" else SEARCH,
        )

    def limits(self) -> tuple[Limits, Limits]:
        """Of out and lse, as far as the vendor tightened them."""
        return DENSE_OUT.tightened(self.settings.tighten), DENSE_LSE.tightened(self.settings.tighten)

    def problem(self, text: str) -> None:
        """Note a failure."""
        self.record.problems.append(text)

    def tensor_seed(self) -> int:
        """A seed for the next tensors made; the same at every replay."""
        self._built += 1
        text = f"{self.settings.seed}/{self.obligation.id}/{self.index}/{self._built}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def make(self, case: MlaCase, seed: int | None = None) -> Inputs:
        """The tensors of a case."""
        return build(case, self.tensor_seed() if seed is None else seed)

    def run(self, inputs: Inputs, *, plan: hal.MlaPlan | None = None, around: Around = nullcontext) -> Outcome:
        """One watched call; whatever it raises is the backend's failure."""
        if not self.record.problems:
            self.record.case, self.record.tensors = inputs.case.to_dict(), inputs.seed
        try:
            outcome = call(inputs, self.backend, plan=plan, around=around)
        except Exception as error:
            raise BackendRaised(inputs.case, error) from error
        self._outcomes.append(outcome)
        self.record.calls += 1
        self.record.seconds += outcome.seconds
        self.record.add_launches(outcome.launches)
        for text in outcome.problems:
            self.problem(text)
        if not outcome.launches and outcome.out.numel() and sum(inputs.case.lengths):
            self.problem("no kernel of this backend was launched: something else computed this result")
        if any(text.startswith(("out is", "lse is")) for text in outcome.problems):
            raise Stop
        return outcome

    def together(self, calls: Sequence[Callable[[], Made]]) -> list[Made | BaseException]:
        """Make calls in as many threads at once; what each gave, or raised."""
        as_it_was = manners.shared()
        found = side_by_side(calls) if self.tape is None else self.tape.together(calls)
        changed = manners.changed(as_it_was)
        if changed:
            self.problem(f"calls of two threads changed {', '.join(changed)}, which the whole process shares")
        return found

    def look_back(self) -> None:
        """See that no call of this case wrote once it had returned."""
        for text in {text for outcome in self._outcomes for text in outcome.written_later()}:
            self.problem(text)

    def compare(self, inputs: Inputs, outcome: Outcome, expected: Expected | None = None, what: str = "") -> Verdict:
        """Compare with the reference; note and diagnose what differs."""
        if self.blind:
            return Verdict(unjudged(outcome.out), unjudged(outcome.lse.unsqueeze(-1)))
        expected = expect(inputs) if expected is None else expected
        verdict = judge(outcome.out, outcome.lse, expected, *self.limits())
        self.record.sizes.add(inputs.case)
        self.record.met("decode", decode(self.dense).labels(inputs.case))
        self.record.errors.append({"out": verdict.out.to_dict(), "lse": verdict.lse.to_dict()})
        if not verdict.ok:
            if not self.record.problems:
                self.record.case, self.record.tensors = inputs.case.to_dict(), inputs.seed
            self.problem(what + explain(verdict))
            if self.record.diagnosis is None and self.wants_diagnosis and _is_diagnosed(inputs.case):
                from hal_conformance.diagnosis import diagnose

                with few_threads(is_small(inputs.case)):
                    self.record.diagnosis = diagnose(inputs, outcome, expected, verdict, *self.limits())
                if not self.record.diagnosis["cause"] and verdict.mask_differs:
                    self.record.diagnosis["cause"] = self._where_nan_comes_from(inputs.case, inputs.seed)
        return verdict

    def expect(self, inputs: Inputs) -> Expected:
        """Ask the reference, unless others judge."""
        if self.blind:
            nothing = torch.empty(0, dtype=torch.float64)
            return Expected(nothing, nothing, nothing, nothing)
        return expect(inputs)

    def right(self, out: Tensor, lse: Tensor, expected: Expected) -> bool:
        """Whether a result is within the limits, as far as it is judged here."""
        return self.blind or judge(out, lse, expected, *self.limits()).ok

    def _where_nan_comes_from(self, case: MlaCase, seed: int) -> str:
        """Make the call again with zeros in unused memory, to see whether NaN or inf still comes out."""
        again = build(case.but(poison="zero"), seed)
        try:
            outcome = call(again, self.backend)
        except Exception:
            return ""
        verdict = judge(outcome.out, outcome.lse, expect(again), *self.limits())
        if verdict.ok:
            return "unused memory reaches the result: with zeros there instead of NaN or inf it is right"
        if not verdict.mask_differs:
            return "unused memory is read in place of data: rows come from elsewhere (strides, pages or offsets)"
        return "NaN or inf is computed, not read: it comes out with zeros in unused memory too"

    def check(self, case: MlaCase, what: str = "") -> tuple[Inputs, Outcome, Verdict]:
        """Make, run, compare."""
        inputs = self.make(case)
        outcome = self.run(inputs)
        return inputs, outcome, self.compare(inputs, outcome, what=what)

    def same(self, have: tuple[Tensor, Tensor], want: Outcome, like: Expected, what: str) -> bool:
        """Two results of the backend that must agree: each may be off by the limits, so they by twice that."""
        if self.blind:
            return True
        twin = Expected(want.out.double(), want.lse.double(), like.out_magnitude, like.lse_magnitude, like.rounding)
        verdict = judge(*have, twin, *self.limits(), slack=2.0)
        if not verdict.ok:
            self.problem(f"{what}: {explain(verdict, 'the first result')}")
        return verdict.ok


def _is_diagnosed(case: MlaCase) -> bool:
    """Whether the reference can be asked dozens of times, once for every hypothesis."""
    return sum(case.lengths) * case.h_kv * case.d <= _DIAGNOSED


def explain(verdict: Verdict, against: str = "the reference") -> str:
    """One line: what is off, where, by how much."""
    parts = []
    for name, comparison in (("out", verdict.out), ("lse", verdict.lse)):
        if comparison.ok:
            continue
        bad, rows = int(comparison.bad.sum()), comparison.bad.numel()
        how = f"{comparison.worst:.3g} times its limit" if comparison.worst != float("inf") else "inf or NaN differ"
        where = list(comparison.worst_row)
        parts.append(f"{name} differs from {against} in {bad} of {rows} rows, most at {where} ({how})")
    return "; ".join(parts)


def refused(call: Callable[[], object]) -> str:
    """Empty if the call raises `UnsupportedError`; otherwise what it did instead."""
    try:
        call()
    except hal.UnsupportedError:
        return ""
    except HalError as error:
        return f"raised {type(error).__name__} instead of UnsupportedError: {error}"
    except Exception as error:
        return f"raised {type(error).__name__} instead of UnsupportedError: {error}"
    return "returned a result instead of raising UnsupportedError"
