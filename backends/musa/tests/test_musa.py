"""The MUSA backend and its OpenCL driver, on an OpenCL platform that runs on processors."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest
import torch
from conforming import conform
from hal_musa import backend as musa
from hal_musa import driver

from hal.portable import cache, ep, opencl
from hal.portable.ep_kernels import FLAGS, EpKernels
from hal.portable.mla import PortableMla
from hal.portable.runtime import Source
from hal.portable.shared import SharedMemory
from hal.reference.mla import mla_decode
from hal.spec.errors import BackendUnavailable, CompileError, DeviceError, SpecError
from hal.spec.mla import MlaDecodeArgs

pytest.importorskip("pyopencl", reason="pyopencl is not installed")

POCL = "Portable Computing Language"
# Those whose many sizes take long to compile are left to `hal conform`; what they are about is in the ones kept here.
CHOSEN = ("CAP-01", "CAP-02", "CAP-03", "CAP-04", "CAP-07", "MLA-01", "MLA-07", "MLA-20", "MLA-22", "MLA-24", "MLA-40")
CHOSEN += ("EPN-01", "EPL-01")


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In simulation, and compiled here and now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(musa.SIMULATE, "1")
        patch.setenv(opencl.PLATFORM_ENV, POCL)
        patch.setenv("POCL_CACHE_DIR", str(tmp_path_factory.mktemp("pocl")))
        patch.setenv(cache.ENV, str(tmp_path_factory.mktemp("kernels")))
        yield


def platform(name: str, vendor: str) -> opencl.Platform:
    return opencl.Platform(name, vendor, "OpenCL 3.0", None)


THERE = [platform(POCL, "The pocl project"), platform("MUSA", "Moore Threads"), platform("OpenCL", "Another Vendor")]


@pytest.mark.parametrize(
    ("there", "simulate", "wanted", "found"),
    [
        (THERE, "0", None, 1),
        (THERE, "0", "musa", 1),
        (
            THERE,
            "0",
            "pocl",
            "no OpenCL platform of Moore Threads or MThreads or MUSA and with HAL_OPENCL_PLATFORM=pocl",
        ),
        (THERE[::2], "0", None, "no OpenCL platform of Moore Threads"),
        (THERE, "1", None, "3 OpenCL platforms; there are: Portable Computing Language"),
        (THERE, "1", "POCL", 0),
        (THERE, "1", "another vendor", 2),
        (THERE[:1], "1", None, 0),
        (THERE[1:] + THERE[1:2], "0", None, "2 OpenCL platforms of Moore Threads"),
        ([], "1", None, "no OpenCL platform: install the vendor's OpenCL driver"),
    ],
)
def test_a_platform_is_chosen_by_vendor_and_name(
    there: list[opencl.Platform], simulate: str, wanted: str | None, found: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyopencl

    monkeypatch.setenv(musa.SIMULATE, simulate)
    monkeypatch.delenv(opencl.PLATFORM_ENV)
    if wanted:
        monkeypatch.setenv(opencl.PLATFORM_ENV, wanted)
    if there:
        monkeypatch.setattr(opencl, "platforms", lambda: there)
    else:
        monkeypatch.setattr(pyopencl, "get_platforms", list)
    if isinstance(found, int):
        assert musa.MusaBackend().opencl.platform is there[found]
        return
    with pytest.raises(BackendUnavailable) as caught:
        _ = musa.MusaBackend().opencl
    assert found in str(caught.value)
    probe = musa.MusaBackend().probe()
    assert not probe.available and found in probe.reason
    assert ("HAL_MUSA_SIMULATE=1" in probe.fix) == (simulate == "0")


def test_a_number_that_is_no_device_lists_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(opencl.DEVICE_ENV, "7²")
    probe = musa.MusaBackend().probe()
    assert not probe.available and "has these devices: 0: " in probe.reason


def test_a_word_that_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(musa.SIMULATE, "maybe")
    probe = musa.MusaBackend().probe()
    assert (probe.available, probe.fix) == (False, "unset HAL_MUSA_SIMULATE")


def test_a_runtime_that_is_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(driver.LIBRARY_ENV, "libnowhere.so")
    monkeypatch.setenv(musa.RUNTIME, "driver")
    assert "HAL_MUSA_RUNTIME=driver: no MUSA driver: libnowhere.so" in musa.MusaBackend().probe().reason
    monkeypatch.setenv(musa.RUNTIME, "opencl")
    assert musa.MusaBackend().probe().details["runtime driver"] == "out: HAL_MUSA_RUNTIME=opencl"
    monkeypatch.setenv(musa.RUNTIME, "abacus")
    assert musa.MusaBackend().probe().fix == "unset HAL_MUSA_RUNTIME"


def test_simulation_says_what_it_is() -> None:
    probe = musa.MusaBackend().probe()
    assert probe.available and probe.evidence == "simulation"
    assert POCL in probe.reason and "says nothing of a Moore Threads GPU" in probe.details["simulation"]


def test_a_backend_that_is_not_asked_imports_no_driver() -> None:
    code = "import sys, hal_musa.plugin as p; p.hal_backend(); print('pyopencl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.sampled
@pytest.mark.long(25)
def test_it_conforms() -> None:
    assert conform("musa", CHOSEN)["evidence"] == "simulation"


@pytest.fixture(scope="module")
def chosen() -> opencl.Platform:
    return opencl.choose()


@pytest.fixture(scope="module")
def discrete(chosen: opencl.Platform) -> opencl.OpenClDevice:
    """A device that says it has memory of its own."""
    return opencl.OpenClDevice(chosen, unified=False)


def decode_args(kv_cache: torch.Tensor, **changes: Any) -> MlaDecodeArgs:
    torch.manual_seed(1)
    arguments: dict[str, Any] = {
        "q": (torch.randn(2, 1, 16, 64) / 10).bfloat16(),
        "kv_cache": kv_cache,
        "block_table": torch.tensor([[3, 1], [0, 2]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([100, 3], dtype=torch.int32),
        "head_dim_v": 48,
    }
    return calls.decode_args(**(arguments | changes))


def agrees(args: MlaDecodeArgs) -> bool:
    assert args.block_table is not None and args.cache_seqlens is not None
    out, lse = mla_decode(args.q, args.kv_cache, args.block_table, args.cache_seqlens, head_dim_v=48)
    close = torch.allclose(args.out.double(), out, rtol=2 / 128, atol=8e-4)
    return close and torch.allclose(args.lse.double(), lse, atol=1e-5)


def cached(layers: int = 1) -> torch.Tensor:
    torch.manual_seed(2)
    return (torch.randn(layers, 4, 64, 1, 64) / 10).bfloat16()


def test_memory_of_its_own_is_filled_and_read_back(discrete: opencl.OpenClDevice) -> None:
    wide = torch.full((2, 1, 16, 100), 7.0).bfloat16()
    args = decode_args(cached()[0], out=wide[..., 10:58])
    PortableMla(discrete).decode(args, None)
    assert agrees(args)
    assert (wide[..., :10] == 7).all() and (wide[..., 58:] == 7).all()


def test_an_adopted_cache_is_copied_once_and_noticed_when_it_changes(
    discrete: opencl.OpenClDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, kernels = cached(2), PortableMla(discrete)
    adopted = discrete.adopt(kv)
    assert adopted is not None
    moved: list[int] = []
    copy = opencl.Adopted._copy

    def counted(adopted: opencl.Adopted, start: int, size: int) -> None:
        moved.append(size)
        copy(adopted, start, size)

    monkeypatch.setattr(opencl.Adopted, "_copy", counted)
    for layer in (0, 1):
        args = decode_args(kv[layer])
        kernels.decode(args, None)
        assert agrees(args)
    assert moved == []
    kv[1] *= 2
    kernels.decode(args := decode_args(kv[1]), None)
    assert agrees(args) and moved == [kv.nbytes]
    kv[1] *= 2
    adopted.update(1, 2)
    kernels.decode(args := decode_args(kv[1]), None)
    assert agrees(args) and moved == [kv.nbytes, kv[1].nbytes]
    adopted.release()
    assert not discrete.adopted
    kernels.decode(args := decode_args(kv[0]), None)
    assert agrees(args) and len(moved) == 2


@pytest.mark.parametrize("how", ["resize_", "set_", "storage"])
def test_a_tensor_that_was_given_other_memory_is_adopted_no_more(discrete: opencl.OpenClDevice, how: str) -> None:
    """Whatever lies where it lay is another tensor's."""
    kv, kernels = cached(), PortableMla(discrete)
    adopted, seen = discrete.adopt(kv), kv[0]
    assert adopted is not None
    other = -kv
    if how == "resize_":
        kv.resize_(1, 40, 64, 1, 64)[0, :4] = other[0]
    elif how == "set_":
        kv.set_(other)
        other *= 2  # a change that is not counted for kv
        seen.copy_(kv[0])
    else:
        kv.untyped_storage().resize_(2 * kv.nbytes)
    kernels.decode(args := decode_args(kv[0, :4]), None)
    assert agrees(args)
    kernels.decode(args := decode_args(seen), None)
    assert agrees(args) and not discrete.adopted
    with pytest.raises(SpecError, match="not adopted any more"):
        adopted.update(0, 1)
    adopted.release()
    again = discrete.adopt(kv)
    kernels.decode(args := decode_args(kv[0, :4]), None)
    assert agrees(args) and discrete.adopted == [again]
    assert again is not None
    again.release()


