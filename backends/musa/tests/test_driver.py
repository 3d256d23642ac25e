"""The runtime on MUSA's driver API, against a simulated libmusa.so and a simulated mcc."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import ep_cases
import numpy as np
import portable_backends
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks
from hal_musa import backend as musa
from hal_musa import driver
from test_musa import agrees, cached, decode_args, source

from hal import plugins
from hal.backend import Backend
from hal.plugins import hookimpl
from hal.portable import ep_node, sim
from hal.portable.mla import PortableMla
from hal.portable.runtime import Handle, Source
from hal.spec.errors import BackendUnavailable, CompileError, DeviceError

Toolkit = Mapping[str, str]


@pytest.fixture(scope="module", autouse=True)
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolkit]:
    """A machine with a MUSA driver and toolkit."""
    folder = tmp_path_factory.mktemp("musa")
    (folder / "bin").mkdir()
    (folder / "bin" / "mcc").symlink_to(sim.program("mcc"))
    variables = {
        driver.LIBRARY_ENV: str(sim.library("musa")),
        driver.HOME_ENV: str(folder),
        sim.ENV: "musa:mp_22",
        # Tensors of the host are looked at without waiting for anything.
        "HAL_SIM_EAGER": "1",
        "HAL_KERNEL_CACHE": str(folder),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.mark.parametrize(("arch", "subgroup"), [("21", 1), ("31", 32)])
def test_it_decodes_on_every_architecture(arch: str, subgroup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, f"musa:mp_{arch}")
    device = driver.MusaDevice(0, memory="cpu")
    assert (device.facts.name, device.facts.subgroup, device.facts.dialect) == (f"mp_{arch}", subgroup, "musa")
    kernels, args = PortableMla(device), decode_args(cached()[0])
    kernels.decode(args, None)
    assert agrees(args)
    assert device.launches() == {f"musa:{name}@mp_{arch}": 1 for name in ("mla_schedule", "mla_decode", "mla_merge")}


def test_no_shuffle_has_a_mask_that_does_not_name_all_lanes(tmp_path: Path) -> None:
    """Subgroups of 128 lanes do without, and the dialect refuses whoever asks for them."""
    device = driver.MusaDevice(0, memory="cpu")
    assert device.library.number("muDeviceGetAttribute", driver._WARP_SIZE, 0) == 128 and device.facts.subgroup == 1
    path = source(tmp_path, "to[0] = value;").files
    with pytest.raises(CompileError, match="a mask of 32 bits does not name the lanes of wider") as caught:
        device.build(Source(path, (("HAL_SUBGROUP", 128),)))
    assert Path(caught.value.source_path).name == "musa.h"


def test_launches_can_be_timed(tmp_path: Path) -> None:
    filled, to = source(tmp_path, "to[HAL_GROUP * 8 + HAL_THREAD] = value;"), torch.zeros(16)
    device = driver.MusaDevice(0, memory="cpu", timed=True)
    event = device.launch(device.build(filled), "mine", 2, 8, (to, np.float32(3)))
    assert to.tolist() == [3.0] * 16 and 0 < event.seconds() < 10
    untimed = driver.MusaDevice(0, memory="cpu")
    with pytest.raises(DeviceError, match="timed=True"):
        untimed.launch(untimed.build(filled), "mine", 1, 8, (to, np.float32(3))).seconds()


def test_what_the_driver_refuses_is_named(tmp_path: Path) -> None:
    device = driver.MusaDevice(0, memory="cpu")
    program = device.build(source(tmp_path, "to[0] = value;"))
    with pytest.raises(DeviceError, match=r"muModuleGetFunction: MUSA_ERROR_NOT_FOUND \(500\)"):
        device.launch(program, "other", 1, 8, ())
    with pytest.raises(DeviceError, match="muLaunchKernel: MUSA_ERROR_INVALID_VALUE"):
        device.launch(program, "mine", 1, 2048, (torch.zeros(1), np.float32(0)))
    with pytest.raises(DeviceError, match="muModuleLoadData: MUSA_ERROR_INVALID_IMAGE"):
        device.library.handle("muModuleLoadData", b"not code, and long enough to look")
    with pytest.raises(DeviceError, match="muDeviceGet: MUSA_ERROR_INVALID_DEVICE"):
        _ = driver.MusaDevice(1, memory="cpu").facts


def test_a_compile_error_names_file_and_line(tmp_path: Path) -> None:
    wrong = source(tmp_path, "to[0] = valve;")
    with pytest.raises(CompileError, match="mcc for mp_22") as caught:
        driver.MusaDevice(0, memory="cpu").build(wrong)
    assert (caught.value.source_path, caught.value.line) == (wrong.files[0], 3)
    assert f"{wrong.files[0]}:3" in caught.value.log and "valve" in caught.value.log
    assert "MUSA_HOME names the toolkit whose mcc is used" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('case "$*" in *--version*) exit;; esac', "ended without an error and has written nothing"),
        ('case "$*" in *--version*) exit;; esac; kill -9 $$', "mcc for mp_22: .* it was killed by SIGKILL"),
        (None, "does not run .Exec format error.; MUSA_HOME names"),
        ("kill -9 $$", "mcc --version: it was killed by SIGKILL, as for want of memory; MUSA_HOME names"),
    ],
)
def test_an_mcc_that_does_not_work(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    mcc = tmp_path / "bin" / "mcc"
    mcc.write_text("" if content is None else f"#!/bin/sh\n{content}\n")
    mcc.chmod(0o755)
    monkeypatch.setenv(driver.HOME_ENV, str(tmp_path))
    with pytest.raises((CompileError, BackendUnavailable), match=said) as caught:
        driver.MusaDevice(0, memory="cpu").build(source(tmp_path, "to[0] = value;"))
    # One that does not even run is why there is no such runtime.
    out = isinstance(caught.value, BackendUnavailable)
    assert driver.missing() == (
        str(caught.value) if out else "torch_musa does not import: No module named 'torch_musa'"
    )


def test_code_is_kept_for_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = source(tmp_path, "to[0] = value + 1;")
    driver.MusaDevice(0, memory="cpu").build(filled)
    monkeypatch.setattr(driver, "_compile", lambda *given: pytest.fail("compiled again"))
    driver.MusaDevice(0, memory="cpu").build(filled)
    monkeypatch.setenv(sim.ENV, "musa:mp_31")
    with pytest.raises(pytest.fail.Exception):
        driver.MusaDevice(0, memory="cpu").build(filled)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert driver.missing().startswith("torch_musa does not import")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch_musa.py").write_text("raise RuntimeError('built for another torch')\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(broken)
        assert driver.missing() == "torch_musa does not import: built for another torch"
    monkeypatch.setenv(driver.HOME_ENV, str(tmp_path))
    assert driver.missing().startswith("no mcc on PATH nor in")
    monkeypatch.setenv(driver.LIBRARY_ENV, "libnowhere.so")
    assert "no MUSA driver: libnowhere.so" in driver.missing()
    with pytest.raises(BackendUnavailable):
        driver.Library()
    monkeypatch.setenv(driver.LIBRARY_ENV, "libc.so.6")
    assert driver.missing() == "muInit: libc.so.6 has no such function"


def test_a_simulated_driver_is_simulation_by_whatever_way_it_was_found(tmp_path: Path) -> None:
    """As in ``LD_LIBRARY_PATH``, under the driver's own name."""
    (tmp_path / "libmusa.so").symlink_to(sim.library("musa"))
    (tmp_path / "torch_musa.py").touch()
    code = "from hal_musa.backend import MusaBackend as B; print(B().probe().evidence, B().probe().reason)"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    there = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": path}
    del there[driver.LIBRARY_ENV]
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, timeout=120)
    assert done.stdout == "simulation simulated mp_22\n", done.stdout + done.stderr


