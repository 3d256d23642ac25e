"""The backend in its process: environment variables, threads, forks, launch counts, the build without a compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_cases import Kernel, TorchKernel, check, decode, make, make_args
from hal_cpu import ep
from hal_cpu.backend import CpuBackend

from hal.spec.errors import SpecError

PROJECT = Path(__file__).parents[1]


def python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = "from hal_cpu.backend import CpuBackend; p = CpuBackend().probe(); print(p.available, p.reason, p.fix, sep='|')"


def test_importing_the_plugin_loads_no_native_code() -> None:
    code = "import sys, hal_cpu.plugin as p; p.hal_backend(); print('hal_cpu._native' in sys.modules)"
    assert python(code) == "False"


def test_probe_says_what_runs(native: Kernel) -> None:
    probe = CpuBackend().probe()
    assert probe.available and probe.evidence == "hardware"
    assert probe.details["kernel"] == "native"
    assert probe.details["isa"] in probe.details["isas available"]
    assert int(probe.details["threads"]) >= 1 and probe.details["compiler"]


def test_every_isa_can_be_forced(native: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in native._native.isas():
        monkeypatch.setenv("HAL_CPU_ISA", isa)
        probe = CpuBackend().probe()
        assert probe.available and probe.details["isa"] == isa and isa in probe.reason


WRONG = [("HAL_CPU_ISA", "mmx"), ("HAL_CPU_THREADS", "0"), ("HAL_CPU_THREADS", "x"), ("HAL_CPU_THREADS", "99999")]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_variable_is_explained(native: Kernel, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    backend = CpuBackend()
    probe = backend.probe()
    assert not probe.available and probe.fix == f"unset {name}"
    assert name in probe.reason and value in probe.reason
    if name == "HAL_CPU_ISA":
        assert all(isa in probe.reason for isa in native._native.isas())
    with pytest.raises(SpecError, match=name):
        backend.mla_decode(make_args(make([20], h_q=2)))


def test_threads_follow_the_variable_else_torch(native: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CPU_THREADS", "3")
    assert CpuBackend().probe().details["threads"] == "3"
    monkeypatch.delenv("HAL_CPU_THREADS")
    assert CpuBackend().probe().details["threads"] == str(torch.get_num_threads())


def test_launches_are_counted_by_isa(isa: Kernel) -> None:
    backend = CpuBackend()
    backend.__dict__["_kernel"] = isa
    key = f"cpu:mla_decode_{isa._native.isa()}@cpu"
    before = backend.launches().get(key, 0)
    decode(isa, make([20], h_q=2))
    assert backend.launches()[key] == before + 1
    with pytest.raises(SpecError):
        decode(isa, make([20], h_q=2).with_(cache_seqlens=torch.tensor([-1], dtype=torch.int32)))
    assert backend.launches()[key] == before + 1


def test_the_torch_path_is_named_and_declares_less() -> None:
    backend = CpuBackend()
    backend.__dict__["_kernel"] = TorchKernel("no compiler")
    probe = backend.probe()
    assert probe.available
    assert probe.details["kernel"] == "torch path: no compiler"
    assert "compiler" in probe.fix
    dense = backend.capabilities().mla_dense
    assert dense is not None and not dense.batch_invariant
    backend.mla_decode(make_args(make([20], h_q=2)))
    assert backend.launches() == {"cpu:mla_decode_torch@cpu": 1}


def test_expert_parallel_is_declared_where_it_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend()
    declared = backend.capabilities().ep
    assert (declared is None) == (ep.missing() is not None)
    monkeypatch.setattr(ep, "missing", lambda: "no compiler")
    assert backend.capabilities().ep is None


def test_a_forked_child_computes(native: Kernel) -> None:
    # Fork with the pool awake, from a process whose locks its workers may hold at that moment.
    native._threads = 4
    case = make([5000], h_q=32, d=64, d_v=64)
    out, _ = decode(native, case)
    for _ in range(10):
        decode(native, case)
        child = os.fork()
        if child == 0:
            os._exit(0 if decode(native, case)[0].equal(out) else 1)
        deadline = time.monotonic() + 30
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.005)
        if done == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        assert os.waitstatus_to_exitcode(done[1]) == 0


# Prints, for each decode, whether it was right, and how many threads there are more than before the first.
BORROW = """
import os, sys, threading
sys.path.insert(0, {tests!r})
import torch
from cpu_cases import decode, make
from hal_cpu.backend import CpuBackend
torch.set_num_threads(2)
kernel, case = CpuBackend()._kernel, make([400] * 8, h_q=32, d=64, d_v=64, batch_invariant=True)
big = torch.ones(1 << 20)
big.exp()
wanted = []
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
def once():
    out, _ = decode(kernel, case)
    wanted.append(out)
    print(out.equal(wanted[0]), count() - before)
