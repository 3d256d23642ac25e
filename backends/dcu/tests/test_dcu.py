"""The DCU backend: on the simulator, with a DTK that is none, and without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conforming import conform
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import build
from hal_dcu import backend as dcu

from hal import plugins
from hal.portable import ep, sim
from hal.spec.errors import BackendUnavailable
from hal.spec.limits import DENSE_LSE, DENSE_OUT

pytest.importorskip("hip", reason="hip-python is not installed")


@pytest.fixture(scope="module", autouse=True)
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sim.ENV, "hip:gfx936")
        patch.setenv("HAL_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        plugins.reset()
        yield
    plugins.reset()


@pytest.mark.parametrize("arch", ["gfx926", "gfx928", "gfx936"])
def test_it_is_there_in_simulation_and_says_so(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, f"hip:{arch}")
    probe = dcu.DcuBackend().probe()
    assert (probe.available, probe.reason, probe.evidence) == (True, f"simulated {arch}", "simulation")
    assert probe.details["lanes of a subgroup"] == "64"


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gfx942", "gfx942 is an AMD card, no Hygon DCU: install hal-rocm"),
        ("gfx1100", "gfx1100 is an AMD card, no Hygon DCU: install hal-rocm"),
        ("gfx906", "gfx906 in simulation is AMD's: install hal-rocm, or simulate gfx936"),
    ],
)
def test_cards_of_amd_are_refused(arch: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, f"hip:{arch}")
    probe = dcu.DcuBackend().probe()
    assert not probe.available and probe.reason == reason


@pytest.mark.sampled
@pytest.mark.long(4)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_gives_the_reference_and_nothing_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.CHECK_ENV, "all")
    case = MlaCase(lengths=(700, 0, 33, 1), h_q=16, d=60, d_v=33, page=7, dtype=dtype, causal=True, s_q=2)
    inputs = build(case, 0)
    outcome = call(inputs, "dcu")
    verdict = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE)
    assert not outcome.problems and verdict.ok
    assert "hip:mla_decode@gfx936" in plugins.select("dcu").backend.launches()


def test_expert_parallelism_is_declared_as_the_portable_engine_has_it() -> None:
    assert dcu.DcuBackend().capabilities().ep == ep.capabilities("ipc")


@pytest.mark.long(6)
@pytest.mark.sampled
def test_the_suite_in_short() -> None:
    assert conform("dcu", ("CAP-01", "CAP-03", "MLA-01", "EPN-01", "EPL-01"))["evidence"] == "simulation"


@pytest.mark.parametrize("below", ["hip/lib", "lib"])
def test_libraries_of_dtk_are_found_under_their_own_names(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(sim.ENV)
    monkeypatch.setenv(dcu.HOME_ENV, str(tmp_path))
    folder = tmp_path / below
    folder.mkdir(parents=True)
    runtime = folder / "libgalaxyhip.so.5"
    with pytest.raises(BackendUnavailable, match=r"no DTK: libgalaxyhip\.so\.5 is neither in .*hip/lib nor in .*lib"):
        dcu.bindings()
    runtime.touch()
    assert dcu.bindings().files == dict.fromkeys(("libamdhip64.so", "libhiprtc.so"), str(runtime))
    (folder / "libhiprtc.so").touch()
    assert dcu.bindings().files["libhiprtc.so"] == str(folder / "libhiprtc.so")


def test_without_dtk_the_probe_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sim.ENV)
    monkeypatch.setenv(dcu.HOME_ENV, str(tmp_path))
    probe = dcu.DcuBackend().probe()
    assert not probe.available and str(tmp_path) in probe.reason and dcu.HOME_ENV in probe.fix
