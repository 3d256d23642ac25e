"""The device simulator, by a runtime's C names: planted bugs of kernels and of those who launch them, each found."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import decode_args

from hal.portable import bindings, cache, sim
from hal.portable.bindings import BoundProgram
from hal.portable.mla import PortableMla
from hal.portable.runtime import Source
from hal.portable.staged import Buffer, StagedDevice
from hal.spec.errors import BackendUnavailable, CompileError, DeviceError

pytest.importorskip("hip", reason="hip-python is not installed")
hal_rocm = pytest.importorskip("hal_rocm.backend", reason="hal-rocm is not installed")

PLANTED = Source((str(Path(__file__).with_name("planted.h")),), ())
THREADS, GROUPS = 128, 2
N = THREADS * GROUPS


@pytest.fixture(scope="module", autouse=True)
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A chip that looks closely; its library and kernels compiled here and now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.ENV, "hip:gfx942")
        patch.setenv(cache.ENV, str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def device(simulated: None) -> StagedDevice:
    made = hal_rocm.RocmBackend().device(0)
    assert isinstance(made, StagedDevice)
    return made


@pytest.fixture(scope="module")
def planted(device: StagedDevice) -> BoundProgram:
    """All kernels in one module, compiled so that every access can be looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.CHECK_ENV, "all")
        return hal_rocm.RocmBackend().device(0).build(PLANTED)


def run(device: StagedDevice, program: BoundProgram, kernel: str, right: bool, threads: int = THREADS) -> torch.Tensor:
    queue = device.queue()
    written = torch.full((threads * GROUPS,), torch.nan)
    to, _ = queue.write(written)
    numbers = (np.int32(threads), np.int32(right))
    queue.launch(
        program,
        kernel,
        GROUPS,
        threads,
        (to, queue.read(torch.arange(threads * GROUPS, dtype=torch.float32)), *numbers),
    )
    queue.finish()
    return written


# What is looked at, and what is said of it.
BUGS = {
    "local_barrier_missing": ("races", "local memory room: a race, work-item .* since the last barrier"),
    "local_overwritten_too_early": ("races", "local memory room: a race, work-item .* since the last barrier"),
    "local_written_by_two": ("races", "writes 4 bytes at byte .* of local memory room: a race, work-item .* wrote it"),
    "local_wavefront_synchronous": ("races", "local memory room: a race"),
    "local_one_past_the_end": ("memory", "byte 512 of local memory room: out of bounds, there are 512 bytes"),
    "local_one_before_the_beginning": ("memory", "byte -4 of local memory room: out of bounds"),
    "local_pitch_too_small": ("memory", "local memory rows: out of bounds, there are 512 bytes"),
    "local_half_written": ("uninitialised", "reads 4 bytes at byte .* of local memory room: uninitialised"),
    "local_left_by_the_group_before": ("uninitialised", "of group 1 reads .* local memory room: uninitialised"),
    "local_too_much": ("", "takes 81920 bytes of local memory, a group of gfx942 has 65536"),
    "shuffle_of_some_lanes": (
        "",
        "work-items of a wavefront of group . wait at different places: .* at the shuffle of planted.h:[0-9]+",
    ),
    "barrier_of_some_items": ("", "work-items of group . wait at different places: .*, .* has ended"),
    "barrier_in_a_loop_of_some": ("", "wait at different places"),
    "barrier_after_a_return": ("", "work-item 127 has ended"),
    "barriers_of_two_branches": ("", "wait at different places: .* barrier of .*, .* barrier of"),
    "read_past_the_end": (
        "memory",
        r"reads 4 bytes at from\[256\]: out of bounds, the buffer of 1024 bytes ends 0 bytes",
    ),
    "written_past_the_end": ("memory", r"writes 4 bytes at to\[256\]: out of bounds, the buffer of 1024 bytes ends"),
    "written_far_past_the_end": ("memory", "writes 4 bytes at .*: (out of bounds|not memory of the device)"),
    "read_before_the_beginning": ("memory", r"reads 4 bytes at from\[-1\]: out of bounds, 4 bytes before a buffer of"),
    "sums_into_what_was_never_written": ("uninitialised", r"reads 4 bytes at to\[0\]: uninitialised"),
    "groups_write_the_same": (
        "races",
        r"of group 1 writes .* to\[0\]: a race, .* of group 0 wrote it in the same launch",
    ),
    "group_reads_what_another_writes": ("races", r"a race, work-item .* of group 0 wrote it in the same launch"),
    "counted_before_it_was_cleared": (
        "races",
        r"at to\[\d+\]: a race, (several )?work-items? .*since the last barrier",
    ),
    "count_read_before_all_have_counted": ("races", "local memory count: a race, .* since the last barrier"),
    "groups_count_what_one_of_them_cleared": ("races", r"of group \d (writes|updates) 4 bytes at to\[0\]: a race"),
    "global_barrier_missing": ("races", r"at to\[\d+\]: a race, work-item \d+ (wrote|read) it since the last barrier"),
}


