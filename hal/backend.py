"""The contract between the HAL and a backend: one probe, one declaration, four operations.

A backend receives validated arguments (`hal.spec`) and never checks them again. Constructing a `Backend` must be cheap
and must not touch the device; `probe` is the first call that may.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from hal.spec.errors import SpecError

if TYPE_CHECKING:
    from hal.ep.doctor import RankState
    from hal.ep.engine import EpEngine
    from hal.spec.capability import Capabilities
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

Evidence = Literal["hardware", "simulation", "compiled"]
"""How kernels of a backend run on this machine: on the chip, in a simulator, or not at all (only compiled)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend found on this machine.

    Attributes
    ----------
    available : bool
        Whether the operations it declares can run here and now.
    reason : str
        One line: the device found, or precisely what is missing.
    fix : str
        What the user can type or install to make it available; empty if nothing is wrong or nothing helps.
    evidence : {"hardware", "simulation", "compiled"}
        How its kernels run here.
    details : mapping of str to str
        For ``hal doctor``: device, driver, library paths, versions.
    """

    available: bool
    reason: str
    fix: str = ""
    evidence: Evidence = "hardware"
    details: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = isinstance(self.reason, str) and isinstance(self.fix, str)
        known = self.evidence in get_args(Evidence) and isinstance(self.available, bool)
        if not (texts and known and isinstance(self.details, Mapping)):
            legal = "Probe(bool, str, fix=str, evidence=hardware|simulation|compiled, details=mapping)"
            raise SpecError("probe", self, legal)


class Backend(ABC):
    """A vendor's port. Every method must be written; what the port cannot do it leaves out of `capabilities`.

    Attributes
    ----------
    spec_version : str
        The ``hal.spec.SPEC_VERSION`` the backend was written against, ``major.minor``.
    priority : int
        Among available backends the highest is used when the user chose none: 0 for the embedded CPU, 100 for devices.
    """

    spec_version: ClassVar[str]
    priority: ClassVar[int]

    @abstractmethod
    def probe(self) -> Probe:
        """Look for the driver, the library and the device. Must not raise for anything that may be absent."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What may be asked of this backend on this machine. Called only after a successful probe."""

    @abstractmethod
    def mla_plan(self, args: MlaPlanArgs) -> object:
        """Make the split-KV schedule for these lengths.

        Whatever is returned comes back as ``args.schedule`` of every `mla_decode` it is valid for.
        """

    @abstractmethod
    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """Write ``args.out`` and ``args.lse`` whole, on the caller's current stream.

        Raises
        ------
        SpecError
            An index or length in use is out of range and the backend noticed; it must never be read through.
        """

    @abstractmethod
    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Open the expert-parallel engine of ``args.group``: its windows, its transport, its kernels."""

    def ep_live(self) -> Sequence[RankState]:
        """The ranks of live groups on this machine, seen from outside, for ``hal ep doctor``; nothing by default."""
        return ()

    @abstractmethod
    def launches(self) -> Mapping[str, int]:
        """How often each kernel ran in this process, by ``driver:kernel@device``: evidence against fallbacks."""
