"""The tier of `hal.portable.kernels`: the source all vendors share, compiled by NVRTC."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hal_cuda import driver

if TYPE_CHECKING:
    from hal.portable.mla import PortableMla
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs


class PortableTier:
    """Takes every call and needs neither Triton nor tensor cores; float32 multiply-adds set its pace."""

    name = "portable"

    def __init__(self) -> None:
        self._kernels: dict[int, PortableMla] = {}

    def missing(self) -> str:
        """Whether cupy is there, which brings the compiler's interface."""
        if importlib.util.find_spec("cupy") is None:
            return "cupy is not installed"
        return driver.missing()

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Everything the backend declares."""
        return ""

    def plan(self, args: MlaPlanArgs) -> object:
        """As `PortableMla.plan`."""
        return self._on(args.geometry.device).plan(args)

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        """As `PortableMla.decode`."""
        self._on(args.q.device).decode(args, schedule)  # type: ignore[arg-type]

    def launches(self) -> Mapping[str, int]:
        """Over all devices."""
        found: dict[str, int] = {}
        for kernels in self._kernels.values():
            for name, count in kernels.device.launches().items():
                found[name] = found.get(name, 0) + count
        return found

    def _on(self, device: torch.device) -> PortableMla:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._kernels:
            from hal.portable.mla import PortableMla

            self._kernels[index] = PortableMla(driver.CudaDevice(index))
        return self._kernels[index]