def test_memory_has_one_copy(discrete: opencl.OpenClDevice) -> None:
    """A tensor that is adopted twice has one; a part of it, or more than it, is refused."""
    kv, kernels = cached(3), PortableMla(discrete)
    part = discrete.adopt(kv[1])
    assert part is not None
    for overlapping in (kv, kv[:2], kv[1, 2:], kv[1].view(-1)):
        with pytest.raises(SpecError, match="memory that another adopted tensor has too"):
            discrete.adopt(overlapping)
    assert discrete.adopt(part.tensor) is part
    before, after = discrete.adopt(kv[0]), discrete.adopt(kv[2])
    part.release()
    part.release()
    assert discrete.adopted == [before, after]
    kv *= 2
    for layer in range(3):
        kernels.decode(args := decode_args(kv[layer]), None)
        assert agrees(args)
    for one in (before, after):
        assert one is not None
        one.release()


def test_a_tensor_of_nothing_is_adopted_like_others(discrete: opencl.OpenClDevice) -> None:
    nothing, kernels = torch.empty(0, 64, 1, 64, dtype=torch.bfloat16), PortableMla(discrete)
    adopted, more = discrete.adopt(nothing), discrete.adopt(torch.empty(0))
    assert adopted is not None and more is not None and more is not adopted
    adopted.update(0, 0)
    lengths = torch.zeros(2, dtype=torch.int32)
    kernels.decode(args := decode_args(nothing, cache_seqlens=lengths), None)
    assert not args.out.any() and args.lse.isposinf().all()
    nothing.resize_(4, 64, 1, 64).copy_(cached()[0])
    kernels.decode(args := decode_args(nothing), None)
    assert agrees(args)
    more.release()
    assert not discrete.adopted