@pytest.mark.parametrize("kernel", BUGS)
def test_a_planted_bug_is_found_and_told_where(
    kernel: str, device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, said = BUGS[kernel]
    monkeypatch.setenv(sim.CHECK_ENV, checks)
    with pytest.raises(DeviceError, match=said) as caught:
        run(device, planted, kernel, right=False)
    assert f"{kernel}: " in str(caught.value)
    if checks:
        (line,) = re.findall(r"\(planted\.h:(\d+)\)", str(caught.value))
        text = Path(PLANTED.files[0]).read_text().splitlines()
        start = next(number for number, found in enumerate(text, 1) if kernel in found)
        assert start < int(line) <= start + text[start:].index("}") + 1
    if kernel == "local_too_much":
        return
    # The same without the bug, with everything looked at, in several orders.
    monkeypatch.setenv(sim.CHECK_ENV, "all")
    for seed in "12":
        monkeypatch.setenv("HAL_SIM_SEED", seed)
        run(device, planted, kernel, right=True)


def test_a_wavefront_is_as_wide_as_the_chip_has_it(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = "shuffle_wider_than_a_wavefront"
    run(device, planted, kernel, right=False)
    with monkeypatch.context() as patch:
        patch.setenv(sim.ENV, "hip:gfx1100")
        run(device, planted, kernel, right=True)
        with pytest.raises(DeviceError, match=f"{kernel}: .* shuffles 64 lanes of a wavefront of 32"):
            run(device, planted, kernel, right=False)


def test_a_lane_that_is_not_there_has_no_value(device: StagedDevice, planted: BoundProgram) -> None:
    run(device, planted, "shuffle_with_nobody", right=True, threads=80)
    with pytest.raises(DeviceError, match=r"shuffles with lane \d+, which is not there"):
        run(device, planted, "shuffle_with_nobody", right=False, threads=80)


def test_what_was_freed_is_not_used(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "memory")
    to, start = device.empty(4 * N), int(device.empty(4 * N))
    with pytest.raises(DeviceError, match=r"reads 4 bytes at from\[0\]: use after free, of a buffer of 1024 bytes"):
        device.launch(planted, "right_enough", 2, 128, (to, start, np.int32(128), np.int32(1))).wait()


def test_memory_of_the_host_is_none_of_the_device(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "memory")
    mine = torch.zeros(N)
    with pytest.raises(DeviceError, match="reads 4 bytes at an address: not memory of the device"):
        device.launch(planted, "right_enough", 2, 128, (device.empty(4 * N), mine, np.int32(128), np.int32(1))).wait()


def test_a_call_left_half_way_does_not_hear_what_another_waits_for(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "memory")
    left, mine = device.queue(), torch.zeros(N)
    left.read(mine)
    left.write(mine)
    launched = device.launch(planted, "right_enough", 2, 128, (device.empty(4 * N), mine, np.int32(128), np.int32(1)))
    del left
    with pytest.raises(DeviceError, match="not memory of the device"):
        launched.wait()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kernel", [name for name in BUGS if "count" in name])
def test_what_was_written_plainly_is_not_forgotten_for_atomic_operations(
    kernel: str, seed: int, device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "races,order")
    monkeypatch.setenv("HAL_SIM_SEED", str(seed))
    with pytest.raises(DeviceError, match=f"{kernel}: .* a race"):
        run(device, planted, kernel, right=False)


def test_a_copy_of_what_was_never_written_is_not_written_either(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "uninitialised")
    start, half, copy, to = torch.ones(N), device.empty(4 * N), device.empty(4 * N), device.empty(4 * N)
    arguments = (to, copy, np.int32(128), np.int32(1))
    device.copy(int(half), start.data_ptr(), 2 * N)
    device.copy(int(copy), int(half), 4 * N)
    with pytest.raises(DeviceError, match=rf"reads 4 bytes at from\[{N // 2}\]: uninitialised"):
        device.launch(planted, "right_enough", 2, 128, arguments).wait()
    device.copy(int(half) + 2 * N, start.data_ptr(), 2 * N)
    device.copy(int(copy) + 2 * N, int(half), 2 * N)
    device.launch(planted, "right_enough", 2, 128, arguments).wait()


@pytest.mark.parametrize("looks", ["", "memory"])
def test_what_the_processor_refuses_fails_the_kernel_alone(
    looks: str, device: StagedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, looks)
    program = hal_rocm.RocmBackend().device(0).build(PLANTED)
    arguments = (0, device.empty(4 * N), np.int32(128), np.int32(1))
    with pytest.raises(DeviceError, match=r"right_enough: work-item 0 of group . .*not memory of the device") as caught:
        device.launch(program, "right_enough", 2, 128, arguments).wait()
    assert "LaunchFailure" in str(caught.value)
    at = r" \(planted\.h:\d+\)" if looks else "$"
    divides = f"divides_by_nothing: work-item 77 of group . divides an integer by zero.*{at}"
    for kernel, said in (("divides_by_nothing", divides), ("recurses_too_deep", "work-item 77 of group . needs more")):
        with pytest.raises(DeviceError, match=said):
            run(device, program, kernel, right=False)
        run(device, program, kernel, right=True)


CRASH = """
import ctypes, faulthandler, os, signal, sys, threading, time
import numpy as np
from hal.portable.runtime import Source
from hal_rocm.backend import RocmBackend

device = RocmBackend().device(0)
program = device.build(Source((sys.argv[1],), ()))
def work(kernel, to):
    return device.launch(program, kernel, 1, 128, (to, device.empty(512), np.int32(128), np.int32(1)))
faulthandler.enable()
try:
    work("right_enough", 0).wait()
except Exception as error:
    print(error, flush=True)
before, between = [], threading.Thread(target=lambda: (work("takes_its_time", device.empty(512)).wait(), print("late")))
signal.signal(signal.SIGFPE, lambda *_: print("handled", flush=True))
between.start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGFPE)
time.sleep(0.1)
if sys.argv[2] == "after":
    between.join()
ctypes.string_at(0)
"""


@pytest.mark.parametrize("when", ["after", "meanwhile"])
def test_signals_that_are_not_a_kernels_are_whose_they_were(when: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", CRASH, PLANTED.files[0], when], capture_output=True, text=True, timeout=100
    )
    assert "right_enough: work-item" in found.stdout and "handled" in found.stdout, found
    assert ("late" in found.stdout) == (when == "after"), found
    assert found.returncode == -signal.SIGSEGV and "Fatal Python error: Segmentation fault" in found.stderr, found


def test_memory_never_written_is_not_a_number(device: StagedDevice) -> None:
    to, buffer = torch.zeros(8), device.empty(32)
    device.copy(to.data_ptr(), int(buffer), 32)
    device.runtime("StreamSynchronize", device.stream())
    assert to.isnan().all() and to.view(torch.bfloat16).isnan().all()


def test_what_a_kernel_leaves_as_it_is_comes_back_as_it_was(device: StagedDevice, planted: BoundProgram) -> None:
    queue = device.queue()
    written = torch.arange(512.0)[::2]  # what lies between its elements is others'
    numbers = (np.int32(128), np.int32(1))
    to = queue.write(written, partly=True)[0]
    queue.launch(planted, "right_enough", 1, 128, (to, queue.read(torch.ones(128)), *numbers))
    queue.finish()
    assert torch.equal(written[128:], torch.arange(256.0, 512.0, 2))
    changed = written[:128].clone()
    assert not torch.equal(changed, torch.arange(0.0, 256.0, 2))
    written.fill_(7.0)
    queue.finish()
    assert (written == 7.0).all()  # what was brought back once is not brought back again


def test_another_default_device_of_torch_is_not_where_results_are_brought(
    device: StagedDevice, planted: BoundProgram
) -> None:
    with torch.device("meta"):
        written = torch.zeros(N, device="cpu")
        queue = device.queue()
        ends = queue.write(written)[0], queue.read(torch.ones(N, device="cpu"))
        queue.launch(planted, "right_enough", 2, 128, (*ends, np.int32(128), np.int32(1)))
        queue.finish()
    assert (written == 2).all()


def test_who_does_not_wait_finds_nothing(device: StagedDevice, planted: BoundProgram) -> None:
    start, to = torch.arange(N, dtype=torch.float32), torch.full((N,), -1.0)
    buffers = device.empty(4 * N), device.empty(4 * N)
    device.copy(int(buffers[0]), start.data_ptr(), 4 * N)
    device.launch(planted, "right_enough", 2, 128, (buffers[1], buffers[0], np.int32(128), np.int32(1)))
    device.copy(to.data_ptr(), int(buffers[1]), 4 * N)
    assert (to == -1).all()
    device.runtime("StreamSynchronize", device.stream())
    assert torch.equal(to, start + 1)


@pytest.mark.parametrize("what", ["a kernel", "a copy"])
def test_streams_that_do_not_wait_for_each_other(
    what: str, device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "streams")
    runtime = device.runtime
    mine, other = device.stream(), runtime("StreamCreateWithFlags", 1)
    there, to = torch.ones(N), torch.zeros(N)
    first, second, third = (device.empty(4 * N) for _ in range(3))
    numbers = (np.int32(128), np.int32(1))

    def work(waits: bool) -> None:
        device.copy(int(first), there.data_ptr(), 4 * N)
        device.launch(planted, "right_enough", 2, 128, (second, first, *numbers))
        if waits:
            event = runtime("EventCreate")
            runtime("EventRecord", event, mine)
            runtime("StreamWaitEvent", other, event, 0)
        with monkeypatch.context() as patch:
            patch.setattr(StagedDevice, "stream", lambda _: other)
            if what == "a kernel":
                device.launch(planted, "right_enough", 2, 128, (third, second, *numbers))
            else:
                device.copy(to.data_ptr(), int(second), 4 * N)
        runtime("DeviceSynchronize")

    work(waits=True)
    found = r"at from\[0\]: nothing waits for" if what == "a kernel" else "byte 0 of buffer .*: nothing waits for"
    # In whatever order they ran: either reads what is not there yet, or writes what was read already.
    with pytest.raises(DeviceError, match=f"({found}|writes 4 bytes at to.*nothing waits for)"):
        work(waits=False)


def test_without_looking_closely_red_zones_are_looked_at_after_a_kernel(device: StagedDevice) -> None:
    program = device.build(PLANTED)
    with pytest.raises(
        DeviceError, match="written_past_the_end: somebody wrote 0 bytes past the end of a buffer of 1024"
    ):
        run(device, program, "written_past_the_end", right=False)
    assert torch.equal(run(device, program, "right_enough", right=False), torch.arange(N, dtype=torch.float32))


def test_code_that_can_be_looked_at_need_not_be(device: StagedDevice, planted: BoundProgram) -> None:
    start = torch.arange(N, dtype=torch.float32).view(GROUPS, THREADS)
    for _ in range(20):
        found = run(device, planted, "local_barrier_missing", right=True)
        assert torch.equal(found.view(GROUPS, THREADS), start.flip(1))


def test_code_that_cannot_be_looked_at_says_so(device: StagedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    program = device.build(PLANTED)
    monkeypatch.setenv(sim.CHECK_ENV, "memory")
    with pytest.raises(DeviceError, match="was compiled without HAL_SIM_CHECK"):
        run(device, program, "right_enough", right=True)


def barriers(text: str) -> list[int]:
    """Where they are, but for those of the macro that does without shuffles."""
    return [found.start() for found in re.finditer(r"HAL_BARRIER\(\);\n", text)]


KERNELS = Path(bindings.__file__).parent / "kernels"
REAL = [
    (name, n) for name in ("mla_decode.h", "mla_schedule.h") for n in range(len(barriers((KERNELS / name).read_text())))
]


@pytest.mark.sampled
@pytest.mark.long(1)
@pytest.mark.parametrize(("name", "number"), REAL)
def test_no_barrier_of_the_kernels_can_be_missed(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (KERNELS / name).read_text()
    at = barriers(text)[number]
    (tmp_path / name).write_text(text[:at] + text[at + len("HAL_BARRIER();") :])
    monkeypatch.setenv(sim.CHECK_ENV, "races")
    original = StagedDevice.build

    def build(device: StagedDevice, source: Source) -> BoundProgram:
        files = tuple(str(tmp_path / file) if file == name else file for file in source.files)
        return original(device, Source(files, source.flags))

    monkeypatch.setattr(StagedDevice, "build", build)
    torch.manual_seed(0)
    args = decode_args(
        q=torch.randn(70, 1, 5, 24).bfloat16(),
        kv_cache=torch.randn(40, 64, 1, 24).bfloat16(),
        block_table=torch.arange(40, dtype=torch.int32).expand(70, 40).contiguous(),
        cache_seqlens=torch.tensor([800, 70, 0, *[5] * 67], dtype=torch.int32),
        head_dim_v=16,
    )
    with pytest.raises(DeviceError, match=r"mla_(decode|schedule): work-item .*: a race"):
        PortableMla(hal_rocm.RocmBackend().device(0)).decode(args, None)


def test_a_compile_error_names_file_and_line(device: StagedDevice, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.h"
    wrong.write_text("HAL_KERNEL(8)\nvoid wrong(HAL_GLOBAL float *to) { to[0] = valve; }\n")
    with pytest.raises(CompileError, match="hiprtcCompileProgram: HIPRTC_ERROR_COMPILATION for") as caught:
        device.build(Source((str(wrong),), ()))
    assert f"{wrong}:2" in caught.value.log and "valve" in caught.value.log and caught.value.source_path == str(wrong)


def test_what_the_runtime_refuses_is_named(device: StagedDevice, planted: BoundProgram) -> None:
    with pytest.raises(DeviceError, match=r"hipModuleGetFunction: hipErrorNotFound \(500\): hipErrorNotFound"):
        device.launch(planted, "other", 1, 8, ())
    with pytest.raises(DeviceError, match="hipModuleLaunchKernel: hipErrorInvalidValue"):
        device.launch(planted, "right_enough", 1, 2048, (*(device.empty(16),) * 2, np.int32(1), np.int32(1)))
    with pytest.raises(DeviceError, match="hipModuleLoadData: hipErrorInvalidImage"):
        device.runtime("ModuleLoadData", bytearray(b"no code, and long enough to look into for what may be there" * 2))
    helps = r"hipMalloc: hipErrorOutOfMemory.*; the device has \d+ bytes, \d+ of them free; make the cache"
    with pytest.raises(DeviceError, match=f"memory of {1 << 60} bytes: {helps}"):
        device.empty(1 << 60)
    with pytest.raises(DeviceError, match="hipFree: hipErrorInvalidValue"):
        device.runtime("Free", 4096)


@pytest.mark.parametrize("size", [64, -64 % 2**64, 2**64 - 1])
def test_a_copy_of_what_is_not_there_fails_alone(size: int, device: StagedDevice) -> None:
    of_host, buffer = torch.ones(N), device.empty(4 * N)
    mine, theirs = of_host.data_ptr(), int(buffer)
    nowhere = [(theirs, 0), (0, theirs), (theirs, 4096), (0, mine)]
    for to, start in nowhere if size == 64 else [(theirs, mine), (mine, theirs), (theirs, theirs + 64)]:
        device.copy(to, start, size)
        said = "not all of that memory of the host is there" if size == 64 else "out of bounds, the buffer of 1024"
        with pytest.raises(DeviceError, match=f"a copy .*{size} bytes.*: {said}"):
            device.runtime("StreamSynchronize", device.stream())
    if size > 64:
        with pytest.raises(DeviceError, match="hipMemsetAsync: hipErrorInvalidValue"):
            device.runtime("MemsetAsync", theirs, 0, size, device.stream())
    device.copy(theirs, mine, 4 * N)
    device.runtime("StreamSynchronize", device.stream())


def test_a_launch_that_cannot_be_is_refused(device: StagedDevice, planted: BoundProgram) -> None:
    arguments = (device.empty(4 * N), device.empty(4 * N), np.int32(128), np.int32(1))
    for few in range(4):
        with pytest.raises(DeviceError, match=f"right_enough: takes 4 arguments, {few} were given"):
            device.launch(planted, "right_enough", 2, 128, arguments[:few])
    for groups, threads in ((0, 128), (2**31, 128), (2**32 - 1, 128), (2, 0), (2, 1025)):
        with pytest.raises(DeviceError, match="hipModuleLaunchKernel: hipErrorInvalidValue"):
            device.launch(planted, "right_enough", groups, threads, arguments)


def test_a_chip_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, "hip:gfx1")
    probe = hal_rocm.RocmBackend().probe()
    assert not probe.available and probe.reason.startswith("HAL_SIM: got 'hip:gfx1'; legal: hip:gfx906, ")


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", "4294967296"])
def test_a_seed_that_is_none_is_refused(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.SEED_ENV, seed)
    probe = hal_rocm.RocmBackend().probe()
    assert (
        not probe.available
        and probe.reason == f"HAL_SIM_SEED: got '{seed}'; legal: a number from 0 to 4294967295, or unset"
    )


def test_a_forked_process_has_no_device(device: StagedDevice) -> None:
    child = os.fork()
    if not child:
        try:
            device.runtime("GetDeviceCount")
        except DeviceError as error:
            os._exit("hipErrorNoDevice" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_times_are_kept_only_where_they_were_asked_for(planted: BoundProgram) -> None:
    numbers: tuple[Any, ...] = (np.int32(128), np.int32(1))
    timed = hal_rocm.RocmBackend().device(0, timed=True)
    memory = Buffer.of(timed.runtime, 4 * N), Buffer.of(timed.runtime, 4 * N)
    assert 0 < timed.launch(planted, "right_enough", 2, 128, (*memory, *numbers)).seconds() < 10
    untimed = hal_rocm.RocmBackend().device(0)
    with pytest.raises(DeviceError, match="timed=True"):
        untimed.launch(planted, "right_enough", 2, 128, (*memory, *numbers)).seconds()


def test_without_a_compiler_there_is_no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    sim._digest.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler"):
        bindings.load(hal_rocm.vendor().bindings())


def test_groups_come_in_an_order_drawn_from_the_seed(
    device: StagedDevice, planted: BoundProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "order")

    def late(seed: int) -> bool:
        """Whether the second group came first, and read what the first had not written yet."""
        monkeypatch.setenv("HAL_SIM_SEED", str(seed))
        found = run(device, planted, "group_reads_what_another_writes", right=False)
        return bool(found[THREADS:].isnan().all())

    drawn = [late(seed) for seed in range(8)]
    assert set(drawn) == {True, False} and drawn == [late(seed) for seed in range(8)]


def other_process(handle: bytes, answers: Any) -> None:
    """Open memory of another process, let a kernel write to it, and try what must not work."""
    device = hal_rocm.RocmBackend().device(0)
    module, runtime = device.runtime.module, device.runtime
    there = module.hipIpcMemHandle_st()
    ctypes.memmove(int(there.as_c_void_p().value), handle, 64)
    mapped = int(runtime("IpcOpenMemHandle", there, 1))
    start = device.empty(4 * N)
    ones = torch.ones(N)
    device.copy(int(start), ones.data_ptr(), 4 * N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.CHECK_ENV, "all")
        looking = hal_rocm.RocmBackend().device(0).build(PLANTED)
        try:
            device.launch(looking, "written_past_the_end", 2, 128, (mapped, start, np.int32(128), np.int32(0))).wait()
        except DeviceError as error:
            answers.put(str(error))
        device.launch(looking, "right_enough", 2, 128, (mapped, start, np.int32(128), np.int32(7))).wait()
    runtime("IpcCloseMemHandle", mapped)


def test_memory_of_another_process(device: StagedDevice, planted: BoundProgram) -> None:
    mine, to = device.empty(4 * N), torch.zeros(N)
    handle = device.runtime("IpcGetMemHandle", int(mine))
    content = ctypes.string_at(handle.as_c_void_p().value, 64)
    with pytest.raises(DeviceError, match="hipIpcOpenMemHandle: hipErrorInvalidValue"):
        device.runtime("IpcOpenMemHandle", handle, 1)  # it is mapped here already
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    other = context.Process(target=other_process, args=(content, answers))
    other.start()
    assert "written_past_the_end: work-item" in answers.get(timeout=100)
    other.join()
    assert other.exitcode == 0
    device.copy(to.data_ptr(), int(mine), 4 * N)
    device.runtime("StreamSynchronize", device.stream())
    assert to.tolist() == [8.0] * N
