"""The tier of `hal.portable.triton`: tensor-core kernels for every architecture from sm_80 on."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from hal.spec.errors import first_line
from hal.spec.plan import MlaPlanArgs
from hal_cuda.devices import architecture

if TYPE_CHECKING:
    from hal.portable.triton.mla import TritonMla
    from hal.spec.mla import MlaDecodeArgs

_LEAST: Final = (8, 0)
"""Compute capability from which it serves: matrix instructions of bf16 and asynchronous copies begin there."""

_LEAST_TRITON: Final = (3, 6)
"""The oldest whose compiler the kernels were run with."""


class TritonTier:
    """Compiles at the first call of each kind; Triton keeps what it compiled on disk."""

    name = "triton"

    def __init__(self) -> None:
        self._kernels: dict[int, TritonMla] = {}

    @cached_property
    def _old(self) -> frozenset[int]:
        """Devices that it does not serve."""
        count = torch.cuda.device_count()
        return frozenset(i for i in range(count) if torch.cuda.get_device_capability(i) < _LEAST)

    def missing(self) -> str:
        """Whether Triton is installed, and a device new enough if there is any."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        try:
            import triton
        except Exception as error:  # a package may fail at its import in any way
            return f"triton does not import: {first_line(error)}"
        found = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
        if found < _LEAST_TRITON:
            return f"triton {triton.__version__} is too old: {'.'.join(map(str, _LEAST_TRITON))} or later is needed"
        try:
            old = len(self._old)
            return "no device of compute capability 8.0" if old and old == torch.cuda.device_count() else ""
        except RuntimeError as error:
            return f"the driver refuses: {first_line(error)}"

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Everything the backend declares, on a device that is new enough."""
        device = args.geometry.device if isinstance(args, MlaPlanArgs) else args.q.device
        return "the device is not of compute capability 8.0" if device.index in self._old else ""

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
