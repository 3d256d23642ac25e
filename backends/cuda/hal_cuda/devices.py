"""What is on this machine: driver, torch, devices, versions. Nothing here raises for what may be absent."""

from __future__ import annotations

import ctypes
import importlib.metadata
from dataclasses import dataclass, field
from typing import Final

import torch

from hal.spec.errors import first_line

LEAST: Final = (7, 0)
"""Compute capability from which any kernels run: shuffles and the memory model they count on begin there."""

_DRIVER: Final = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the machine gave.

    Attributes
    ----------
    reason : str
        The device, or what is missing.
    fix : str
        What to do about it; empty where ``usable``.
    usable : bool
    details : dict of str to str
    """

    reason: str
    fix: str = ""
    usable: bool = False
    details: dict[str, str] = field(default_factory=dict)


def architecture(index: int) -> str:
    """``sm_90`` for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def versions() -> dict[str, str]:
    """Of the packages that matter, ``missing`` for those that are not installed."""
    names = {"triton": ("triton",), "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
    found = {"torch": torch.__version__, "torch CUDA": torch.version.cuda or "none"}
    return found | {label: _first_version(packages) for label, packages in names.items()}


def look() -> Found:
    """Look for the driver, for a torch that can use it, and for a device that is new enough, in this order."""
    details = versions()
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        reason = f"no NVIDIA driver: {_DRIVER} does not load"
        return Found(reason, "install the NVIDIA driver, or run where the GPU is passed through", details=details)
    details["driver"] = _driver_version(driver)
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        return Found(reason, "install a torch built for CUDA: see https://pytorch.org/get-started", details=details)
    try:
        count = torch.cuda.device_count()
        ready = count > 0 and torch.cuda.is_available()
        if ready:
            details |= {f"device {i}": _describe(i) for i in range(count)}
    except RuntimeError as error:
        return Found(f"the driver refuses: {first_line(error)}", "see what nvidia-smi says", details=details)
    if not ready:
        return Found("the driver shows no device", "see nvidia-smi and CUDA_VISIBLE_DEVICES", details=details)
    major, minor = torch.cuda.get_device_capability(0)
    name = torch.cuda.get_device_name(0)
    if (major, minor) < LEAST:
        need = ".".join(map(str, LEAST))
        return Found(f"{name} has compute capability {major}.{minor}, the kernels need {need}", details=details)
    return Found(f"{name}, {architecture(0)}, driver {details['driver']}", usable=True, details=details)


def _describe(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return f"{found.name}, {architecture(index)}, {found.multi_processor_count} processors, {memory:.0f} GiB"


def _driver_version(driver: ctypes.CDLL) -> str:
    """The newest CUDA the driver knows, as ``13.0``."""
    number = ctypes.c_int()
    if not hasattr(driver, "cuDriverGetVersion") or driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return "of unknown version"
    return f"for CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _first_version(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "missing"