def test_the_backend_takes_the_driver_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_musa", types.ModuleType("torch_musa"))
    monkeypatch.setenv(sim.ENV, "musa:mp_31")
    backend = musa.MusaBackend()
    probe = backend.probe()
    assert probe.available and probe.evidence == "simulation"
    assert probe.details["runtime"] == "MUSA driver" and "mp_31" in probe.reason
    assert backend.capabilities().device_types == ("musa",)
    assert backend.adopt(torch.zeros(4)) is None
    monkeypatch.setattr(driver.MusaDevice.__init__, "__defaults__", ("cpu", False))  # where its tensors are here
    args = decode_args(cached()[0])
    args.schedule = None
    backend.mla_decode(args)
    assert agrees(args)
    assert backend.launches()["musa:mla_decode@mp_31"] == 1


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver and torch are asked for it in ways of their own; both say what there is and what to do."""
    device = driver.MusaDevice(0, memory="cpu")
    helps = r"mp_22 has \d+ bytes, \d+ of them free; make the cache, .*; torch.musa.empty_cache\(\) frees"
    with pytest.raises(DeviceError, match=rf"a window of {1 << 60} bytes: .*MUSA_ERROR_OUT_OF_MEMORY.*; {helps}"):
        device.window(1 << 60)
    with pytest.raises(DeviceError, match=rf"torch.empty of {1 << 60} bytes: .*; {helps}"):
        device.empty(1 << 60)


def test_windows_of_other_processes() -> None:
    device = driver.MusaDevice(0, memory="cpu")
    mine = device.window(4096)
    assert mine.handle.size == 4096 and len(mine.handle.data) == 64
    with pytest.raises(DeviceError, match="muIpcOpenMemHandle_v2: MUSA_ERROR_INVALID_VALUE"):
        device.peer(mine.handle)  # this process has it already
    with pytest.raises(DeviceError, match="0 bytes of handle"):
        device.peer(Handle(4096))
    mine.close()
    mine.close()
    with pytest.raises(DeviceError, match="muIpcGetMemHandle"):
        _ = mine.handle


class OnLibmusa:
    """The plugin of a backend whose device is MUSA's driver and whose tensors are the host's."""

    @hookimpl
    def hal_backend(self) -> Backend:
        return portable_backends.OnFibres(driver.MusaDevice(0, memory="cpu"))


on_libmusa = OnLibmusa()


def opened(variables: Toolkit, rank: int) -> None:
    os.environ |= variables
    plugins._registry = plugins.Registry([EntryPoint("libmusa", "test_driver:on_libmusa", plugins.GROUP)])


@pytest.mark.long(4)
def test_expert_parallelism_over_ipc_memory(toolkit: Toolkit) -> None:
    case = Case(backend="libmusa")
    before = partial(opened, toolkit)
    cases = [replace(case, bias=1), replace(case, expand=True, tokens=(0, 9))]
    run_ranks(2, ep_cases.normal, cases, limit=90, before=before)
    three = replace(case, ranks=3, tokens=(5, 0, 9), experts=10)
    run_ranks(3, ep_cases.packed, [(three, "none")], limit=90, before=before)
    run_ranks(2, parting, limit=60, before=before)


def parting(rank: int) -> None:
    """Memory that others may have open is kept until they have closed it."""
    buffer = Case(backend="libmusa").buffer()
    if rank:
        dist.barrier()
    buffer.close()
    ep_node._part()
    assert len(ep_node._parting) == 1 - rank
    if not rank:
        dist.barrier()
    dist.barrier()
    ep_node._part()
    assert not ep_node._parting
