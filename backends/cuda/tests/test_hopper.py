"""The Hopper kernel without a Hopper: compiled by NVRTC, its machine code read, its tier asked what it takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import decode_args
from hal_cuda import calls
from hal_cuda.hopper import launch, lib, tier

from hal.spec.mla import MlaGeometry, check_decode

MOST_SHARED = 227 * 1024
DTYPES = [torch.bfloat16, torch.float16]
USUAL = MlaGeometry(2, False, 1, 128, 1, 576, 512, 64, torch.bfloat16, "plain", False, False, torch.device("cuda:0"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CUDA_CACHE", str(tmp_path))


def dump(cubin: bytes, folder: Path, what: str) -> str:
    """Read machine code by what Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}  # cuobjdump calls nvdisasm
    command = [tools / "cuobjdump", what, path]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def assembly(cubin: bytes, folder: Path) -> str:
    return dump(cubin, folder, "--dump-sass")


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    said = dump(cubin, folder, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_multiplies_whole_warpgroups_loads_by_tma_and_spills_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    cubin = tier.compiled("decode", dtype)
    code = assembly(cubin, tmp_path)
    # A pair of steps: two times 9 tiles × 4 for the scores, four times 4 for the output.
    assert code.count("HGMMA.64x64x16") == 2 * 9 * 4
    assert code.count("HGMMA.64x256x16") == 4 * 4
    assert "BF16" in re.findall(r"HGMMA\.\S+", code)[0] or dtype is torch.float16
    # One thread of the loading warp issues, and the compiler knows it: a box is not issued in a loop over lanes.
    boxes = re.findall(r"(@!?UP\d)? *UTMALDG\.5D", code)
    assert boxes and all(boxes)
    assert not re.search(r"\b(LDL|STL)\b", code)
    used = resources(cubin, tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= 65536 // 384
    assert launch.SHARED_BYTES <= MOST_SHARED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["schedule", "merge"])
def test_schedule_and_merge_spill_nothing(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    used = resources(tier.compiled(name, dtype), tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def test_it_is_out_without_a_device() -> None:
    assert tier.HopperTier().missing()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> tier.HopperTier:
    """A tier that believes in a device."""
    monkeypatch.setattr(tier.HopperTier, "_devices", frozenset({0}))
    return tier.HopperTier()


def test_the_usual_geometry_is_taken(there: tier.HopperTier) -> None:
    assert there._geometry(USUAL) == ""


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": torch.device("cuda:1")}, "capability"),
        ({"head_dim": 512}, "d 512"),
        ({"head_dim_v": 256}, "head_dim_v 256"),
        ({"dtype": torch.float32}, "bf16"),
        ({"kv_format": "v32"}, "bf16"),
        ({"page_size": 4}, "pages of 4"),
        ({"page_size": 48}, "pages of 48"),
        ({"page_size": 96}, "pages of 96"),
        ({"ragged_q": True}, "ragged"),
        ({"batch_invariant": True}, "batch_invariant"),
        ({"batch": 70000}, "65535"),
    ],
)
def test_what_it_cannot_do_it_says(there: tier.HopperTier, change: dict[str, object], word: str) -> None:
    assert word in there._geometry(USUAL._replace(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 192, 256])
def test_pages_that_tile_a_step_or_are_tiled_by_it(there: tier.HopperTier, page_size: int) -> None:
    assert there._geometry(USUAL._replace(page_size=page_size)) == ""


def layout(q: torch.Tensor, kv_cache: torch.Tensor) -> str:
    table, lengths = torch.zeros((2, 3), dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    arguments = (q, kv_cache, table, lengths, 512, None, False, *[None] * 9, "e", False)
    return tier._layout(check_decode(*arguments))  # type: ignore[arg-type]


def test_tensors_that_the_copy_engine_cannot_address_are_left_to_another_tier() -> None:
    q = torch.zeros((2, 1, 16, 576), dtype=torch.bfloat16)
    cache = torch.zeros((4, 64, 1, 576), dtype=torch.bfloat16)
    assert layout(q, cache) == ""
    assert "without pages" in layout(q, cache[:0])
    odd = torch.zeros(4 * 64 * 577, dtype=torch.bfloat16).as_strided((4, 64, 1, 576), (64 * 577, 577, 577, 1))
    assert "kv_cache" in layout(q, odd)
    assert "strides" in layout(q, cache[:1].expand(4, -1, -1, -1))
    shifted = torch.zeros(2 * 16 * 576 + 1, dtype=torch.bfloat16)[1:].view(2, 1, 16, 576)
    assert "q" in layout(shifted, cache)


def test_threads_that_launch_at_once_do_not_take_each_others_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[int, int]] = []

    class Driver:
        def cuLaunchKernelEx(self, config: Any, handle: Any, pointers: Any, extra: None) -> int:  # noqa: N802
            time.sleep(1e-6)
            told = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_int))[0]
            if (config._obj.grid[0], config._obj.stream) != (told, told):
                wrong.append((told, config._obj.grid[0]))
            return 0

    monkeypatch.setattr(lib, "_library", Driver)
    kernel = lib.Kernel(1, "decode", 384)

    def launch(number: int) -> None:
        for _ in range(500):
            kernel((number, 1, 1), number, ctypes.c_int(number))

    threads = [threading.Thread(target=launch, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_has_no_context_gets_one_before_it_launches(
    there: tier.HopperTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that takes memory from torch's cache alone has none, and a launch without one fails."""
    import cupy

    ready: set[int] = set()
    launched: list[bool] = []

    class Launched:
        def __call__(self, *given: Any) -> None:
            launched.append(threading.get_ident() in ready)

    kernels = launch.Kernels(Launched(), Launched(), Launched())  # type: ignore[arg-type]
    runtime = types.SimpleNamespace(setDevice=lambda index: ready.add(threading.get_ident()))
    monkeypatch.setattr(cupy.cuda, "runtime", runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index=None: types.SimpleNamespace(cuda_stream=0))
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(launch, "cache_maps", lambda *given: (None, None))
    monkeypatch.setattr(there, "_on", lambda device, dtype: kernels)
    q = torch.zeros((2, 1, 16, 576), dtype=torch.bfloat16)
    cache = torch.zeros((4, 64, 1, 576), dtype=torch.bfloat16)
    table, lengths = torch.zeros((2, 2), dtype=torch.int32), torch.full((2,), 70, dtype=torch.int32)
    args = decode_args(q=q, kv_cache=cache, block_table=table, cache_seqlens=lengths, head_dim_v=512)
    thread = threading.Thread(target=there.decode, args=(args, None))
    thread.start()
    thread.join()
    assert launched == [True] * 3


def test_kernels_are_loaded_once_and_told_how_much_shared_memory_they_take(
    there: tier.HopperTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[object] = []

    class Module:
        def load(self, cubin: bytes) -> None:
            log.append(cubin)

        def get_function(self, name: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(ptr=len(name))

    def attribute(handle: ctypes.c_void_p, number: int, size: int) -> int:
        log.append((handle.value, number, size))
        return 0

    library = types.SimpleNamespace(cuLaunchKernelEx=None, cuFuncSetAttribute=attribute)
    monkeypatch.setattr("cupy.cuda.function.Module", Module)
    monkeypatch.setattr(tier, "compiled", lambda name, dtype: name)
    monkeypatch.setattr(calls, "current", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(lib, "_library", lambda: library)
    for _ in range(2):
        there._on(torch.device("cuda:0"), torch.bfloat16)
    loads = [entry for entry in log if isinstance(entry, str)]
    assert sorted(loads) == ["decode", "merge", "schedule"]
    assert (len("decode"), lib._MAX_DYNAMIC_SHARED, launch.SHARED_BYTES) in log
