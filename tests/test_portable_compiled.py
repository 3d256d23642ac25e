"""The portable kernels compiled for chips that are not here, of vendors whose compilers are libraries."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
import torch
from rtc import Rtc

from hal.portable import ep_kernels
from hal.portable.mla import Tile
from hal.portable.runtime import Facts, Source
from hal.spec.mla import MlaGeometry

USUAL = MlaGeometry(2, False, 1, 128, 1, 576, 512, 64, torch.bfloat16, "plain", False, False, torch.device("cpu"))
GEOMETRIES = {"usual": USUAL, "fp16, few rows": USUAL._replace(dtype=torch.float16, h_q=2)}


def sources(dialect: str, local_bytes: int, subgroup: int, geometry: MlaGeometry) -> list[Source]:
    tile = Tile.of(Facts("chip", "", dialect, 100, 3, local_bytes, subgroup), geometry)
    return [tile.decode(), tile.schedule()]


@pytest.fixture(scope="module")
def hiprtc() -> Rtc:
    try:
        return Rtc("libamdhip64.so.5", "hiprtc", "Code")
    except OSError as error:
        pytest.skip(f"hiprtc is not installed (apt-get install libamdhip64-5): {error}")


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("arch", ["gfx90a", "gfx906"])
def test_hiprtc(arch: str, name: str, hiprtc: Rtc) -> None:
    communicating = ep_kernels.every(torch.bfloat16) if name == "usual" else []
    for source in sources("hip", 64 << 10, 64, GEOMETRIES[name]) + communicating:
        code = hiprtc.compile(source.text("hip"), f"--gpu-architecture={arch}", "-std=c++17")
        assert code[:4] == b"\x7fELF"
        # Of each kernel, in the notes of the code object: a small number is a byte of its own.
        spills = re.findall(rb"\.vgpr_spill_count(.)", code, re.S)
        assert spills and set(spills) == {b"\0"}
        local = re.findall(rb"\.group_segment_fixed_size(.{3})", code, re.S)
        sizes = [int.from_bytes(found[1:], "big") if found[0] == 0xCD else found[0] for found in local]
        assert len(sizes) == len(spills) and max(sizes) <= 64 << 10


@pytest.fixture(scope="module")
def nvrtc() -> Rtc:
    """The last one that knows sm_70."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc-cu12") or []
        (library,) = (file.locate() for file in files if file.name == "libnvrtc.so.12")
        return Rtc(str(library), "nvrtc", "CUBIN")
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError) as error:
        pytest.skip(f"NVRTC 12 is not installed (pip install nvidia-cuda-nvrtc-cu12): {error}")


def test_nvrtc_for_a_chip_without_bf16(nvrtc: Rtc) -> None:
    for source in sources("cuda", 48 << 10, 32, USUAL):
        assert nvrtc.compile(source.text("cuda"), "-arch=sm_70", "-std=c++17")[:4] == b"\x7fELF"


def test_nvrtc_for_expert_parallelism(nvrtc: Rtc) -> None:
    for arch, sources in (("sm_70", ep_kernels.every(torch.bfloat16)), ("sm_90", ep_kernels.every())):
        for source in sources:
            assert nvrtc.compile(source.text("cuda"), f"-arch={arch}", "-std=c++17")[:4] == b"\x7fELF"
