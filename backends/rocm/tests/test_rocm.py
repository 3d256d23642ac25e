"""The ROCm backend: on the simulator, and where there is nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import decode_args
from conforming import conform
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import build
from hal_rocm.backend import RocmBackend, vendor

from hal import plugins
from hal.portable import bindings, ep, sim
from hal.portable.bindings import BoundDevice, Torch
from hal.portable.mla import PortableMla
from hal.reference.mla import mla_decode
from hal.spec.errors import BackendUnavailable
from hal.spec.limits import DENSE_LSE, DENSE_OUT

pytest.importorskip("hip", reason="hip-python is not installed")

SMALL = MlaCase(lengths=(131, 5), h_q=16, d=60, d_v=33, page=7)
CASES = {
    "split, and empty ones": SMALL.but(lengths=(700, 0, 33, 1)),
    "invariant, two heads": SMALL.but(batch_invariant=True, lengths=(600, 90), h_q=20, h_kv=2),
    "ragged and causal": SMALL.but(q_lens=(3, 2, 0, 17), lengths=(80, 0, 9, 65), h_q=6, h_kv=2, causal=True),
    "odd strides": SMALL.but(q_layout="odd", kv_layout="odd", out_layout="padded"),
    "base 2, with a plan, fp16": SMALL.but(lse_base="2", plan=True, dtype="float16"),
    "the usual widths": SMALL.but(lengths=(40,), d=576, d_v=512, page=64),
}
EP = ("EPN-01", "EPN-10", "EPN-20", "EPL-01", "EPL-06")
MLA = ("MLA-01", "MLA-07", "MLA-20", "MLA-22", "MLA-24", "MLA-40")
CHOSEN = ("CAP-01", "CAP-02", "CAP-03", "CAP-04", "CAP-07", *MLA, "MLA-48", "MLA-50", *EP)


@pytest.fixture(scope="module", autouse=True)
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.ENV, "hip:gfx942")
        patch.setenv("HAL_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        plugins.reset()
        yield
    plugins.reset()


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_it_is_there_in_simulation_and_says_so(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, f"hip:{arch}")
    backend = RocmBackend()
    probe = backend.probe()
    assert (probe.available, probe.reason, probe.evidence) == (True, f"simulated {arch}", "simulation")
    assert probe.details["architecture"] == arch and probe.details["lanes of a subgroup"] == "64"
    assert backend.capabilities().device_types == ("cpu",)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gfx936", "gfx936 is a Hygon DCU: install hal-dcu"),
        ("gfx906", "gfx906 is none of gfx90a, gfx942 and gfx950"),
        ("gfx1100", "gfx1100 is none of gfx90a, gfx942 and gfx950"),
    ],
)
def test_other_chips_are_refused(arch: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, f"hip:{arch}")
    probe = RocmBackend().probe()
    assert not probe.available and probe.reason == reason


@pytest.mark.sampled
@pytest.mark.long(1)
@pytest.mark.parametrize("name", CASES)
def test_it_gives_the_reference_and_nothing_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "all")
    monkeypatch.setenv("HAL_SIM_SEED", "5")
    inputs = build(CASES[name], 0)
    outcome = call(inputs, "rocm")
    verdict = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE)
    assert not outcome.problems and verdict.ok


def test_launches_are_counted_by_chip() -> None:
    inputs = build(SMALL, 0)
    before = dict(plugins.select("rocm").backend.launches())
    call(inputs, "rocm")
    after = plugins.select("rocm").backend.launches()
    name = "hip:mla_decode@gfx942"
    assert after[name] == before.get(name, 0) + 1


def test_expert_parallelism_is_declared_as_the_portable_engine_has_it() -> None:
    assert RocmBackend().capabilities().ep == ep.capabilities("ipc")


@pytest.mark.sampled
@pytest.mark.long(10)
def test_the_suite_in_short() -> None:
    assert conform("rocm", CHOSEN)["evidence"] == "simulation"


def doctor(*names: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in (sim.ENV, "ROCM_PATH", "ROCM_HOME")}
    line = [str(Path(sys.executable).with_name("hal")), "doctor", *names, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment | variables, check=False, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (sim.ENV, "hip:gfx94"),
        (sim.ENV, "hip"),
        (sim.ENV, "HIP:gfx942"),
        (sim.ENV, "hip:gfx942 "),
        (sim.CHECK_ENV, "race"),
        (sim.CHECK_ENV, "memory, races"),
        (sim.CHECK_ENV, "all,memory"),
    ],
)
def test_a_mistyped_request_for_the_simulator_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    probe = RocmBackend().probe()
    assert not probe.available and probe.reason.startswith(f"{variable}: got {value!r}"), probe
    assert ("hip:gfx942" if variable == sim.ENV else "memory,races") in probe.reason
    assert probe.fix == f"unset {variable}"


def test_without_a_library_doctor_says_which() -> None:
    said = doctor("rocm", ROCM_PATH="/nowhere", LD_LIBRARY_PATH="")
    assert "libamdhip64.so: cannot open shared object file" in said and "pip install hip-python" in said


def test_a_torch_that_is_not_for_rocm_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # A device that is no simulator's, as far as the backend can see.
    backend = RocmBackend()
    object.__setattr__(backend.runtime, "simulated", False)
    assert torch.version.hip is None
    assert backend.probe().reason == f"torch {torch.__version__} is not built for ROCm"


def test_tensors_of_torch_are_used_in_place_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # As with a torch for ROCm, but that its tensors are the host's, which the simulated device can address too.
    runtime = RocmBackend().runtime
    stream = runtime("StreamCreateWithFlags", 1)
    address = stream.as_c_void_p().value
    monkeypatch.setattr(torch.cpu, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=address))
    device = BoundDevice(runtime, 0, Torch("cpu", "cuda_stream"), vendor().tunings, timed=True)
    torch.manual_seed(0)
    table, lengths = torch.randperm(24).to(torch.int32).view(2, 12), torch.tensor([700, 70], dtype=torch.int32)
    q, cache = (torch.randn(2, 1, 16, 64) / 10).bfloat16(), (torch.randn(24, 64, 1, 64) / 10).bfloat16()
    args = decode_args(q=q, kv_cache=cache, block_table=table, cache_seqlens=lengths, head_dim_v=48)
    args.out.fill_(5.0)
    schedule = PortableMla(device).plan(
        types.SimpleNamespace(geometry=args.geometry(), cache_seqlens=lengths, cu_seqlens_q=None)  # type: ignore[arg-type]
    )
    PortableMla(device).decode(args, schedule)
    assert (args.out == 5.0).all()  # nobody waited, in the driver neither
    runtime("StreamSynchronize", address)
    out, lse = mla_decode(q, cache, table, lengths, head_dim_v=48)
    assert (args.out.double() - out).abs().max() < 8e-4
    assert torch.allclose(args.lse.double(), lse, rtol=0, atol=1e-5)
    assert device.launches() == {f"hip:{name}@gfx942": 1 for name in ("mla_schedule", "mla_decode", "mla_merge")}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"package": "nowhere"}, "the package nowhere does not import: No module named 'nowhere'"),
        ({"package": "json"}, "the package json does not import: module 'json' has no attribute 'hip'"),
        ({"properties": "hipGetDevicePropertiesR9900"}, "the runtime's library lacks hipGetDevicePropertiesR9900"),
    ],
)
def test_what_is_missing_of_the_bindings_is_said(changed: dict[str, str], reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        bindings.load(replace(vendor().bindings(), **changed))


def test_bindings_that_fail_at_their_import_in_any_way_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hip_of_old.py").write_text("raise RuntimeError('built for ROCm 5')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match="the package hip_of_old does not import: built for ROCm 5"):
        bindings.load(replace(vendor().bindings(), package="hip_of_old"))


def test_the_simulator_is_found_although_the_bindings_found_nothing_before() -> None:
    """As in a process that has asked every installed backend whether it is there."""
    code = (
        "import os\n"
        "from hal_rocm.backend import RocmBackend\n"
        "chip = os.environ.pop('HAL_SIM')\n"
        "before = RocmBackend().probe()\n"
        "os.environ['HAL_SIM'] = chip\n"
        "print(before.available, RocmBackend().probe().reason)\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("ROCM_PATH", "ROCM_HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False simulated gfx942\n", done.stdout + done.stderr
