"""``hal new-backend``: what it makes for every runtime, as a vendor finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distributions import Interpreter, suite_site

from hal.cli.new_backend import generate, runtimes
from hal.portable import host, sim
from hal.spec.errors import SpecError

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = Path(__file__).parent / "simulated_vendor"
NAMES = {"host": "ada", "opencl": "bob", "cuda-like": "cyd", "hip-like": "dee"}
DECLARED = {
    "from hal.spec.capability import Capabilities": "from hal.spec.capability import Capabilities, plain_dense",
    "mla_dense=None": 'mla_dense=plain_dense(("float32",))',
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backend of every runtime."""
    folder = tmp_path_factory.mktemp("made")
    assert set(runtimes()) == set(NAMES)
    for runtime, name in NAMES.items():
        generate(name, runtime, folder / name)
    return folder


@pytest.fixture(scope="module")
def vendors(made: Path, bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Sees them installed, and the suite."""
    folder = tmp_path_factory.mktemp("vendors")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--isolated", "--no-deps", "--no-index", "--no-compile"]
    target = folder / "installed"
    paths = [str(made / name) for name in NAMES.values()]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), *paths], check=True, timeout=120)
    return bare.seeing(target, suite_site(bare, folder / "suite"))


def edited(vendors: Interpreter, name: str, folder: Path, changes: dict[str, dict[str, str]]) -> Interpreter:
    """One that sees a vendor after these edits of its files."""
    package = folder / f"hal_{name}"
    package.mkdir()
    for path in (vendors.folders[0] / f"hal_{name}").iterdir():
        text = path.read_text()
        for old, new in changes.get(path.name, {}).items():
            assert text.count(old) == 1, (path.name, old)
            text = text.replace(old, new)
        (package / path.name).write_text(text)
    return vendors.seeing(folder)


@pytest.mark.parametrize("name", ["x1", "a" * 20])
def test_it_is_clean_whatever_the_name(name: str, tmp_path: Path) -> None:
    for runtime in runtimes():
        generate(name, runtime, tmp_path / runtime)
        for options in ([], ["--config", str(ROOT / "pyproject.toml")]):
            for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
                line = [sys.executable, "-m", "ruff", *command, *options]
                done = subprocess.run(line, cwd=tmp_path / runtime, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
        left = [p for p in (tmp_path / runtime).rglob("*") if p.is_file() and "acme" in f"{p}{p.read_text()}".lower()]
        assert not left


@pytest.mark.parametrize(
    ("name", "runtime", "out", "said"),
    [
        ("", "host", "new", "NAME: got ''; legal: 2 to 20 lowercase letters and digits"),
        ("a", "host", "new", "NAME: got 'a'; legal: 2 to 20 lowercase"),
        ("my-chip", "host", "new", "NAME: got 'my-chip'"),
        ("../up", "host", "new", "NAME: got '../up'"),
        ("Ada", "host", "new", "NAME: got 'Ada'"),
        ("9lives", "host", "new", "NAME: got '9lives'"),
        ("a" * 21, "host", "new", "legal: 2 to 20"),
        ("conformance", "host", "new", "a name that is not taken: hal-conformance is installed"),
        ("ada", "abacus", "new", "--runtime: got 'abacus'; legal: cuda-like or hip-like or host or opencl"),
        ("ada", "host", "full", "a folder that is new or empty"),
        ("ada", "host", "full/file", "a folder that can be made: File exists"),
        ("ada", "host", "full/file/below", "a folder that can be made: Not a directory"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    name: str, runtime: str, out: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(SpecError) as caught:
        generate(name, runtime, tmp_path / out)
    assert said in str(caught.value)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    folder = tmp_path
    while len(f"{folder}") < 3800:
        folder /= "a" * 200
    folder /= "a" * (4080 - len(f"{folder}"))
    with pytest.raises(SpecError, match="a folder that can be written to: File name too long"):
        generate("eve", "host", folder)


def test_the_command_says_what_to_type_next_and_refuses_with_2(vendors: Interpreter, tmp_path: Path) -> None:
    folder = tmp_path / "hal-eve"
    good, again, taken, unknown = vendors.hal_each(
        (f"new-backend eve --out {folder}", {}),
        (f"new-backend eve --out {folder}", {}),
        (f"new-backend ada --out {tmp_path / 'other'}", {}),
        ("new-backend eve --runtime abacus", {}),
    )
    assert good[0] == 0 and f"pip install -e {folder}\n" in good[1] and "hal conform --backend eve --quick" in good[1]
    assert (folder / "hal_eve" / "py.typed").exists() and (folder / ".github" / "workflows" / "ci.yml").exists()
    assert again[0] == taken[0] == unknown[0] == 2


def test_the_installed_backends_say_why_they_are_in_or_out(vendors: Interpreter) -> None:
    listed, doctored, conformed = vendors.hal_each(
        ("backends --json", {}), ("doctor ada --json", {}), ("conform --backend cyd --quick", {})
    )
    states = {row["name"]: row for row in json.loads(listed[1])["backends"]}
    assert states["ada"]["state"] == "available" and states["ada"]["evidence"] == "simulation"
    assert json.loads(doctored[1])["backends"][0]["checks"][0]["verdict"] == "NOT RUN" and doctored[0] == 1
    assert conformed[0] == 2 and "cyd is not available on this machine" in conformed[2]
    assert "next step" in conformed[1] and "hal_cyd/driver.py:" in conformed[1]
    code = "import json, hal_conformance.next_step as n; print(json.dumps([n.unavailable(b) for b in ('bob', 'dee')]))"
    steps = dict(zip(("bob", "dee"), json.loads(vendors.script(code)), strict=True))
    for name, missing in (("bob", "OpenCL platform"), ("cyd", "libcyd.so"), ("dee", "libdee.so")):
        assert states[name]["state"] == "unavailable" and missing in states[name]["reason"]
        assert f"HAL_{name.upper()}_" in states[name]["fix"]
        assert name == "cyd" or (f"hal_{name}/driver.py:" in steps[name][-1] and ": write " in steps[name][-1])


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of two vendors, and the compilers they name."""
    folder = tmp_path_factory.mktemp("toolkit")
    for name in ("cyd", "dee"):
        compiler = folder / f"{name}cc"
        compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {SIMULATED / "compiler.py"} "$@"\n')
        compiler.chmod(0o755)
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-DNAME={name}", f'-DCOMPILER="{compiler}"']
        library = ["-o", str(folder / f"lib{name}.so"), str(SIMULATED / "library.cpp"), "-ldl"]
        subprocess.run([host.compiler(), *flags, *library], check=True)
    return folder


_DRIVEN = """
import json, numpy as np, torch, hal
from concurrent.futures import ThreadPoolExecutor
from hal import plugins
from hal.portable.runtime import Source
from hal.spec.errors import DeviceError, CompileError
from hal_NAME import driver
from hal.reference.mla import mla_decode

device = driver.opened(0)
device._timed = True
folder = FOLDER
kernel = "HAL_KERNEL(8) void mine(HAL_GLOBAL float *to, float value) {\\n  to[HAL_THREAD] = value;\\n}\\n"
(folder / "mine.h").write_text(kernel)
(folder / "wrong.h").write_text(kernel.replace("= value", "= valve"))
to = torch.zeros(8)
program = device.build(Source((str(folder / "mine.h"),), ()))
seconds = device.launch(program, "mine", 1, 8, (to, np.float32(2))).seconds()
with ThreadPoolExecutor() as others:
    others.submit(device.launch, program, "mine", 1, 8, (to, np.float32(3))).result()
said = []
for wrong in (
    lambda: device.launch(program, "other", 1, 8, ()),
    lambda: device.build(Source((str(folder / "wrong.h"),), ())),
    lambda: driver.opened(1),
    lambda: device.library("NoSuchCall"),
):
    try:
        wrong()
        said.append("nothing")
    except (DeviceError, CompileError) as error:
        said.append(f"{type(error).__name__}: {error}")

DECODE
print(json.dumps([to.tolist(), seconds, said, (out - expected).abs().max().item(), counted]))
"""

# The decode is the same on both, and takes seconds to compile.
_DECODE = {
    "cuda-like": """
torch.manual_seed(0)
q, cache = torch.randn(2, 1, 4, 64), torch.randn(4, 16, 1, 64)
table, lengths = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([20, 5], dtype=torch.int32)
given = (q, cache, table, lengths)
out, _ = hal.mla_decode(*given, head_dim_v=64, backend="NAME")
expected, _ = mla_decode(*given, head_dim_v=64)
counted = {**device.launches(), **plugins.select("NAME").backend.launches()}
""",
    "hip-like": "out = expected = to\ncounted = device.launches()",
}


@pytest.mark.sampled
@pytest.mark.long(8)
@pytest.mark.parametrize("runtime", ["cuda-like", "hip-like"])
def test_a_driver_runs_on_a_library_with_its_names(
    runtime: str, vendors: Interpreter, toolkit: Path, tmp_path: Path
) -> None:
    name = NAMES[runtime]
    dialect = {"cuda-like": "musa", "hip-like": "hip"}[runtime]
    of_host = {f'DIALECT: Final = "{dialect}"': 'DIALECT: Final = "host"'}
    seen = edited(vendors, name, tmp_path, {"driver.py": of_host, "backend.py": DECLARED})
    environment: dict[str, str] = {
        f"HAL_{name.upper()}_LIBRARY": str(toolkit / f"lib{name}.so"),
        "PATH": f"{toolkit}:{vendors.environment()['PATH']}",
        "HAL_KERNEL_CACHE": str(tmp_path / "cache"),
    }
    script = (
        _DRIVEN.replace("DECODE", _DECODE[runtime])
        .replace("NAME", name)
        .replace("FOLDER", f"__import__('pathlib').Path({str(tmp_path)!r})")
    )
    filled, seconds, said, error, launches = json.loads(seen.script(script, **environment))
    assert filled == [3.0] * 8 and 0 < seconds < 10
    assert said[0].startswith("DeviceError: ") and "ModuleGetFunction: NOT_FOUND (500)" in said[0]
    assert said[1].startswith("CompileError: ") and "wrong.h:2" in said[1] and "valve" in said[1]
    assert "INVALID_DEVICE (101)" in said[2]
    assert f"has no such function; what names begin with, '{name}', is written in hal_{name}/driver.py" in said[3]
    assert error < 1e-5
    decoding = ("mla_schedule", "mla_decode", "mla_merge") if runtime == "cuda-like" else ()
    assert sorted(key.partition("@")[0] for key in launches) == sorted(
        f"{name}:{kernel}" for kernel in ("mine", *decoding)
    )


def test_another_vendors_opencl_is_simulation(vendors: Interpreter) -> None:
    pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    environment = {"HAL_BOB_SIMULATE": "1", "HAL_OPENCL_PLATFORM": "Portable Computing Language"}
    ((code, out, errors),) = vendors.hal_each(("backends --json", environment))
    assert code == 0, errors
    bob = next(row for row in json.loads(out)["backends"] if row["name"] == "bob")
    assert (bob["state"], bob["evidence"]) == ("available", "simulation")
    assert "Portable Computing Language" in bob["details"]["platform"]


@pytest.mark.sampled
@pytest.mark.long(6)
@pytest.mark.timeout(600)
def test_declared_expert_parallelism_conforms(vendors: Interpreter, tmp_path: Path) -> None:
    # The first call compiles, on a machine that may be busy: hence the patience.
    declared = {
        "        from hal_ada import driver\n\n        # step CAP-04": "        from hal.portable import ep\n\n"
        "        from hal_ada import driver\n\n        # step CAP-04",
        "ep=None": 'ep=ep.capabilities("shm")',
    }
    seen = edited(vendors, "ada", tmp_path, {"backend.py": declared})
    line = ["conform", "--backend", "ada", "--quick", "--patience", "6", "--out", str(tmp_path / "out")]
    only = [word for one in ("CAP-04", "EPN-01", "EPN-10") for word in ("--only", one)]
    done = seen.hal(*line, *only, timeout=500, HAL_KERNEL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {row["id"]: row["status"] for row in report["obligations"] if row["status"] != "SKIPPED"}
    assert found == dict.fromkeys(("CAP-04", "EPN-01", "EPN-10"), "PASS")


# Of the drivers as they come, for the device simulator in the place of a vendor's library.
_TO_SIMULATOR = {
    "cuda-like": {
        'PREFIX: Final = "cyd"': 'PREFIX: Final = "mu"',
        'COMPILER: Final = "cydcc"': 'COMPILER: Final = "mcc"',
        'SUFFIX: Final = ".cu"': 'SUFFIX: Final = ".mu"',
        '"-O2", "--cubin"': '"-O2", "-x", "musa", "--cuda-device-only"',
        'ARCHITECTURE: Final = "sm_"': 'ARCHITECTURE: Final = "mp_"',
        'f"-arch={': 'f"--offload-arch={',
    },
    "hip-like": {
        'PREFIX: Final = "dee"': 'PREFIX: Final = "hip"',
        'COMPILER_PREFIX: Final = "deertc"': 'COMPILER_PREFIX: Final = "hiprtc"',
    },
}
_ALL_OF_IT = {
    "from hal.spec.capability import Capabilities": "from hal.spec.capability import Capabilities, plain_dense",
    "        from hal_NAME import driver\n\n        # step CAP-04": "        from hal.portable import ep\n\n"
    "        from hal_NAME import driver\n\n        # step CAP-04",
    "mla_dense=None": "mla_dense=plain_dense()",
    "ep=None": 'ep=ep.capabilities("ipc")',
}


@pytest.mark.sampled
@pytest.mark.long(45)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("runtime", "chip"), [("cuda-like", "musa:mp_31"), ("hip-like", "hip:gfx942")])
def test_a_fresh_backend_reaches_l1_and_e1_on_the_simulator(
    runtime: str, chip: str, vendors: Interpreter, tmp_path: Path
) -> None:
    name = NAMES[runtime]
    edits = {old.replace("NAME", name): new.replace("NAME", name) for old, new in _ALL_OF_IT.items()}
    changes = {"driver.py": _TO_SIMULATOR[runtime], "backend.py": edits}
    assert sum(1 + new.count("\n") for change in changes.values() for new in change.values()) <= 30
    seen = edited(vendors, name, tmp_path, changes)
    line = ["conform", "--backend", name, "--quick", "--patience", "6", "--out", str(tmp_path / "out")]
    chosen = ("L0", "L1", "E1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mcc").symlink_to(sim.program("mcc"))
    environment = {
        sim.ENV: chip,
        "PATH": f"{tmp_path / 'bin'}:{vendors.environment()['PATH']}",
        f"HAL_{name.upper()}_LIBRARY": str(sim.library(chip.partition(":")[0])),
        "HAL_KERNEL_CACHE": str(tmp_path / "cache"),
    }
    done = seen.hal(*line, *(word for one in chosen for word in ("--only", one)), timeout=500, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {row["id"]: row["verdict"] for row in report["levels"] if row["id"] in chosen}
    assert found == dict.fromkeys(chosen, "PASS")
    assert report["backend"]["evidence"] == "simulation"


@pytest.mark.sampled
@pytest.mark.long(4)
def test_its_own_tests_pass_as_it_comes(vendors: Interpreter, made: Path) -> None:
    tests = [str(made / name / "tests") for name in NAMES.values()]
    line = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(made)]
    done = vendors.run(*line, *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed, 4 skipped" in done.stdout
    assert "nothing is declared yet" in done.stdout and "libcyd.so" in done.stdout