@pytest.mark.parametrize("wrong", [torch.empty(4, device="meta"), torch.eye(2).to_sparse(), None, [1.0]])
def test_what_is_no_tensor_of_the_host_is_not_adopted(discrete: opencl.OpenClDevice, wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"tensor: got .*; legal: a strided tensor of the host"):
        discrete.adopt(wrong)


def test_what_torch_does_not_watch_is_not_adopted(discrete: opencl.OpenClDevice) -> None:
    with torch.inference_mode():
        unwatched = torch.zeros(4)
    with pytest.raises(SpecError, match="inference tensor"):
        discrete.adopt(unwatched)


def test_shared_memory_needs_no_copy(chosen: opencl.Platform) -> None:
    device = opencl.OpenClDevice(chosen, unified=True)
    assert device.adopt(cached()) is None
    args = decode_args(cached()[0])
    PortableMla(device).decode(args, None)
    assert agrees(args)


def source(folder: Path, body: str) -> Source:
    path = folder / "mine.h"
    path.write_text(f"HAL_KERNEL(8)\nvoid mine(HAL_GLOBAL float *to, float value) {{\n{body}\n}}\n")
    return Source((str(path),), ())


def test_a_compile_error_names_file_and_line(chosen: opencl.Platform, tmp_path: Path) -> None:
    wrong = source(tmp_path, "to[0] = valve;")
    with pytest.raises(CompileError) as caught:
        opencl.OpenClDevice(chosen).build(wrong)
    assert (caught.value.source_path, caught.value.line) == (wrong.files[0], 3)
    assert "HAL_OPENCL_PLATFORM and HAL_OPENCL_DEVICE choose the device" in caught.value.fix
    assert f"{wrong.files[0]}:3" in caught.value.log and "valve" in caught.value.log


