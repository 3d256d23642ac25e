"""What the backend does on the host: what it finds, which tier it chooses, what it compiles and keeps."""

from __future__ import annotations

import contextlib
import ctypes
import json
import stat
import struct
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeTier, decode_args, plan_args
from hal_cuda import calls, compiler, devices, launching, tiers, triton_tier
from hal_cuda.backend import CudaBackend

from hal.portable.runtime import Words
from hal.spec.errors import CompileError, DeviceError, UnsupportedError

cupy = pytest.importorskip("cupy", reason="cupy is not installed")


class _Properties:
    name, multi_processor_count, total_memory = "A Card", 132, 80 << 30


class _Driver:
    """A libcuda of CUDA 13.0."""

    @staticmethod
    def cuDriverGetVersion(number: Any) -> int:  # noqa: N802  (the driver's name)
        ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = 13000
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with everything there; tests take parts away."""
    monkeypatch.delenv(tiers.ENV, raising=False)
    # A copy, since others load libraries of their own meanwhile.
    monkeypatch.setattr(devices, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: _Driver()}))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties())
    return monkeypatch


def _broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, line: str) -> None:
    """A package of this name is installed, whose import does as the line says."""
    (tmp_path / f"{name}.py").write_text(line)
    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise RuntimeError('no libnvrtc\\nat all')", "no libnvrtc"),
        ("raise ImportError()", "ImportError"),
        ("1 / 0", "division by zero"),
    ],
)
@pytest.mark.parametrize("name", ["cupy", "triton"])
def test_a_package_that_fails_at_its_import_costs_its_own_tiers_alone(
    machine: pytest.MonkeyPatch, tmp_path: Path, name: str, line: str, said: str
) -> None:
    _broken(machine, tmp_path, name, line)
    _, out = tiers.load()
    assert out["portable" if name == "cupy" else "triton"] == f"{name} does not import: {said}"
    assert name == "cupy" or "portable" not in out or "triton" not in out["portable"]


def test_an_old_triton_is_named(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _broken(machine, tmp_path, "triton", "__version__ = '3.2.0'")
    assert triton_tier.TritonTier().missing() == "triton 3.2.0 is too old: 3.6 or later is needed"


def test_a_driver_without_a_version_is_no_error(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(devices, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: SimpleNamespace()}))
    assert devices.look().details["driver"] == "of unknown version"


def _no_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_machine_with_everything(machine: pytest.MonkeyPatch) -> None:
    probe = CudaBackend().probe()
    assert (probe.available, probe.reason) == (True, "A Card, sm_90, driver for CUDA 13.0")
    assert probe.details["device 0"] == "A Card, sm_90, 132 processors, 80 GiB"
    assert probe.details["tiers"].split(", ")[-2:] == ["triton", "portable"]
    assert probe.evidence == "hardware"


def test_a_device_without_bf16_in_its_matrix_instructions_has_the_portable_kernels(
    machine: pytest.MonkeyPatch,
) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    probe = CudaBackend().probe()
    assert (probe.available, probe.reason) == (True, "A Card, sm_75, driver for CUDA 13.0")
    assert probe.details["tiers"] == "portable"
    assert "compute capability 8.0" in probe.details["tier triton"]
    # Of two devices each has what it can run.
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (8, 0))[index])
    tier = triton_tier.TritonTier()
    assert tier.missing() == ""
    for index, served in ((0, False), (1, True)):
        call = decode_args()
        call.q = SimpleNamespace(device=torch.device("cuda", index))  # type: ignore[assignment]
        assert (tier.supports(call) == "") is served


def _refusing() -> bool:
    raise RuntimeError("CUDA driver initialization failed\nmore")


@pytest.mark.parametrize(
    ("change", "reason", "fix"),
    [
        (
            lambda m: m.setattr(devices.ctypes, "CDLL", _no_driver),
            "no NVIDIA driver: libcuda.so.1",
            "install the NVIDIA",
        ),
        (lambda m: m.setattr(torch.version, "cuda", None), "is built without CUDA", "install a torch built for CUDA"),
        (lambda m: m.setattr(torch.cuda, "device_count", lambda: 0), "shows no device", "CUDA_VISIBLE_DEVICES"),
        (lambda m: m.setattr(torch.cuda, "device_count", _refusing), "initialization failed", "nvidia-smi"),
        (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda i: (6, 1)), "6.1, the kernels need 7.0", ""),
        (lambda m: m.setenv(tiers.ENV, "abacus"), "HAL_CUDA_TIER: got 'abacus'", "unset HAL_CUDA_TIER"),
        (lambda m: m.setattr(tiers.importlib.util, "find_spec", lambda name: None), "no kernels", "pip install triton"),
    ],
    ids=["no driver", "torch for the CPU", "no device", "driver refuses", "too old", "no such tier", "no compiler"],
)
def test_what_is_missing_is_named_with_its_fix(machine: pytest.MonkeyPatch, change: Any, reason: str, fix: str) -> None:
    change(machine)
    probe = CudaBackend().probe()
    assert not probe.available
    assert reason in probe.reason and "\n" not in probe.reason
    assert fix in probe.fix


def test_packages_that_are_missing_are_shown(machine: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise devices.importlib.metadata.PackageNotFoundError(name)

    machine.setattr(devices.importlib.metadata, "version", none)
    details = CudaBackend().probe().details
    assert (details["triton"], details["cupy"]) == ("missing", "missing")


def test_doctor_and_backends_answer_without_a_driver() -> None:
    if torch.cuda.is_available():
        pytest.skip("not applicable: this machine has a device")
    done = subprocess.run([sys.executable, "-m", "hal", "doctor", "cuda", "--json"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)["backends"]
    assert found["state"] == "unavailable" and not found["works"]
    assert "libcuda.so.1" in found["reason"] and found["fix"]
    assert found["details"]["triton"] not in ("", "missing")
    listed = subprocess.run([sys.executable, "-m", "hal", "backends", "--json"], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    document = json.loads(listed.stdout)
    states = {b["name"]: b["state"] for b in document["backends"]}
    assert states["cuda"] == "unavailable"
    assert document["in_force"]["name"] != "cuda"


def test_making_the_backend_imports_no_compiler() -> None:
    code = "import sys, hal_cuda.plugin as p; p.hal_backend(); print(sorted({'triton', 'cupy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_what_works_is_declared() -> None:
    declared = CudaBackend().capabilities()
    assert declared.device_types == ("cuda",)
    assert declared.ep is not None and declared.mla_sparse is None
    assert declared.mla_dense is not None and declared.mla_dense.kv_formats == ("plain",)


def _backend(*made: FakeTier) -> CudaBackend:
    backend = CudaBackend()
    backend.__dict__["_loaded"] = (list(made), {})
    return backend


def test_the_first_tier_that_can_decodes_with_its_own_plan() -> None:
    fast, sure = FakeTier("fast", refuses=(torch.float16,)), FakeTier("sure")
    backend = _backend(fast, sure)
    for dtype in (torch.bfloat16, torch.float16):
        schedule = backend.mla_plan(plan_args(dtype))
        backend.mla_decode(_with(decode_args(dtype), schedule))
    assert (fast.schedules, sure.schedules) == ([("fast", 1)], [("sure", 1)])
    backend.mla_decode(decode_args())
    assert fast.schedules[-1] is None
    assert backend.launches() == {"fake:fast@sm_0": 2, "fake:sure@sm_0": 1}


def test_a_call_beyond_the_planning_tier_is_planned_once_by_the_next() -> None:
    fast, sure = FakeTier("fast", refuses_decode=True), FakeTier("sure")
    backend = _backend(fast, sure)
    schedule = backend.mla_plan(plan_args())
    for _ in range(3):
        backend.mla_decode(_with(decode_args(), schedule))
    assert fast.calls == {"plan": 1} and sure.calls == {"plan": 1, "decode": 3}


def test_a_call_no_tier_can_do_says_why() -> None:
    backend = _backend(FakeTier("fast", refuses=(torch.float16,)))
    with pytest.raises(UnsupportedError, match=r"fast: torch\.float16"):
        backend.mla_decode(decode_args(torch.float16))


def _with(args: Any, schedule: object) -> Any:
    args.schedule = schedule
    return args


@pytest.mark.parametrize("name", list(tiers.ORDER))
def test_a_tier_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiers.ENV, name)
    usable, out = tiers.load()
    assert [tier.name for tier in usable] in ([name], [])
    assert all(out[other] == f"{tiers.ENV}={name}" for other in tiers.ORDER if other != name)


def test_a_tier_that_does_not_import_is_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("broken_tier")
    broken.Broken = lambda: (_ for _ in ()).throw(ImportError("libmissing.so"))  # type: ignore[attr-defined]
    broken.__spec__ = types.SimpleNamespace(name="broken_tier")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "broken_tier", broken)
    monkeypatch.setattr(tiers, "ORDER", {"broken": ("broken_tier", "Broken")})
    monkeypatch.delenv(tiers.ENV, raising=False)
    assert tiers.load() == ([], {"broken": "does not import: libmissing.so"})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiler.CACHE_ENV, str(tmp_path))
    return tmp_path / "cuda" / "sm_90a"


KERNEL = 'extern "C" __global__ void fill(float* to, float value) { to[threadIdx.x] = value; }\n'


def test_code_is_compiled_once_and_kept_by_its_content(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "fill.cu"
    source.write_text(KERNEL)
    made = compiler.compile_source(source, "sm_90a")
    assert made[:4] == b"\x7fELF"
    (kept,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = kept.stat().st_ino
    assert compiler.compile_source(source, "sm_90a") == made
    assert kept.stat().st_ino == before
    kept.write_bytes(b"what was damaged")
    assert compiler.compile_source(source, "sm_90a") == made
    assert kept.stat().st_ino != before
    for change in (
        lambda: compiler.compile_source(source, "sm_90a", ["--use_fast_math"]),
        lambda: compiler.compile_source(source, "sm_90a", headers={"a.h": "int a;"}),
        lambda: source.write_text(KERNEL + "// changed") and compiler.compile_source(source, "sm_90a"),
    ):
        assert change()[:4] == b"\x7fELF"
    assert len(list(cache.iterdir())) == 4


def test_headers_are_found(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "with_header.cu"
    source.write_text('#include "value.h"\nextern "C" __global__ void fill(float* to) { to[0] = VALUE; }\n')
    assert compiler.compile_source(source, "sm_90a", headers={"value.h": "#define VALUE 1.0f\n"})[:4] == b"\x7fELF"


def test_a_folder_others_can_write_to_is_not_trusted(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o770)
    source = tmp_path / "fill.cu"
    source.write_text(KERNEL)
    with pytest.warns(UserWarning, match=f"others can write to {cache} .*, or set {compiler.CACHE_ENV} to a folder"):
        assert compiler.compile_source(source, "sm_90a")[:4] == b"\x7fELF"
    assert not list(cache.iterdir())


def test_a_compile_error_carries_log_and_path(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text(KERNEL.replace("value;", "valve;"))
    with pytest.raises(CompileError) as caught:
        compiler.compile_source(source, "sm_90a")
    assert caught.value.source_path == str(source)
    assert 'identifier "valve" is undefined' in caught.value.log
    assert "wrong.cu(1)" in caught.value.log


@pytest.mark.parametrize("word", ["value;", "valve;"], ids=["compiles", "does not"])
def test_the_compilers_memory_is_given_back(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    create, destroy = cupy.cuda.nvrtc.createProgram, cupy.cuda.nvrtc.destroyProgram
    monkeypatch.setattr(cupy.cuda.nvrtc, "createProgram", lambda *given: left.append(create(*given)) or left[-1])
    monkeypatch.setattr(cupy.cuda.nvrtc, "destroyProgram", lambda one: left.remove(one) or destroy(one))
    with pytest.raises(CompileError) if word == "valve;" else contextlib.nullcontext():
        compiler._compile(KERNEL.replace("value;", word), Path("fill.cu"), ("-arch=sm_90a",), {})
    assert not left


def test_a_refused_call_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("not applicable: this machine has a device")
    with pytest.raises(DeviceError, match=r"cuModuleLoad: .*libcuda"):
        calls.checked("cuModuleLoad", cupy.cuda.driver.moduleLoad, "nowhere.cubin")


def test_kernels_are_launched_with_addresses_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments lie in memory like the members of a struct, so that the driver finds each where the kernel wants it."""
    log: list[Any] = []
    loaded = types.SimpleNamespace(
        load=log.append, get_function=lambda name: log.append(name) or types.SimpleNamespace(ptr=7)
    )
    monkeypatch.setattr("cupy.cuda.function.Module", lambda: loaded)
    monkeypatch.setattr(cupy.cuda, "runtime", types.SimpleNamespace(setDevice=lambda index: None))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=99))

    def launched(*given: int) -> None:
        words = ctypes.cast(given[-1], ctypes.POINTER(ctypes.c_void_p * 5)).contents
        assert (words[0], words[2], words[4]) == (1, 2, None)
        size = ctypes.c_size_t.from_address(words[3]).value
        log.append((given[:-1], ctypes.string_at(words[1], size)))

    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", launched, raising=False)
    tensor = torch.zeros(3)
    module = launching.Module(b"code", 0)
    given = [tensor, Words((5, -6, 7)), 8, np.int32(9), np.int64(10), np.float32(0.5)]
    for _ in range(2):
        module.launch("fill", (2, 1, 1), (32, 1, 1), given)
    packed = struct.pack("<q3i4xqi4xqf", tensor.data_ptr(), 5, -6, 7, 8, 9, 10, 0.5)
    call = ((7, 2, 1, 1, 32, 1, 1, 0, 99, 0), packed)
    assert log == [b"code", "fill", call, call]


def test_a_launch_that_the_driver_refuses_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: int) -> None:
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    monkeypatch.setattr(launching, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", refused, raising=False)
    module = launching.Module(b"", 0)
    module._module, module._functions["fill"] = object(), types.SimpleNamespace(ptr=1)
    with pytest.raises(DeviceError, match=r"cuLaunchKernel\(fill\): RuntimeError: CUDA_ERROR_INVALID_VALUE"):
        module.launch("fill", (1, 1, 1), (32, 1, 1), [])