"""


def borrowing(code: str, **env: str) -> list[str]:
    tests = str(Path(__file__).parent)
    return python(BORROW.format(tests=tests) + code, HAL_CPU_THREADS="", **env).split()


def test_torchs_threads_are_borrowed_while_they_are_awake(native: Kernel) -> None:
    # Asleep after each of its operations, they are only asked who they are.
    asleep = borrowing("for _ in range(20): once()", OMP_WAIT_POLICY="passive")
    assert asleep[::2] == ["True"] * 20 and asleep[1] == "0" and asleep[-1] == "1"
    # Never asleep: one of ours is made only if theirs are held up just then.
    awake = borrowing("for _ in range(100): big.exp(); once()", OMP_WAIT_POLICY="active")
    assert awake[::2] == ["True"] * 100 and awake[1] == "0"


def test_torchs_threads_may_become_more_and_fewer(native: Kernel) -> None:
    code = """
for threads in (2, 3, 1, 2, 2, 4, 2):
    torch.set_num_threads(threads)
    big.exp()
    once()
    once()
for _ in range(3):
    other = threading.Thread(target=lambda: (big.exp(), once()))
    other.start()
    other.join()
"""
    assert borrowing(code, OMP_WAIT_POLICY="active")[::2] == ["True"] * 17


def test_a_child_of_a_process_with_torchs_threads_has_its_own(native: Kernel) -> None:
    code = """
for _ in range(5):
    once()
    sys.stdout.flush()
    if os.fork() == 0:
        once()
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
    assert borrowing(code, OMP_WAIT_POLICY="active")[::2] == ["True"] * 10
    # The library is loaded in the child alone, whose torch cannot compute with several threads any more.
    late = """
import os, sys
import torch
torch.set_num_threads(2)
big = torch.ones(1 << 20)
big.exp()
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.path.insert(0, {tests!r})
from cpu_cases import decode, make
from hal_cpu.backend import CpuBackend
torch.set_num_threads(1)
kernel, case = CpuBackend()._kernel, make([5000], h_q=32, d=64, d_v=64)
torch.set_num_threads(2)
print(decode(kernel, case)[0].equal(decode(kernel, case)[0]))
sys.stdout.flush()
os._exit(0)
"""
    assert python(late.format(tests=str(Path(__file__).parent))) == "True"


def test_threads_of_the_caller_do_not_disturb_each_other(native: Kernel) -> None:
    native._threads = 3
    cases = [make([2000 + i, 50], h_q=20, d=64, d_v=64, seed=i) for i in range(4)]
    wanted = [decode(native, case)[0] for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not decode(native, cases[i])[0].equal(wanted[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_interpreter_runs_on_during_a_call(native: Kernel) -> None:
    native._threads = 1
    case = make([60000], h_q=128)
    ticks = 0
    done = threading.Event()

    def work() -> None:
        args = make_args(case)
        native.decode(args)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    worker.join()
    assert ticks > 10


def test_workers_sleep_when_idle(native: Kernel) -> None:
    native._threads = 8
    check(native, make([5000], h_q=32, d=64, d_v=64))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


def test_the_steady_state_keeps_its_memory(native: Kernel) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    native._threads = 4
    cases = [make([3000, 10], h_q=64), make([100] * 5, h_q=128)]
    arguments = [make_args(case) for case in cases]
    for _ in range(5):
        for args in arguments:
            native.decode(args)
    growth = []
    for _ in range(5):
        before = resident()
        for _ in range(10):
            for args in arguments:
                native.decode(args)
        growth.append(resident() - before)
    # A worker that wakes late makes its workspace once; what leaks grows in every window.
    assert min(growth) < 1 << 20, growth


def test_it_installs_without_a_compiler(tmp_path: Path) -> None:
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not installed: pip install 'hal-cpu[dev]'")
    nothing = tmp_path / "bin"
    nothing.mkdir()
    build = f"""
import os, sys
from scikit_build_core import build
os.chdir({str(PROJECT)!r})
print("built", build.build_wheel({str(tmp_path)!r}, {{"build-dir": {str(tmp_path / "build")!r}}}))
"""
    env = {"PATH": f"{Path(sys.executable).parent}:{nothing}", "CXX": "/nonexistent", "CMAKE_BUILD_PARALLEL_LEVEL": "1"}
    done = subprocess.run([sys.executable, "-c", build], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    # Unpacked by hand and first on the path, it hides the package under test.
    use = f"""
import sys, zipfile
zipfile.ZipFile({str(wheel)!r}).extractall({str(tmp_path / "site")!r})
sys.meta_path = [finder for finder in sys.meta_path if "hal_cpu" not in str(getattr(finder, "known_source_files", ""))]
sys.path.insert(0, {str(tmp_path / "site")!r})
import hal_cpu
assert hal_cpu.__file__.startswith({str(tmp_path)!r}), hal_cpu.__file__
{SHOW}
"""
    assert "torch" in python(use, HAL_CPU_ISA="")
