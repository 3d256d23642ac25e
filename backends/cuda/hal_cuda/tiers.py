"""Tiers: the ways to decode, best first. The first that can do a call does it.

Each lives in a module of its own that is imported when it is first asked for; `ORDER` is the one place to register it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from hal.spec.errors import SpecError, first_line

if TYPE_CHECKING:
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

ENV: Final = "HAL_CUDA_TIER"

ORDER: Final[Mapping[str, tuple[str, str]]] = {
    # Hand-written for sm_90a. Its module is looked for and may be absent.
    "hopper": ("hal_cuda.hopper", "HopperTier"),
    # hal.portable.triton, for every architecture from sm_80 on.
    "triton": ("hal_cuda.triton_tier", "TritonTier"),
    # hal.portable.kernels, compiled by NVRTC: no tensor cores, and nothing needed but cupy.
    "portable": ("hal_cuda.portable_tier", "PortableTier"),
}
"""Name → module and class. The class is made without arguments and must touch no device until it is asked to plan."""


class Tier(Protocol):
    """One way to decode."""

    name: str

    def missing(self) -> str:
        """What it lacks on this machine, in words; empty if it can be used. Must not raise for what may be absent."""

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Why it cannot do this call, in words; empty if it can. Cheap: asked at every call."""

    def plan(self, args: MlaPlanArgs) -> object:
        """Make the schedule and workspace of these lengths, on torch's current stream, without waiting for it."""

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        """Write ``args.out`` and ``args.lse``; without allocating where ``schedule`` is not None."""

    def launches(self) -> Mapping[str, int]:
        """How often each kernel ran, by ``driver:kernel``."""


def forced() -> str | None:
    """The tier ``HAL_CUDA_TIER`` demands, None where it is unset.

    Raises
    ------
    SpecError
        There is no such tier.
    """
    name = os.environ.get(ENV)
    if not name:
        return None
    if name not in ORDER:
        raise SpecError(ENV, repr(name), f"{' or '.join(ORDER)}, or unset")
    return name


def load() -> tuple[list[Tier], dict[str, str]]:
    """The usable tiers in order, and for every other one why it is out.

    Raises
    ------
    SpecError
        See `forced`.
    """
    wanted = forced()
    usable: list[Tier] = []
    out: dict[str, str] = {}
    for name, (module, attribute) in ORDER.items():
        if wanted not in (None, name):
            out[name] = f"{ENV}={wanted}"
            continue
        if importlib.util.find_spec(module) is None:
            out[name] = "not part of this build"
            continue
        try:
            tier: Tier = getattr(importlib.import_module(module), attribute)()
            reason = tier.missing()
        except Exception as error:  # a package it needs may fail at its import in any way
            reason = f"does not import: {first_line(error)}"
        if reason:
            out[name] = reason
        else:
            usable.append(tier)
    return usable, out
