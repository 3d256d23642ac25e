"""The kernels compiled for chips that are not here, by compilers that need no device; the machine code is read."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from compile_offline import tile
from hal_rocm.backend import vendor

pytest.importorskip("hip", reason="hip-python is not installed")

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libamdhip64.so.5")
ARCHITECTURES = ("gfx90a", "gfx906")
# Of the instructions' first words: what they are, and the bits that say so (the rest is offsets and caching).
WIDE = {
    "global_load_dwordx4": (0xDC5C8000, 0xFFFCE000),
    "ds_read_b128": (0xD9FE0000, 0xFFFE0000),
    "ds_write_b128": (0xD9BE0000, 0xFFFE0000),
}


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the machine code is, and what was printed; hip-python keeps the library it loads first, hence a process."""
    if not LIBRARY.exists():
        pytest.skip("no ROCm library that compiles without a device (apt-get install libamdhip64-5)")
    folder = tmp_path_factory.mktemp("code")
    line = [sys.executable, str(Path(__file__).with_name("compile_offline.py")), str(LIBRARY), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "HAL_SIM"}
    done = subprocess.run([*line, *ARCHITECTURES], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def words(code: bytes) -> list[int]:
    """Of the section of instructions."""
    start, size, count, names = *struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HHH", code, 58)
    sections = [struct.unpack_from("<IIQQQQ", code, start + size * number) for number in range(count)]
    texts = code[sections[names][4] :]
    (text,) = (section for section in sections if texts[section[0] :].startswith(b".text\0"))
    return list(struct.unpack_from(f"<{text[5] // 4}I", code, text[4]))


def numbers(code: bytes, key: bytes) -> list[int]:
    """Of each kernel, in the notes of the code object: MessagePack, where a small number is a byte of its own."""
    found = re.findall(re.escape(key) + rb"(?:\xcc(.)|\xcd(..)|\xce(....)|([\x00-\x7f]))", code, re.S)
    return [int.from_bytes(next(filter(None, parts), b"\0"), "big") for parts in found]


@pytest.mark.sampled
@pytest.mark.long(8)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hiprtc_by_way_of_hip_python(architecture: str, offline: tuple[Path, str]) -> None:
    for name, kernels in {"decode": 2, "schedule": 1}.items():
        code = (offline[0] / f"{architecture}-{name}").read_bytes()
        assert numbers(code, b".vgpr_spill_count") == [0] * kernels
        # Nothing lies in scratch memory: scalars that are too many lie in lanes of vector registers.
        assert numbers(code, b".private_segment_fixed_size") == [0] * kernels
        local = numbers(code, b".group_segment_fixed_size")
        assert len(local) == kernels and max(local) <= vendor().tunings["gfx90a"].local_bytes
    found = words((offline[0] / f"{architecture}-decode").read_bytes())
    for name, (pattern, mask) in WIDE.items():
        assert any(word & mask == pattern for word in found), name


def test_a_library_that_is_too_old_is_told_what_it_lacks(offline: tuple[Path, str]) -> None:
    assert offline[1] == "the runtime's library lacks hipGetDevicePropertiesR0600\n"


@pytest.mark.long(3)
@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
def test_clang_for_newer_chips(architecture: str, tmp_path: Path) -> None:
    """Clang 19 to the end for gfx942; gfx950 is newer, so that its machine code is made by the LLVM within Triton."""
    clang = shutil.which("clang++-19")
    if clang is None:
        pytest.skip("clang 19 is not installed (apt-get install clang-19)")
    own = architecture == "gfx942"
    if not own:
        pytest.importorskip("triton", reason="triton is not installed")
    tuned = vendor().tunings[architecture].local_bytes
    sizes = tile(tuned)
    for source, kernels in ((sizes.decode(), 2), (sizes.schedule(), 1)):
        (tmp_path / "kernels.hip").write_text(source.text("hip"))
        line = [clang, "-x", "hip", "--offload-arch=gfx942", "--cuda-device-only", "-nogpulib", "-nogpuinc", "-O3"]
        line += ["-std=c++17", "-include", str(Path(__file__).with_name("freestanding.h")), "-S", "-o", "-"]
        line += [] if own else ["-emit-llvm"]
        made = subprocess.run([*line, str(tmp_path / "kernels.hip")], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[-3000:]
        code = made.stdout if own else by_triton(made.stdout, architecture)
        assert re.search(rf'\.amdgcn_target "amdgcn-amd-amdhsa-\w*-{architecture}"', code)
        for key in (".vgpr_spill_count", ".private_segment_fixed_size"):
            assert re.findall(rf"{key}:\s+(\d+)", code) == ["0"] * kernels, key
        local = [int(size) for size in re.findall(r"\.group_segment_fixed_size:\s+(\d+)", code)]
        assert len(local) == kernels and max(local) <= tuned
        if kernels == 2:
            assert all(name in code for name in WIDE)


def by_triton(module: str, architecture: str) -> str:
    """Assembly of a module that was made for another chip."""
    from triton._C.libtriton import llvm

    llvm.init_targets()
    module = re.sub(r'"target-cpu"="\w+"', f'"target-cpu"="{architecture}"', module)
    module = re.sub(r' "target-features"="[^"]*"', "", module)
    return str(llvm.translate_to_asm(module, "amdgcn-amd-amdhsa", architecture, "", [], True, False, False))
