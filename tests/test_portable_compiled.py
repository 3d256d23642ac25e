"""The portable kernels compiled for chips that are not here, of vendors whose compilers are libraries."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import torch
from rtc import Rtc

from hal import portable
from hal.portable import ep_kernels
from hal.portable.direct import kernels as direct
from hal.portable.mla import ELEMENTS, Tile
from hal.portable.runtime import Facts, Source
from hal.spec.mla import MlaGeometry

USUAL = MlaGeometry(2, False, 1, 128, 1, 576, 512, 64, torch.bfloat16, "plain", False, False, torch.device("cpu"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALL = os.environ.get("HAL_COMPILE") == "all"
# Every kernel for every chip, in every dtype by each compiler; with HAL_COMPILE=all in every dtype for every chip.
CHIPS = {"sm_90": ("bf16", "fp16", "fp32"), "gfx90a": ("bf16", "fp32"), "gfx906": ("fp16",)}


def chips(*prefixes: str) -> list[tuple[str, str]]:
    """Chip and dtype of what is compiled for chips of these names."""
    there = [(chip, DTYPES if ALL else some) for chip, some in CHIPS.items() if chip.startswith(prefixes)]
    return [(chip, dtype) for chip, dtypes in there for dtype in dtypes]


def sources(dialect: str, local_bytes: int, subgroup: int, geometry: MlaGeometry) -> list[Source]:
    tile = Tile.of(Facts("chip", "", dialect, 100, 3, local_bytes, subgroup), geometry)
    return [tile.decode(), tile.schedule()]


def every(dialect: str, local_bytes: int, subgroup: int, dtype: torch.dtype) -> list[Source]:
    """MLA of many rows or of few, and expert parallelism."""
    heads = (128, 2) if ALL else (2,) if dtype == torch.float16 else (128,)
    shapes = [USUAL._replace(dtype=dtype, h_q=h_q) for h_q in heads]
    decode = [source for shape in shapes for source in sources(dialect, local_bytes, subgroup, shape)]
    return decode + ep_kernels.every(dtype) + direct.every(dtype)


def test_no_kernel_or_dtype_is_left_out() -> None:
    """Of what is there: whatever a chip has fewer of, another chip of the same compiler has."""
    files = {path.name for path in (Path(portable.__file__).parent / "kernels").iterdir()}
    for prefix in ("sm_", "gfx"):
        assert {dtype for _, dtype in chips(prefix)} == set(DTYPES)
    assert set(DTYPES.values()) == set(ELEMENTS)
    for chip, dtype in chips("sm_", "gfx"):
        compiled = every("hip", 64 << 10, 64, DTYPES[dtype])
        assert {name for source in compiled for name in source.files} == files, chip


@pytest.fixture(scope="module")
def hiprtc() -> Rtc:
    try:
        return Rtc("libamdhip64.so.5", "hiprtc", "Code")
    except OSError as error:
        pytest.skip(f"hiprtc is not installed (apt-get install libamdhip64-5): {error}")


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize(("chip", "dtype"), chips("gfx"))
def test_hiprtc(chip: str, dtype: str, hiprtc: Rtc) -> None:
    for source in every("hip", 64 << 10, 64, DTYPES[dtype]):
        code = hiprtc.compile(source.text("hip"), f"--gpu-architecture={chip}", "-std=c++17")
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
    communication = ep_kernels.every(torch.bfloat16) + direct.every(torch.bfloat16)
    for source in sources("cuda", 48 << 10, 32, USUAL) + communication:
        assert nvrtc.compile(source.text("cuda"), "-arch=sm_70", "-std=c++17")[:4] == b"\x7fELF"


@pytest.mark.sampled
@pytest.mark.long(2)
@pytest.mark.parametrize(("chip", "dtype"), chips("sm_"))
def test_nvrtc(chip: str, dtype: str, nvrtc: Rtc) -> None:
    for source in every("cuda", 48 << 10, 32, DTYPES[dtype]):
        assert nvrtc.compile(source.text("cuda"), f"-arch={chip}", "-std=c++17")[:4] == b"\x7fELF"
