"""The portable tier without a device: compiled by NVRTC, its machine code read, its driver played by the host."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import decode_args, plan_args
from hal_cuda import calls, compiler, driver, launching, portable_tier

from hal.portable import ep_kernels
from hal.portable.direct import kernels as direct
from hal.portable.host import HostDevice
from hal.portable.mla import Tile
from hal.portable.runtime import Facts, Source, Words
from hal.reference.mla import mla_decode
from hal.spec.errors import CompileError, DeviceError
from hal.spec.mla import MlaGeometry

cupy = pytest.importorskip("cupy", reason="cupy is not installed")

USUAL = MlaGeometry(2, False, 1, 128, 1, 576, 512, 64, torch.bfloat16, "plain", False, False, torch.device("cuda:0"))
CALLS = {
    "usual": USUAL,
    "fp16, few heads": USUAL._replace(dtype=torch.float16, h_q=1),
    "narrow": USUAL._replace(head_dim=64, head_dim_v=64),
    "V as wide as K": USUAL._replace(head_dim_v=576),
}
BUILDS = [("sm_75", "usual"), ("sm_80", "usual"), ("sm_90", "usual"), ("sm_90", "fp16, few heads")]
if os.environ.get("HAL_COMPILE") == "all":
    BUILDS = [(arch, name) for arch in ("sm_75", "sm_80", "sm_90", "sm_100") for name in CALLS]


# Of a processor, of which a group is not given all.
_SHARED = {"sm_75": 64 << 10, "sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled here and now, not found from an earlier run."""
    folder = str(tmp_path_factory.mktemp("kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiler.CACHE_ENV, folder)
        patch.setenv("HAL_KERNEL_CACHE", folder)
        yield


def dumped(what: str, cubin: bytes, folder: Path) -> str:
    """What machine code is, as the tools that Triton brings along tell it."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (folder / "kernel.cubin").write_bytes(cubin)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tools / "cuobjdump", f"--dump-{what}", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, f"cuobjdump ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def resources(cubin: bytes, folder: Path) -> dict[str, dict[str, int]]:
    """Of each kernel."""
    said = dumped("resource-usage", cubin, folder)
    found = re.findall(r"Function (\w+):\s*(.*)", said)
    assert found, f"no kernels in {said!r}"
    return {name: {key: int(n) for key, n in re.findall(r"\b([A-Z]+):(\d+)", line)} for name, line in found}


def instructions(source: Source, arch: str, folder: Path) -> str:
    """The machine code of a file's kernels."""
    return dumped("sass", compiler.compile_text(source.text("cuda"), Path(source.path), arch), folder)


@pytest.mark.parametrize(("arch", "name"), BUILDS)
def test_it_compiles_and_spills_nothing(arch: str, name: str, tmp_path: Path) -> None:
    tile = Tile.of(Facts(arch, "NVRTC", "cuda", 132, 3, 48 << 10, 32), CALLS[name])
    source = tile.decode()
    used = resources(compiler.compile_text(source.text("cuda"), Path(source.path), arch), tmp_path)
    assert set(used) == {"mla_decode", "mla_merge"}
    for kernel in used.values():
        assert (kernel["STACK"], kernel["LOCAL"]) == (0, 0)
        assert kernel["SHARED"] <= 48 << 10
        assert kernel["REG"] * tile.threads * driver.groups(arch) <= 65536
        assert kernel["SHARED"] * driver.groups(arch) <= _SHARED[arch]
    source = tile.schedule()
    used = resources(compiler.compile_text(source.text("cuda"), Path(source.path), arch), tmp_path)
    assert used["mla_schedule"]["STACK"] == 0


def test_columns_are_loaded_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    source = Tile.of(Facts("sm_90", "NVRTC", "cuda", 132, 3, 48 << 10, 32), USUAL).decode()
    code = instructions(source, "sm_90", tmp_path)
    assert "LDG.E.128" in code and "LDS.128" in code and "STS.128" in code


def test_a_compile_error_names_the_kernel_file_and_line(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.h"
    wrong.write_text("HAL_KERNEL(8)\nvoid wrong(HAL_GLOBAL float *to) { to[0] = valve; }\n")
    source = Source((str(wrong),), ())
    with pytest.raises(CompileError) as caught:
        compiler.compile_text(source.text("cuda"), Path(source.path), "sm_90")
    assert f"{wrong}(2)" in caught.value.log and caught.value.source_path == str(wrong)


@pytest.mark.parametrize("threads", [64, ep_kernels.WIDE])
def test_rows_go_over_windows_sixteen_bytes_at_a_time_several_at_once(threads: int, tmp_path: Path) -> None:
    code = instructions(ep_kernels.copies(16, threads), "sm_90", tmp_path)
    # Of rows, and of the list; none through the cache of constants, which is blind to what peers write.
    assert set(re.findall(r"\b(?:LD|ST)G?\.\S+", code)) == {"LDG.E", "LDG.E.128", "STG.E.128"}
    # All loads of a turn are under way before its first store waits for one.
    kinds = re.findall(r"\b(LDG|STG)\.E\.128", code)
    assert kinds and kinds == (["LDG"] * 4 + ["STG"] * 4) * (len(kinds) // 8)


def test_flags_are_released_and_acquired_for_the_whole_system(tmp_path: Path) -> None:
    code = instructions(ep_kernels.FLAGS, "sm_90", tmp_path)
    signal, wait = (code.split(f"Function : {name}\n")[1].split("Function :")[0] for name in ("ep_signal", "ep_await"))
    ordering = re.compile(r"\b(?:LDG|STG|MEMBAR|CCTL)\.\S+")
    assert ordering.findall(signal) == ["MEMBAR.ALL.SYS", "STG.E.STRONG.SYS"]
    # What was loaded before, and may lie in a cache, is not what is loaded after.
    assert ordering.findall(wait) == ["LDG.E.STRONG.SYS", "CCTL.IVALL"] * 2 + ["STG.E"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_of_expert_parallelism_spill_nothing(arch: str, tmp_path: Path) -> None:
    for source in ep_kernels.every(torch.bfloat16):
        for kernel in resources(compiler.compile_text(source.text("cuda"), Path(source.path), arch), tmp_path).values():
            assert (kernel["STACK"], kernel["LOCAL"]) == (0, 0), source


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_of_ranks_that_meet_on_their_devices_spill_nothing(arch: str, tmp_path: Path) -> None:
    for source in direct.every(torch.bfloat16):
        used = resources(compiler.compile_text(source.text("cuda"), Path(source.path), arch), tmp_path)
        for name, kernel in used.items():
            # What ep_announce tells is an array that its loop is unrolled over.
            assert (kernel["STACK"], kernel["LOCAL"]) == (0, 0), (source, name)
            assert kernel["SHARED"] <= 48 << 10


def test_rows_of_peers_are_fetched_many_words_at_once(tmp_path: Path) -> None:
    (fetch,) = (one for one in direct.every() if one.files[-1] == "ep_fetch.h" and ("THREADS", 64) in one.flags)
    kinds = re.findall(r"\b(LDG|STG)\.E\.128", instructions(fetch, "sm_90", tmp_path))
    assert kinds and kinds == (["LDG"] * 8 + ["STG"] * 8) * (len(kinds) // 16)
    code = instructions(direct.gathers(torch.bfloat16, 8), "sm_90", tmp_path)
    assert len(re.findall(r"LDG\.E\.128", code)) >= 8 and "STG.E.128" in code
    # None through the cache of constants, which is blind to what peers write.
    assert "CONSTANT" not in code


def test_headers_are_released_after_their_words_and_acquired_before(tmp_path: Path) -> None:
    ordering = re.compile(r"\b(?:LDG|STG|MEMBAR|CCTL)\.\S+")
    sources = {one.files[-1]: one for one in direct.every() if ("THREADS", 64) in one.flags}
    announce = instructions(sources["ep_announce.h"], "sm_90", tmp_path).split("Function : ep_announce\n")[1]
    found = ordering.findall(announce.split("Function :")[0])
    assert found[-2:] == ["MEMBAR.ALL.SYS", "STG.E.STRONG.SYS"] and "STG.E" in found[:-2]
    wait = ordering.findall(instructions(sources["ep_await_all.h"], "sm_90", tmp_path))
    after = [wait[i + 1] for i, one in enumerate(wait) if one == "LDG.E.STRONG.SYS"]
    assert after and set(after) == {"CCTL.IVALL"} and wait[-2:] == ["MEMBAR.ALL.SYS", "STG.E.STRONG.SYS"]


class _PlayedModule:
    """`launching.Module` for kernels that were compiled for the host: the same calls, the same arguments."""

    def __init__(self, device: HostDevice, source: Source) -> None:
        self.device, self.program = device, device.build(source)
        self.calls: list[tuple[str, Any, Any]] = []

    def launch(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        assert grid[1:] == block[1:] == (1, 1)
        assert all(isinstance(a, (torch.Tensor, Words)) or a.dtype.kind in "if" for a in arguments)
        self.calls.append((kernel, grid, block))
        self.device.launch(self.program, kernel, grid[0], block[0], arguments)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[_PlayedModule]:
    """A card with five processors of architecture 9.0, whose kernels run on the host."""
    host, modules = HostDevice(subgroup=32), []

    def build(device: driver.CudaDevice, source: Source) -> driver.CudaProgram:
        assert device.facts.dialect == "cuda"
        modules.append(_PlayedModule(host, source))
        return driver.CudaProgram(source, modules[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(driver.CudaDevice, "build", build)
    monkeypatch.setattr(driver.CudaDevice, "empty", lambda device, size: host.empty(size))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    properties = types.SimpleNamespace(multi_processor_count=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=0))
    return modules


def test_the_tier_gives_the_reference_through_its_driver(played: list[_PlayedModule]) -> None:
    torch.manual_seed(0)
    tier = portable_tier.PortableTier()
    lengths = torch.tensor([700, 70], dtype=torch.int32)
    table = torch.randperm(24).to(torch.int32).view(2, 12)
    args = decode_args(
        q=(torch.randn(2, 1, 16, 64) / 10).bfloat16(),
        kv_cache=(torch.randn(24, 64, 1, 64) / 10).bfloat16(),
        block_table=table,
        cache_seqlens=lengths,
        head_dim_v=48,
    )
    tier.decode(args, None)
    out, lse = mla_decode(args.q, args.kv_cache, table, lengths, head_dim_v=48)
    assert (args.out.double() - out).abs().max() < 8e-4
    assert torch.allclose(args.lse.double(), lse, rtol=0, atol=1e-5)
    assert tier.launches() == {f"cuda:{name}@sm_90": 1 for name in ("mla_schedule", "mla_decode", "mla_merge")}
    (scheduled,) = next(module for module in played if module.calls[0][0] == "mla_schedule").calls
    assert scheduled[1:] == ((1, 1, 1), (64, 1, 1))


def test_a_plan_is_made_once_and_decodes_with_it_allocate_nothing(
    played: list[_PlayedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = portable_tier.PortableTier()
    planned, args = plan_args(), decode_args()
    planned = types.SimpleNamespace(**{name: getattr(planned, name) for name in planned.__slots__})
    schedule = tier.plan(planned)  # type: ignore[arg-type]
    monkeypatch.setattr(driver.CudaDevice, "empty", lambda device, size: pytest.fail("memory was asked for"))
    for _ in range(2):
        tier.decode(args, schedule)
    assert tier.launches()["cuda:mla_schedule@sm_90"] == 1 and tier.launches()["cuda:mla_decode@sm_90"] == 2


def test_a_thread_that_has_no_context_gets_one_before_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever touched no runtime call has none, and a launch without one fails."""
    order: list[str] = []
    monkeypatch.setattr(
        cupy.cuda, "runtime", types.SimpleNamespace(setDevice=lambda index: order.append(f"set {index}"))
    )
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", lambda *given: order.append("launched"), raising=False)
    module = launching.Module(b"", 1)
    module._functions["kernel"] = types.SimpleNamespace(ptr=5)
    module._module = object()
    here = [0]
    monkeypatch.setattr(calls, "_DEVICE", lambda: here[0])
    monkeypatch.setattr(calls, "_seen", threading.local())
    launch = lambda: module.launch("kernel", (1, 1, 1), (32, 1, 1), [])  # noqa: E731
    launch()
    assert order == ["set 1", "launched"]
    # It has one as long as it stays; elsewhere it had another.
    here[0] = 1
    launch()
    here[0] = 0
    launch()
    assert order[2:] == ["launched", "set 1", "launched"]
    with ThreadPoolExecutor(1) as other:
        here[0] = 1
        other.submit(launch).result()
    assert order[5:] == ["set 1", "launched"]


def test_memory_that_is_not_there_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceError, match=r"of 1099511627776 bytes: CUDA out of memory\. Tried"):
        driver.CudaDevice(0).empty(1 << 40)


def test_times_are_kept_only_where_they_were_asked_for() -> None:
    with pytest.raises(DeviceError, match="timed=True"):
        driver.CudaEvent(None, None, 0).seconds()


def test_a_compiler_that_does_not_load_is_the_reason_why_it_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file\nmore")

    assert portable_tier.PortableTier().missing() == ""
    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", absent)
    assert "libnvrtc.so.13: cannot open" in portable_tier.PortableTier().missing()
