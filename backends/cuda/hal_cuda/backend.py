"""`CudaBackend`: what the HAL asks of a backend, answered by the first tier that can."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from hal.backend import Backend, Probe
from hal.spec.capability import Capabilities, plain_dense
from hal.spec.errors import SpecError, UnsupportedError

if TYPE_CHECKING:
    from hal.ep.engine import EpEngine
    from hal.portable.mla import OnEachDevice
    from hal.spec.ep import EpBufferArgs
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs
    from hal_cuda.tiers import Tier


class Planned:
    """A plan: its arguments, and the schedule of each tier that decoded with it so far.

    The tier that plans is nearly always the one that decodes; where strides or alignment of a call are beyond it, the
    next one makes its own schedule, once.
    """

    __slots__ = ("_made", "args")

    def __init__(self, args: MlaPlanArgs) -> None:
        self.args = args
        self._made: dict[str, object] = {}

    def of(self, tier: Tier) -> object:
        """The schedule of a tier."""
        if tier.name not in self._made:
            self._made[tier.name] = tier.plan(self.args)
        return self._made[tier.name]


class CudaBackend(Backend):
    """MLA decode on GPUs of compute capability 7.0 and later.

    ``HAL_CUDA_TIER`` forces one of `hal_cuda.tiers.ORDER`.
    """

    spec_version: ClassVar[str] = "1.0"
    priority: ClassVar[int] = 100

    @cached_property
    def _loaded(self) -> tuple[list[Tier], dict[str, str]]:
        # Imported late: making a CudaBackend must load neither torch nor a compiler.
        from hal_cuda import tiers

        return tiers.load()

    @property
    def tiers(self) -> list[Tier]:
        """Those that can be used here, best first."""
        return self._loaded[0]

    def probe(self) -> Probe:
        """Look for driver, device and compilers, in the order in which they are needed."""
        from hal_cuda import devices

        found = devices.look()
        try:
            usable, out = self._loaded
        except SpecError as error:
            return Probe(False, str(error), f"unset {error.argument}", details=found.details)
        details = found.details | {"tiers": ", ".join(tier.name for tier in usable) or "none"}
        details |= {f"tier {name}": f"out: {reason}" for name, reason in out.items()}
        if not found.usable:
            return Probe(False, found.reason, found.fix, details=details)
        if not usable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in out.items())
            return Probe(False, f"no kernels can be compiled ({reasons})", "pip install triton", details=details)
        return Probe(True, found.reason, details=details)

    def capabilities(self) -> Capabilities:
        """Dense decode of plain caches, and expert parallelism. Packed caches and chosen tokens are not written yet."""
        from hal.portable import ep

        declared = plain_dense(("bfloat16", "float16"))
        return Capabilities(device_types=("cuda",), mla_dense=declared, mla_sparse=None, ep=ep.capabilities("ipc"))

    def mla_plan(self, args: MlaPlanArgs) -> object:
        """Let the tier that will decode make its schedule."""
        planned = Planned(args)
        planned.of(self._tier(args))
        return planned

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """Decode with the first tier that can, on torch's current stream."""
        tier, planned = self._tier(args), args.schedule
        tier.decode(args, planned.of(tier) if isinstance(planned, Planned) else None)

    @cached_property
    def _sharing(self) -> OnEachDevice:
        from hal.portable.mla import OnEachDevice
        from hal_cuda import driver

        return OnEachDevice(driver.CudaDevice)

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        """Open windows to the other ranks of the node, over the runtime's handles for other processes."""
        from hal.portable import ep

        device = self._sharing.on(args.device.index or 0).device
        return ep.open_engine(args, device, "cuda")  # type: ignore[arg-type]

    def launches(self) -> Mapping[str, int]:
        """Of all tiers, and of expert parallelism."""
        found = dict(self._sharing.launches()) if "_sharing" in self.__dict__ else {}
        for tier in self.tiers:
            found |= tier.launches()
        return found

    def _tier(self, args: MlaPlanArgs | MlaDecodeArgs) -> Tier:
        refusals = []
        for tier in self.tiers:
            reason = tier.supports(args)
            if not reason:
                return tier
            refusals.append(f"{tier.name}: {reason}")
        raise UnsupportedError("cuda", "q", "; ".join(refusals), "what one of the usable tiers can do")
