"""`MusaBackend`: the portable kernels on Moore Threads GPUs, through their OpenCL driver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from hal.backend import Backend, Probe
from hal.spec.capability import Capabilities
from hal.spec.errors import BackendUnavailable, HalError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from hal.ep.engine import EpEngine
    from hal.portable.mla import PortableMla, Schedule
    from hal.portable.opencl import Adopted, OpenClDevice
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

SIMULATE: Final = "HAL_MUSA_SIMULATE"
"""``1`` allows a platform of another vendor. It is then no Moore Threads GPU that is tested, and evidence says so."""

VENDORS: Final = ("Moore Threads", "MThreads", "MUSA")
"""What the name or vendor of the chip's own OpenCL platform holds."""


class MusaBackend(Backend):
    """MLA decode for tensors of the host; ``HAL_OPENCL_PLATFORM`` and ``HAL_OPENCL_DEVICE`` choose among several."""

    spec_version: ClassVar[str] = "1.0"
    priority: ClassVar[int] = 100

    @cached_property
    def device(self) -> OpenClDevice:
        """The device of the one platform that may be used.

        Raises
        ------
        BackendUnavailable, SpecError
        """
        # Imported late: making a MusaBackend must load neither torch nor pyopencl.
        from hal.portable import opencl

        return opencl.OpenClDevice(opencl.choose(*(() if _simulating() else VENDORS)))

    @cached_property
    def _mla(self) -> PortableMla:
        from hal.portable.mla import PortableMla

        return PortableMla(self.device)

    def probe(self) -> Probe:
        """Look for pyopencl, for the platform, and for its device."""
        try:
            device = self.device
            facts, platform = device.facts, device.platform
        except SpecError as error:
            return Probe(False, str(error), f"unset {error.argument}")
        except BackendUnavailable as error:
            fix = "" if _simulating() else f"install the MUSA driver; {SIMULATE}=1 runs the kernels in simulation"
            return Probe(False, str(error), fix)
        except HalError as error:
            return Probe(False, str(error).splitlines()[0], "see what the tool clinfo says")
        details = {
            "runtime": "OpenCL",
            "platform": f"{platform}, {platform.version}",
            "device": facts.name,
            "driver": facts.driver,
            "memory": "shared with the host" if device.unified else "of its own",
        }
        if platform.matches(*VENDORS):
            return Probe(True, f"{facts.name}, OpenCL", details=details)
        details["simulation"] = f"asked for by {SIMULATE}; says nothing of a Moore Threads GPU"
        return Probe(True, f"simulated on {platform}, {facts.name}", evidence="simulation", details=details)

    def capabilities(self) -> Capabilities:
        """Dense decode of plain caches. Packed caches, chosen tokens and expert parallelism are not written yet."""
        from hal.portable.mla import dense

        return Capabilities(device_types=("cpu",), mla_dense=dense(), mla_sparse=None, ep=None)

    def mla_plan(self, args: MlaPlanArgs) -> Schedule:
        """See `PortableMla.plan`."""
        return self._mla.plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """See `PortableMla.decode`."""
        self._mla.decode(args, args.schedule)  # type: ignore[arg-type]

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Not written yet, and not declared."""
        raise UnsupportedError("musa", "group", "an expert-parallel group", "no expert parallelism yet")

    def adopt(self, tensor: Tensor) -> Adopted | None:
        """Keep a copy of a KV cache on the device; None where the device reads the host's memory as it is.

        See `OpenClDevice.adopt`.
        """
        return self.device.adopt(tensor)

    def launches(self) -> Mapping[str, int]:
        """Of all kernels."""
        return self.device.launches()


def _simulating() -> bool:
    chosen = os.environ.get(SIMULATE) or "0"
    if chosen not in ("0", "1"):
        raise SpecError(SIMULATE, repr(chosen), "0 or 1")
    return chosen == "1"
