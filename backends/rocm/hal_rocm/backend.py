"""`RocmBackend`: the portable kernels on AMD Instinct, through hip-python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hal.portable.bound_backend import BoundBackend

if TYPE_CHECKING:
    from hal.portable.bound_backend import Vendor

OF_HYGON: Final = ("gfx926", "gfx928", "gfx936", "gfx938")


class RocmBackend(BoundBackend):
    """For tensors of ROCm's torch, or of the host in simulation (``HAL_SIM=hip:gfx942``)."""

    def __init__(self) -> None:
        super().__init__(vendor)


def vendor() -> Vendor:
    """What is AMD's of the backend."""
    from hal.portable.bindings import Bindings, Torch, Tuning
    from hal.portable.bound_backend import Vendor

    return Vendor(
        name="rocm",
        torch=Torch("cuda", "cuda_stream"),
        tunings={
            "gfx90a": Tuning(groups=2, local_bytes=32 << 10),
            "gfx942": Tuning(groups=2, local_bytes=32 << 10),
            "gfx950": Tuning(groups=2, local_bytes=64 << 10),
        },
        bindings=lambda: Bindings(
            prefix="hip",
            package="hip",
            runtime="hip",
            compiler="hiprtc",
            home="ROCM_PATH",
            names=("libamdhip64.so", "libhiprtc.so"),
            properties="hipGetDevicePropertiesR0600",
        ),
        refusal=_refusal,
        torch_is_out=_torch_is_out,
        fix="install ROCm 6 or later (libamdhip64.so, libhiprtc.so; ROCM_PATH says where) and pip install hip-python",
    )


def _refusal(architecture: str, simulated: bool) -> str:
    if architecture in OF_HYGON:
        return f"{architecture} is a Hygon DCU: install hal-dcu"
    if architecture not in ("gfx90a", "gfx942", "gfx950"):
        return f"{architecture} is none of gfx90a, gfx942 and gfx950"
    return ""


def _torch_is_out() -> str:
    import torch

    if torch.version.hip is None:
        return f"torch {torch.__version__} is not built for ROCm"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no device"
