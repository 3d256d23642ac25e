"""What backends over `hal.portable.bindings` have in common: everything but names, chips and the words for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from hal.backend import Backend, Probe
from hal.spec.capability import Capabilities, plain_dense
from hal.spec.errors import BackendUnavailable, HalError, SpecError, first_line

if TYPE_CHECKING:
    from hal.ep.engine import EpEngine
    from hal.portable.bindings import Bindings, BoundDevice, Runtime, Torch, Tuning
    from hal.portable.mla import OnEachDevice, Schedule
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs


@dataclass(frozen=True, slots=True)
class Vendor:
    """Whose devices these are.

    Attributes
    ----------
    name : str
        Of the backend.
    torch : Torch
    tunings : mapping of str to Tuning
        The chips it is for, by architecture.
    bindings : callable
        Where the runtime is; raises `BackendUnavailable` where it is not.
    refusal : callable
        Given an architecture that is not in ``tunings``, or is another vendor's too, and whether it is simulated: why
        the backend does not take it, empty if it does.
    torch_is_out : callable
        Why torch cannot be used with such devices, in words; empty if it can.
    fix : str
        What to install where something is missing.
    """

    name: str
    torch: Torch
    tunings: Mapping[str, Tuning]
    bindings: Callable[[], Bindings]
    refusal: Callable[[str, bool], str]
    torch_is_out: Callable[[], str]
    fix: str


class BoundBackend(Backend):
    """MLA decode and expert parallelism on the devices of one vendor."""

    spec_version: ClassVar[str] = "1.0"
    priority: ClassVar[int] = 100

    def __init__(self, vendor: Callable[[], Vendor]) -> None:
        self._vendor_of = vendor

    @cached_property
    def _vendor(self) -> Vendor:
        # Asked for late: making a backend must load neither torch nor a driver.
        return self._vendor_of()

    @cached_property
    def runtime(self) -> Runtime:
        """The runtime, loaded.

        Raises
        ------
        BackendUnavailable
        """
        from hal.portable import bindings

        return bindings.load(self._vendor.bindings())

    @cached_property
    def _kernels(self) -> OnEachDevice:
        from hal.portable.mla import OnEachDevice

        return OnEachDevice(self.device)

    def device(self, index: int, timed: bool = False) -> BoundDevice:
        """The driver of one device; see `BoundDevice`."""
        from hal.portable.bindings import BoundDevice
        from hal.portable.staged import StagedDevice

        kind = StagedDevice if self.runtime.simulated else BoundDevice
        return kind(self.runtime, index, self._vendor.torch, self._vendor.tunings, timed)

    def probe(self) -> Probe:
        """Look for the bindings, their libraries, a device and a torch for it, in this order."""
        details: dict[str, str] = {}
        try:
            runtime = self.runtime
            details |= {"runtime": runtime.versions(), "devices": str(runtime("GetDeviceCount"))}
            device = self.device(0)
            details |= {"device": str(device.properties.name), "architecture": device.target}
            reason = self._vendor.refusal(device.target.partition(":")[0], runtime.simulated)
            if reason:
                return Probe(False, reason, details=details)
            facts = device.facts
            details |= {
                "lanes of a subgroup": str(facts.subgroup),
                "local memory": f"{facts.local_bytes >> 10} KiB of {device.properties.sharedMemPerBlock >> 10} KiB",
            }
            if runtime.simulated:
                details["simulation"] = f"of {facts.name}; says nothing of how fast one is"
                return Probe(True, f"simulated {facts.name}", evidence="simulation", details=details)
            reason = self._vendor.torch_is_out()
            if reason:
                return Probe(False, reason, "install the torch that is built for these devices", details=details)
            return Probe(True, f"{device.properties.name}, {facts.name}", details=details)
        except SpecError as error:
            return Probe(False, str(error), f"unset {error.argument}", details=details)
        except BackendUnavailable as error:
            return Probe(False, first_line(error), self._vendor.fix, details=details)
        except HalError as error:
            return Probe(False, first_line(error), "see what the vendor's own tools say", details=details)

    def capabilities(self) -> Capabilities:
        """Dense decode of plain caches, and expert parallelism; packed caches and chosen tokens are not written."""
        from hal.portable import ep
        from hal.portable.bindings import BoundDevice

        where = "cpu" if self.runtime.simulated else self._vendor.torch.device
        communicates = ep.capabilities(BoundDevice.transport)
        return Capabilities(device_types=(where,), mla_dense=plain_dense(), mla_sparse=None, ep=communicates)

    def mla_plan(self, args: MlaPlanArgs) -> Schedule:
        """See `PortableMla.plan`."""
        return self._kernels.on(args.geometry.device.index or 0).plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """See `PortableMla.decode`."""
        self._kernels.on(args.q.device.index or 0).decode(args, args.schedule)  # type: ignore[arg-type]

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Open windows to the other ranks of the node, in memory that the runtime shares between processes."""
        from hal.portable import ep

        # The device that decodes: one stream for all it is given, and kernels are built once.
        device: BoundDevice = self._kernels.on(args.device.index or 0).device  # type: ignore[assignment]
        return ep.open_engine(args, device, self._vendor.name)

    def launches(self) -> Mapping[str, int]:
        """Of all kernels, over all devices."""
        return self._kernels.launches() if "_kernels" in self.__dict__ else {}
