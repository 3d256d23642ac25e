"""The tier of `hal.portable.kernels`: the source all vendors share, compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hal.portable.mla import OnEachDevice
from hal.spec.errors import DeviceError, first_line
from hal_cuda import calls, compiler, driver

if TYPE_CHECKING:
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs


class PortableTier:
    """Takes every call and needs neither Triton nor tensor cores; float32 multiply-adds set its pace."""

    name = "portable"

    def __init__(self) -> None:
        self._kernels = OnEachDevice(driver.CudaDevice)

    def missing(self) -> str:
        """Whether cupy is there, and the compiler it calls."""
        reason = calls.missing()
        if reason:
            return reason
        try:
            compiler.version()
        except DeviceError as error:
            return first_line(error)
        return ""

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Everything the backend declares."""
        return ""

    def plan(self, args: MlaPlanArgs) -> object:
        """As `PortableMla.plan`."""
        return self._kernels.on(args.geometry.device.index).plan(args)

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        """As `PortableMla.decode`."""
        self._kernels.on(args.q.device.index).decode(args, schedule)  # type: ignore[arg-type]

    def launches(self) -> Mapping[str, int]:
        """Over all devices."""
        return self._kernels.launches()
