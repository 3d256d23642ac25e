"""`MusaBackend`: the portable kernels on Moore Threads GPUs, through MUSA's driver or through their OpenCL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from hal.backend import Backend, Probe
from hal.spec.capability import Capabilities, plain_dense
from hal.spec.errors import BackendUnavailable, HalError, SpecError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from hal.ep.engine import EpEngine
    from hal.portable.mla import OnEachDevice, Schedule
    from hal.portable.opencl import Adopted, OpenClDevice
    from hal.portable.runtime import SharingDevice
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

RUNTIME: Final = "HAL_MUSA_RUNTIME"
"""``driver`` or ``opencl``; unset, the driver where all it needs is there."""

SIMULATE: Final = "HAL_MUSA_SIMULATE"
"""``1`` allows an OpenCL platform of another vendor. What is tested is then no Moore Threads GPU, as evidence says."""

VENDORS: Final = ("Moore Threads", "MThreads", "MUSA")
"""What the name or vendor of the chip's own OpenCL platform holds."""


class MusaBackend(Backend):
    """MLA decode for tensors of torch_musa (runtime ``driver``) or of the host (runtime ``opencl``).

    ``HAL_OPENCL_PLATFORM`` and ``HAL_OPENCL_DEVICE`` choose among several OpenCL devices.
    """

    spec_version: ClassVar[str] = "1.0"
    priority: ClassVar[int] = 100

    @cached_property
    def _driver_is_out(self) -> str:
        """Why the driver is not the runtime, in words; empty if it is.

        Raises
        ------
        SpecError
        """
        # Imported late: making a MusaBackend must load neither torch nor a driver.
        from hal_musa import driver

        chosen, simulating = _one_of(RUNTIME, "", "driver", "opencl"), _simulating()
        if chosen == "opencl":
            return f"{RUNTIME}=opencl"
        if simulating and not chosen:
            return f"{SIMULATE}=1"
        reason = driver.missing()
        if reason and chosen:
            raise BackendUnavailable(f"{RUNTIME}=driver: {reason}")
        return reason

    @cached_property
    def opencl(self) -> OpenClDevice:
        """The device of the one OpenCL platform that may be used.

        Raises
        ------
        BackendUnavailable, SpecError
        """
        from hal.portable import opencl

        return opencl.OpenClDevice(opencl.choose(*(() if _simulating() else VENDORS)))

    @cached_property
    def _kernels(self) -> OnEachDevice:
        from hal.portable.mla import OnEachDevice
        from hal_musa import driver

        return OnEachDevice((lambda _: self.opencl) if self._driver_is_out else driver.MusaDevice)

    def probe(self) -> Probe:
        """Look for MUSA's driver with its toolkit and torch_musa; where they are not, for OpenCL."""
        details: dict[str, str] = {}
        try:
            reason = self._driver_is_out
            if not reason:
                return self._probe_driver()
            details["runtime driver"] = f"out: {reason}"
            return self._probe_opencl(details)
        except SpecError as error:
            return Probe(False, str(error), f"unset {error.argument}", details=details)
        except BackendUnavailable as error:
            fix = "" if _simulating() else f"install the MUSA driver; {SIMULATE}=1 runs the kernels in simulation"
            if os.environ.get(RUNTIME) == "driver":
                fix = f"install what is missing, or unset {RUNTIME}"
            return Probe(False, str(error), fix, details=details)
        except HalError as error:
            return Probe(False, first_line(error), "see what mthreads-gmi and clinfo say", details=details)

    def _probe_driver(self) -> Probe:
        from hal_musa import driver

        device = driver.MusaDevice(0)
        facts = device.facts
        details = {
            "runtime": "MUSA driver",
            "device": facts.name,
            "driver": facts.driver,
            "compiler": driver.compiler(),
        }
        if os.environ.get(driver.LIBRARY_ENV):
            details["simulation"] = f"{driver.LIBRARY_ENV} stands in for the driver"
            return Probe(True, f"simulated {facts.name}", evidence="simulation", details=details)
        if device.library.simulated:
            details["simulation"] = "the libmusa.so that was found is the simulator's"
            return Probe(True, f"simulated {facts.name}", evidence="simulation", details=details)
        return Probe(True, f"{facts.name}, {facts.driver}", details=details)

    def _probe_opencl(self, details: dict[str, str]) -> Probe:
        device = self.opencl
        facts, platform = device.facts, device.platform
        details |= {
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
        """Dense decode of plain caches; expert parallelism where processes can share the device's memory."""
        from hal.portable import ep

        where, transport = ("cpu", "shm") if self._driver_is_out else ("musa", "ipc")
        if transport == "shm" and not self.opencl.unified:
            transport = ""
        communicates = ep.capabilities(transport) if transport else None
        return Capabilities(device_types=(where,), mla_dense=plain_dense(), mla_sparse=None, ep=communicates)

    def mla_plan(self, args: MlaPlanArgs) -> Schedule:
        """See `PortableMla.plan`."""
        return self._kernels.on(args.geometry.device.index or 0).plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """See `PortableMla.decode`."""
        self._kernels.on(args.q.device.index or 0).decode(args, args.schedule)  # type: ignore[arg-type]

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Open windows to the other ranks: shared memory under OpenCL, IPC memory under the driver."""
        from hal.portable import ep

        return ep.open_engine(args, self._device(args.device.index or 0), "musa")

    def _device(self, index: int) -> SharingDevice:
        return self._kernels.on(index).device  # type: ignore[return-value]

    def adopt(self, tensor: Tensor) -> Adopted | None:
        """Keep a copy of a KV cache on the device; None where the device reads the tensor's memory as it is.

        See `OpenClDevice.adopt`.
        """
        return self.opencl.adopt(tensor) if self._driver_is_out else None

    def launches(self) -> Mapping[str, int]:
        """Of all kernels, over all devices."""
        return self._kernels.launches() if "_kernels" in self.__dict__ else {}


def _one_of(variable: str, *legal: str) -> str:
    chosen = os.environ.get(variable) or legal[0]
    if chosen not in legal:
        raise SpecError(variable, repr(chosen), f"{' or '.join(filter(None, legal))}, or unset")
    return chosen


def _simulating() -> bool:
    return _one_of(SIMULATE, "0", "1") == "1"
