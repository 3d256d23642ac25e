"""The tier of `hal.portable.triton`: tensor-core kernels for every architecture from sm_80 on."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch

from hal_cuda.devices import architecture

if TYPE_CHECKING:
    from hal.portable.triton.mla import TritonMla
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

_DTYPES: Final = (torch.bfloat16, torch.float16)


class TritonTier:
    """Compiles at the first call of each kind; Triton keeps what it compiled on disk."""

    name = "triton"

    def __init__(self) -> None:
        self._kernels: dict[int, TritonMla] = {}

    def missing(self) -> str:
        """Whether Triton is installed."""
        return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Everything the backend declares."""
        return ""

    def plan(self, args: MlaPlanArgs) -> object:
        """As `TritonMla.plan`."""
        with torch.cuda.device(args.geometry.device):
            return self._on(args.geometry.device).plan(args)

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        """As `TritonMla.decode`."""
        device = args.q.device
        kernels = self._on(device)
        if device.index == torch.cuda.current_device():
            kernels.decode(args, schedule)  # type: ignore[arg-type]
        else:
            with torch.cuda.device(device):
                kernels.decode(args, schedule)  # type: ignore[arg-type]

    def launches(self) -> Mapping[str, int]:
        """Over all devices."""
        found: Counter[str] = Counter()
        for kernels in self._kernels.values():
            found.update({f"triton:{name}@{kernels.arch}": count for name, count in kernels.launches.items()})
        return found

    def _on(self, device: torch.device) -> TritonMla:
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._kernels:
            from hal.portable.triton.mla import TritonMla

            found = torch.cuda.get_device_properties(index)
            self._kernels[index] = TritonMla(architecture(index), found.multi_processor_count)
        return self._kernels[index]