def test_more_memory_than_there_is(chosen: opencl.Platform) -> None:
    device = opencl.OpenClDevice(chosen)
    most, whole = device.handle.max_mem_alloc_size, device.handle.global_mem_size
    has = f"{device.facts.name} has {whole} bytes, at most {most} of them in one piece; make the cache, the batch"
    for size in (most + 1, 1 << 50):
        with pytest.raises(
            DeviceError, match=rf"clCreateBuffer of {size} bytes: .*{re.escape(has)}.* HAL_OPENCL_DEVICE"
        ):
            device.empty(size)


def test_a_kernel_that_finds_no_memory_says_what_to_do() -> None:
    import pyopencl

    def refused() -> None:
        raise pyopencl.MemoryError("clEnqueueNDRangeKernel", pyopencl.status_code.MEM_OBJECT_ALLOCATION_FAILURE)

    with pytest.raises(DeviceError, match=r"mine: out of device memory: .*; make the cache, .*HAL_OPENCL_DEVICE name"):
        opencl.checked("mine", refused)


def test_launches_are_timed_and_compiled_code_is_kept(
    chosen: opencl.Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencl.OpenClDevice, "keeps", False)
    filled = source(tmp_path, "to[HAL_GROUP * 8 + HAL_THREAD] = value;")
    to = torch.zeros(16)
    for _ in range(2):
        device = opencl.OpenClDevice(chosen, unified=True)
        program, queue = device.build(filled), device.queue()
        event = queue.launch(program, "mine", 2, 8, (queue.write(to)[0], np.float32(3)))
        queue.finish()
        assert to.tolist() == [3.0] * 16
        assert 0 < event.seconds() < 10
        assert device.launches() == {f"opencl:mine@{device.facts.name}": 1}
        monkeypatch.setattr(opencl.OpenClDevice, "_code", lambda device, source: pytest.fail("compiled again"))
        to.zero_()


def test_code_the_driver_does_not_take_is_made_anew(
    chosen: opencl.Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencl.OpenClDevice, "keeps", False)
    device, filled = opencl.OpenClDevice(chosen), source(tmp_path, "to[0] = value;")
    folder = cache.private_folder("opencl")
    cache.kept(folder, f"{filled.key(device.facts)}.bin", lambda: b"of another driver")
    assert device.build(filled).source is filled


