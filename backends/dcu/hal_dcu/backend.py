"""`DcuBackend`: the portable kernels on Hygon DCUs, through hip-python over the libraries of DTK."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hal.portable.bound_backend import BoundBackend
from hal.spec.errors import BackendUnavailable

if TYPE_CHECKING:
    from hal.portable.bindings import Bindings
    from hal.portable.bound_backend import Vendor

HOME_ENV: Final = "DTK_HOME"
"""Folder of DTK; ``/opt/dtk`` if unset."""
_RUNTIME: Final = ("libgalaxyhip.so.5", "libgalaxyhip.so")
_COMPILER: Final = ("libhiprtc.so.5", "libhiprtc.so", *_RUNTIME)
"""Where there is no library of its own, the compiler is within the runtime's."""


class DcuBackend(BoundBackend):
    """For tensors of DTK's torch, or of the host in simulation (``HAL_SIM=hip:gfx936``)."""

    def __init__(self) -> None:
        super().__init__(vendor)


def vendor() -> Vendor:
    """What is Hygon's of the backend."""
    from hal.portable.bindings import Torch, Tuning
    from hal.portable.bound_backend import Vendor

    chips = ("gfx906", "gfx926", "gfx928", "gfx936")
    return Vendor(
        name="dcu",
        torch=Torch("cuda", "cuda_stream"),
        tunings=dict.fromkeys(chips, Tuning(groups=2, local_bytes=32 << 10)),
        bindings=bindings,
        refusal=_refusal,
        torch_is_out=_torch_is_out,
        fix=f"install DTK ({HOME_ENV} says where, /opt/dtk if unset) and pip install hip-python",
    )


def bindings() -> Bindings:
    """hip-python, given DTK's libraries under the names it looks for.

    Raises
    ------
    BackendUnavailable
        There is no DTK.
    """
    from hal.portable import sim
    from hal.portable.bindings import Bindings

    names = ("libamdhip64.so", "libhiprtc.so")
    files = {} if sim.asked("hip") else dict(zip(names, (_found(_RUNTIME), _found(_COMPILER)), strict=True))
    return Bindings(
        prefix="hip",
        package="hip",
        runtime="hip",
        compiler="hiprtc",
        home="ROCM_PATH",
        names=names,
        properties="hipGetDevicePropertiesR0600",
        files=files,
    )


def _found(names: tuple[str, ...]) -> str:
    home = Path(os.environ.get(HOME_ENV) or "/opt/dtk")
    for name in names:
        for folder in (home / "hip" / "lib", home / "lib"):
            if (folder / name).exists():
                return str(folder / name)
    raise BackendUnavailable(f"no DTK: {names[0]} is neither in {home / 'hip' / 'lib'} nor in {home / 'lib'}")


def _refusal(architecture: str, simulated: bool) -> str:
    if architecture in ("gfx926", "gfx928", "gfx936"):
        return ""
    if architecture == "gfx906":
        # AMD has chips of that name too, but DTK drives only Hygon's.
        return "gfx906 in simulation is AMD's: install hal-rocm, or simulate gfx936" if simulated else ""
    return f"{architecture} is an AMD card, no Hygon DCU: install hal-rocm"


def _torch_is_out() -> str:
    import torch

    if torch.version.hip is None:
        return f"torch {torch.__version__} is not the one of DTK"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no device"
