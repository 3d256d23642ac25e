"""The kernel HAL: MLA decode and expert-parallel communication on any vendor's accelerator.

``HAL_BACKEND`` (or `use`, or ``backend=``) chooses the backend; `mla_decode`, `mla_plan` and `mla_merge` are the same
on all of them, and so is `EpBuffer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from hal.plugins import Status, registry, select, use
from hal.spec import SPEC_VERSION
from hal.spec.capability import Capabilities
from hal.spec.errors import (
    BackendUnavailable,
    CompileError,
    DeviceError,
    HalError,
    RankFailure,
    SpecError,
    UnsupportedError,
)
from hal.spec.validation import set_validation

if TYPE_CHECKING:
    from hal.ep.buffer import EpBuffer
    from hal.ep.faults import EpFault, EpFaults
    from hal.mla import mla_decode, mla_merge, mla_plan
    from hal.spec.plan import MlaPlan

__version__ = "0.1.0"

__all__ = [
    "SPEC_VERSION",
    "BackendUnavailable",
    "Capabilities",
    "CompileError",
    "DeviceError",
    "EpBuffer",
    "EpFault",
    "EpFaults",
    "HalError",
    "MlaPlan",
    "RankFailure",
    "SpecError",
    "UnsupportedError",
    "__version__",
    "backends",
    "capabilities",
    "mla_decode",
    "mla_merge",
    "mla_plan",
    "set_validation",
    "use",
]


def backends() -> list[Status]:
    """Ask every installed backend: available ones first, by priority, each with the reason why it is in or out."""
    return registry().statuses()


def capabilities(backend: str | None = None) -> Capabilities:
    """What the backend in force (or the named one) declares.

    Raises
    ------
    BackendUnavailable
        It cannot be used.
    """
    return select(backend).capabilities


_LATER: Final = {
    "EpBuffer": "hal.ep.buffer",
    "EpFault": "hal.ep.faults",
    "EpFaults": "hal.ep.faults",
    "MlaPlan": "hal.spec.plan",
    "mla_decode": "hal.mla",
    "mla_merge": "hal.mla",
    "mla_plan": "hal.mla",
}
"""Names that need torch, and the modules that have them."""


def __getattr__(name: str) -> object:
    # torch takes seconds to load, which `hal --help` does not need, and torch.distributed more than the rest of this
    # package: either comes with the first use.
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found