@pytest.mark.long(4)
def test_it_is_ten_times_as_fast_as_a_thread_a_score(chosen: opencl.Platform) -> None:
    heads, tokens, d, d_v = 64, 1024, 576, 512
    device = opencl.OpenClDevice(chosen)
    kernels, program = PortableMla(device), device.build(Source((str(Path(__file__).parent / "naive.h"),), ()))
    torch.manual_seed(3)
    table = torch.randperm(tokens // 64).to(torch.int32)[None]
    args = decode_args(
        (torch.randn(tokens // 64, 64, 1, d) / 10).bfloat16(),
        q=(torch.randn(1, 1, heads, d) / 10).bfloat16(),
        block_table=table,
        cache_seqlens=torch.tensor([tokens], dtype=torch.int32),
        head_dim_v=d_v,
    )
    naive = torch.empty(heads, d_v)

    def slow() -> None:
        queue = device.queue()
        q, kv, pages = (queue.read(tensor) for tensor in (args.q, args.kv_cache, table))
        scores, (out, _) = device.empty(4 * heads * tokens), queue.write(naive)
        scale = np.float32(args.softmax_scale / np.log(2))
        n, sizes = np.int32(tokens), [np.int32(size) for size in (tokens, d, d_v, 64)]
        queue.launch(program, "naive_scores", heads * tokens // 64, 64, (q, kv, pages, scores, n, *sizes[1::2], scale))
        queue.launch(program, "naive_softmax", heads, 1, (scores, n))
        queue.launch(program, "naive_values", heads * d_v // 64, 64, (scores, kv, pages, out, *sizes))
        queue.finish()

    def seconds(call: Callable[[], None]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def fast() -> None:
        kernels.decode(args, None)

    # In turns, after one of each to compile: whoever else uses the machine slows both down.
    times = [(seconds(fast), seconds(slow)) for _ in range(7)][1:]
    assert (args.out[0, 0].float() - naive).abs().max() < 8e-4
    assert min(slow for _, slow in times) > 10 * min(fast for fast, _ in times)


def test_windows_take_memory_of_the_host(chosen: opencl.Platform, discrete: opencl.OpenClDevice) -> None:
    device = opencl.OpenClDevice(chosen)
    mine = device.window(4096)
    theirs = device.peer(mine.handle)
    kernels, queue = EpKernels(device), device.queue()
    kernels.signal(queue, theirs.memory, 5, 7)
    queue.finish()
    assert kernels.seen(mine.memory, 8, 1, 1, torch.device("cpu")) == [0, 0, 0, 0, 0, 7, 0, 0]
    theirs.close()
    mine.close()
    with pytest.raises(DeviceError, match="memory of its own, which OpenCL cannot share"):
        discrete.window(4096)


def test_no_expert_parallelism_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert musa.MusaBackend().capabilities().ep == ep.capabilities("shm")
    monkeypatch.setattr(opencl.OpenClDevice, "unified", False)
    assert musa.MusaBackend().capabilities().ep is None


def test_a_call_left_half_way_lets_no_memory_go_that_kernels_still_use(
    chosen: opencl.Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opencl.OpenClDevice(chosen)
    kernels, called = PortableMla(device), []
    real = opencl.checked

    def refusing(name: str, *given: Any, **options: Any) -> Any:
        called.append(name)
        if name == "clEnqueueNDRangeKernel(mla_merge)":
            raise DeviceError(f"{name}: OUT_OF_RESOURCES")
        return real(name, *given, **options)

    monkeypatch.setattr(opencl, "checked", refusing)
    args = decode_args((torch.randn(4, 64, 1, 64) / 10).bfloat16())
    with contextlib.suppress(DeviceError):
        kernels.decode(args, None)
    gc.collect()
    assert called[-2:] == ["clEnqueueNDRangeKernel(mla_merge)", "clFinish"]


def test_code_is_taken_from_no_cache_of_pyopencl(
    chosen: opencl.Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a platform of which pyopencl does not know that it keeps code itself.
    import pyopencl.cache
    import pyopencl.characterize

    monkeypatch.setattr(pyopencl.characterize, "has_src_build_cache", lambda device: False)
    taken = lambda *given: pytest.fail("looked for in pyopencl's own cache")  # noqa: E731
    monkeypatch.setattr(pyopencl.cache, "_create_built_program_from_source_cached", taken)
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    assert opencl.OpenClDevice(chosen)._compiled(FLAGS) is not None


def test_no_folder_for_what_calls_a_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def called() -> None:
        raise NotADirectoryError(20, "Not a directory", "/nowhere/pytools")

    with pytest.raises(DeviceError, match=r"clCreateKernel: .*pytools.*XDG_CACHE_HOME"):
        opencl.checked("clCreateKernel", called)


def test_a_forked_child_is_told_instead_of_waiting_for_ever(chosen: opencl.Platform) -> None:
    device = opencl.OpenClDevice(chosen)
    device.queue().finish()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            device.queue()
        except DeviceError as error:
            os._exit("forked" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_window_without_a_descriptor_left_is_the_device_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SharedMemory.make(4096)

    def none_left(file: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", none_left)
    with pytest.raises(DeviceError, match=r"a window of 4096 bytes: .*Too many open files"):
        SharedMemory.open(mine.handle)
