"""Flags between processes on the device simulator: planted bugs of who stores them and of who waits, each found."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hal.portable import cache, sim
from hal.portable.bindings import BoundProgram
from hal.portable.runtime import Source
from hal.portable.staged import StagedDevice
from hal.spec.errors import DeviceError

pytest.importorskip("hip", reason="hip-python is not installed")
hal_rocm = pytest.importorskip("hal_rocm.backend", reason="hal-rocm is not installed")

PLANTED = Source((str(Path(__file__).with_name("planted_flags.h")),), ())
N = 256


def partner(handle: bytes, line: Any) -> None:
    """Run kernels on memory of another process, as told, and tell what was wrong with them."""
    device = hal_rocm.RocmBackend().device(0)
    program = device.build(PLANTED)
    there = device.runtime.module.hipIpcMemHandle_st()
    ctypes.memmove(int(there.as_c_void_p().value), handle, 64)
    launcher = Launcher(device, program, int(device.runtime("IpcOpenMemHandle", there, 1)))
    while (told := line.recv()) is not None:
        line.send(launcher.run(*told))


class Launcher:
    """Runs kernels on memory that processes share: those named after a flag write to it, all others read from it."""

    def __init__(self, device: StagedDevice, program: BoundProgram, shared: int) -> None:
        self.device, self.program, self.shared = device, program, shared
        self.own = device.empty(4 * N)

    def run(self, kernel: str, right: bool, seed: int) -> str:
        """What was wrong; empty if nothing was."""
        os.environ["HAL_SIM_SEED"] = str(seed)
        content = torch.arange(N, dtype=torch.float32)
        self.device.copy(int(self.own), content.data_ptr(), 4 * N)
        ends = (self.shared, self.own) if kernel.startswith("flag") else (self.own, self.shared)
        try:
            if kernel == "copy":
                self.device.copy(int(self.own), self.shared, 4 * N)
                self.device.runtime("StreamSynchronize", self.device.stream())
                return ""
            self.device.launch(self.program, kernel, 2, 128, (*ends, np.int32(128), np.int32(right))).wait()
        except DeviceError as error:
            return str(error)
        return ""


class Pair:
    """This process and another one, either of which may write."""

    def __init__(self, device: StagedDevice, program: BoundProgram) -> None:
        self.memory = device.empty(4 * N + 64)
        handle = device.runtime("IpcGetMemHandle", int(self.memory))
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        content = ctypes.string_at(handle.as_c_void_p().value, 64)
        self.other = context.Process(target=partner, args=(content, theirs), daemon=True)
        self.other.start()
        self.here = Launcher(device, program, int(self.memory))

    def __call__(self, writer: str, *readers: str, wrong: str = "", other_writes: bool = True, seed: int = 0) -> str:
        """What was found, with a bug in the kernel that is to be `wrong`."""
        zeros = torch.zeros(N + 16)
        self.here.device.copy(int(self.memory), zeros.data_ptr(), 4 * N + 64)
        self.here.device.runtime("StreamSynchronize", self.here.device.stream())
        sides = (self.there, self.here.run) if other_writes else (self.here.run, self.there)
        assert sides[0](writer, writer != wrong, seed) == ""
        return next(filter(None, (sides[1](reader, reader != wrong, seed) for reader in readers)), "")

    def there(self, *told: Any) -> str:
        self.line.send(told)
        assert self.line.poll(60), "the other process says nothing"
        return str(self.line.recv())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.ENV, "hip:gfx942")
        patch.setenv(cache.ENV, str(tmp_path_factory.mktemp("kernels")))
        patch.setenv(sim.CHECK_ENV, "all")
        patch.setenv("HAL_SIM_SEED", "0")
        device = hal_rocm.RocmBackend().device(0)
        assert isinstance(device, StagedDevice)
        made = Pair(device, device.build(PLANTED))
        yield made
        made.line.send(None)
        made.other.join(30)
        assert made.other.exitcode == 0


NOT_RELEASED = "a flag that was not released: {0}: work-item 0 of group . of process .* stored it "
OF_THE_FLAG = "the flag that flag_released: work-item 0 of group . of process .* released"
# Who writes, who reads, and what is said; where the bug is not the writer's, the name is the reader's.
FLAGS = {
    "flag_stored_without_release": ("rows_acquired", NOT_RELEASED + "without release"),
    "flag_stored_plainly": ("rows_acquired", NOT_RELEASED + "plainly"),
    "flag_without_fence": ("rows_of_a_fence", NOT_RELEASED + "without release, and no fence for the"),
    "flag_behind_a_fence_of_the_device": (
        "rows_acquired",
        NOT_RELEASED + "without release, and no fence for the",
    ),
    "flag_without_barrier": (
        "rows_acquired",
        "released too early: {0}: work-item .* of process .* wrote it, and nothing .* before {0}: work-item 0",
    ),
    "flag_before_its_row": ("rows_acquired", "released too early: {0}: work-item 0 .* after it released the flag"),
    "rows_not_acquired": (
        "flag_released",
        "read without acquire: work-item 0 loaded " + OF_THE_FLAG,
    ),
    "rows_of_a_fence": ("flag_released", "read without acquire: work-item 0 loaded " + OF_THE_FLAG),
    "rows_without_barrier": (
        "flag_released",
        "no barrier since work-item 0 acquired " + OF_THE_FLAG,
    ),
}


@pytest.mark.parametrize("other_writes", [True, False])
@pytest.mark.parametrize("kernel", FLAGS)
def test_a_flag_that_does_not_order_what_it_tells_of(
    kernel: str, other_writes: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    partner, said = FLAGS[kernel]
    writer, reader = sorted((kernel, partner))  # flag_…, rows_…
    monkeypatch.setenv(sim.CHECK_ENV, "fences")
    found = pair(writer, reader, wrong=kernel, other_writes=other_writes)
    assert re.search(f"{reader}: work-item .* reads 4 bytes at from.*{said.format(kernel)}", found), found
    lines = Path(PLANTED.files[0]).read_text().splitlines()
    told = re.findall(r"\(planted_flags\.h:(\d+)\)", found)
    assert len(told) >= 2, found
    for name, number in ((reader, told[-1]), (writer, told[0])):
        start = next(at for at, line in enumerate(lines, 1) if f"void {name}(" in line)
        assert start < int(number) <= start + lines[start:].index("}") + 1, found
    monkeypatch.setenv(sim.CHECK_ENV, "all")
    for seed in (1, 2):
        assert pair(writer, reader, other_writes=other_writes, seed=seed) == ""


def test_flags_that_are_acquired_by_one_launch_are_for_those_after_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "all")
    for reader in ("reads_only", "copy"):
        assert pair("flag_without_barrier", "acquires_only", reader) == ""
        for wrong in ("flag_without_barrier", "acquires_only"):
            found = pair("flag_without_barrier", "acquires_only", reader, wrong=wrong)
            assert re.search("(reads_only: work-item .*|a copy) reads .*: released too early", found), found


def test_one_flag_for_what_all_groups_wrote(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "fences")
    for writer in ("flag_of_all_groups", "flag_of_the_last_group"):
        assert pair(writer, "rows_of_all_groups") == ""
    found = pair("flag_of_the_last_group", "rows_of_all_groups", wrong="flag_of_the_last_group")
    assert "released too early" in found, found
