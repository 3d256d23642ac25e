"""`CpuBackend`: what the HAL asks of a backend, answered by the compiled kernel or, without one, by torch."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

from hal.backend import Backend, Probe
from hal.spec.capability import Capabilities, plain_dense
from hal.spec.errors import SpecError

if TYPE_CHECKING:
    from hal.ep.doctor import RankState
    from hal.ep.engine import EpEngine
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs


class Kernel(Protocol):
    """How the backend computes: `hal_cpu.native.NativeKernel` or `hal_cpu.torch_path.TorchKernel`."""

    batch_invariant: bool

    def details(self) -> dict[str, str]:
        """What ``hal doctor`` shows."""

    def plan(self, args: MlaPlanArgs) -> object:
        """Make a schedule, or None where there is nothing to prepare."""

    def decode(self, args: MlaDecodeArgs) -> None:
        """Write ``args.out`` and ``args.lse``."""

    def launches(self) -> dict[str, int]:
        """Calls so far, by variant of the kernel."""


class CpuBackend(Backend):
    """MLA decode on the host's own cores.

    ``HAL_CPU_ISA`` forces an instruction set, ``HAL_CPU_THREADS`` a number of threads (default: torch's).
    """

    spec_version: ClassVar[str] = "1.0"
    priority: ClassVar[int] = 0

    @cached_property
    def _kernel(self) -> Kernel:
        # Imported late: making a CpuBackend must load neither torch nor the compiled library.
        from hal_cpu.native import NativeKernel, missing
        from hal_cpu.torch_path import TorchKernel

        reason = missing()
        return NativeKernel() if reason is None else TorchKernel(reason)

    def probe(self) -> Probe:
        """Load the kernel and say which one it is; unavailable only for a wrong environment variable."""
        try:
            details = self._kernel.details()
        except SpecError as error:
            return Probe(False, str(error), f"unset {error.argument}")
        fix = details.pop("fix", "")
        reason = f"{platform.machine()}, {details['isa']}, {details['threads']} threads"
        return Probe(True, reason, fix, details=details)

    def capabilities(self) -> Capabilities:
        """Everything of dense decode but sinks and extra caches; expert-parallel calls where compiled."""
        from hal_cpu import ep

        dense = dataclasses.replace(plain_dense(), batch_invariant=self._kernel.batch_invariant)
        communicates = ep.missing() is None
        return Capabilities(
            device_types=("cpu",), mla_dense=dense, mla_sparse=None, ep=ep.CAPABILITIES if communicates else None
        )

    def mla_plan(self, args: MlaPlanArgs) -> object:
        """Cut the step into parts of equal cost."""
        return self._kernel.plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """Run the kernel; every index is checked before it is followed."""
        self._kernel.decode(args)

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Open shared-memory windows to the other ranks."""
        from hal_cpu import ep

        return ep.open_engine(args)

    def ep_live(self) -> Sequence[RankState]:
        """Read the windows of this user's processes."""
        from hal_cpu import ep, ep_live

        return ep_live.states() if ep.missing() is None else ()

    def launches(self) -> Mapping[str, int]:
        """Calls of each kernel in this process, as ``cpu:mla_decode_<isa>@cpu`` and ``cpu:ep_<call>_<isa>@cpu``."""
        from hal_cpu import ep

        decoded = {f"cpu:mla_decode_{name}@cpu": count for name, count in self._kernel.launches().items()}
        return decoded | {f"cpu:ep_{name}@cpu": count for name, count in ep.launches.items()}
