"""Faults on purpose: what a test makes one rank do wrong, so that the others can show that they notice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from hal.spec.errors import SpecError
from hal.spec.tensors import require_choice, require_int

KINDS: Final = ("delay", "drop", "kill", "stop", "corrupt")
PHASES: Final = ("post", "grant", "push", "receive", "stage", "fetch", "acknowledge")


@dataclass(frozen=True, slots=True)
class EpFault:
    """One thing that goes wrong on the rank whose buffer carries it.

    Attributes
    ----------
    kind : {"delay", "drop", "kill", "stop", "corrupt"}
        Sleep for ``seconds``; keep a message (phases post and grant) or the rows (push) from ``target``; kill or stop
        this process; damage a message (post).
    phase : str
        Member of `PHASES`: where in an operation. On the CPU a low-latency dispatch of one node has no grant unless
        ranks may be masked: every rank finds its places itself.
    operation : int
        Number of the operation on this buffer, from 1; -1 for every one.
    target : int
        Rank of the node that drop and corrupt concern; -1 for all others.
    seconds : float
        Length of a delay.
    """

    kind: Literal["delay", "drop", "kill", "stop", "corrupt"]
    phase: str = "push"
    operation: int = -1
    target: int = -1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_choice("phase", self.phase, PHASES)
        require_int("operation", self.operation, -1)
        require_int("target", self.target, -1)
        number = isinstance(self.seconds, (int, float)) and not isinstance(self.seconds, bool)
        if not number or not 0 <= self.seconds < math.inf:
            raise SpecError("seconds", repr(self.seconds), "a finite number of seconds, 0 or more")
        if self.kind == "corrupt" and self.phase != "post":
            raise SpecError("phase", repr(self.phase), "'post' for a corrupt message")
        if self.kind == "drop" and self.phase not in ("post", "grant", "push"):
            raise SpecError("phase", repr(self.phase), "'post', 'grant' or 'push' for a drop")


@dataclass(frozen=True, slots=True)
class EpFaults:
    """The faults of one rank: ``hal.EpBuffer(..., faults=EpFaults(EpFault("kill", operation=3)))``."""

    faults: tuple[EpFault, ...]

    def __init__(self, *faults: EpFault) -> None:
        for one in faults:
            if not isinstance(one, EpFault):
                raise SpecError("faults", repr(one), "each an EpFault")
        object.__setattr__(self, "faults", faults)
