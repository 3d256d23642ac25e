"""The command line: exit codes and streams in real processes, parsing and words in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import COMMANDS, Distribution, Interpreter, fake_backend, install
from typer.testing import CliRunner

import hal
from hal.cli.app import app
from hal.cli.text import offers, paragraph, plain
from hal.cli.verify import Agreement, compare
from hal.cli.workload import UNUSED_ENTRY, Shape, Workload
from hal.reference.mla import mla_decode as reference_decode
from hal.spec.capability import Capabilities
from hal.spec.errors import BackendUnavailable, CompileError

SMALL = ("--batch", "3", "--max-len", "150", "--layers", "2", "--steps", "2")


def broken_decode(statement: str) -> str:
    """The source of a backend whose decode is replaced by a statement."""
    old = "        Fake.calls += 1\n"
    assert old in fake_backend()
    return fake_backend().replace(old, f"        {statement}\n        return\n")


def wrong(old: str, new: str) -> str:
    """The source of a backend that computes something else."""
    assert old in fake_backend()
    return fake_backend().replace(old, new)


SOURCES = {
    "fake": fake_backend(priority=100).replace("import torch\n", "import torch\nprint('LOUD')\n", 1),
    "boom": 'raise ImportError("libboom.so.3: [red]cannot open[/]\\x1b[31m")',
    "chip": wrong("Probe(True, 'a fake chip',", "Probe(False, 'no /dev/chip0', 'modprobe chip',"),
    "crash": broken_decode("import os; os.kill(os.getpid(), 11)"),
    "hang": broken_decode("import time; time.sleep(1000)"),
    "raiser": broken_decode("raise RuntimeError('one\\ntwo')"),
    "scaled": wrong("] = (weights @", "] = 1.02 * (weights @"),
    "peeking": wrong(
        "length = int(args.cache_seqlens[b])", "length = int(args.cache_seqlens[b]); length += length > 1"
    ),
    "sparse": wrong("mla_dense=dense", "mla_dense=None"),
    "half": wrong('dtypes=("bfloat16", "float16", "float32")', 'dtypes=("float16",)'),
}


@pytest.fixture(scope="module")
def crowd(bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """A backend that works, and one of each kind that does not."""
    folder = tmp_path_factory.mktemp("crowd")
    return bare.seeing(install(folder, *(Distribution(f"hal-{name}", text, name) for name, text in SOURCES.items())))


def test_an_unknown_backend_is_one_paragraph_and_exit_code_2(crowd: Interpreter) -> None:
    done = crowd.hal("demo", HAL_BACKEND="nope")
    assert (done.returncode, done.stdout) == (2, "")
    said = [line for line in done.stderr.splitlines() if line != "LOUD"]
    assert len(said) == 1
    assert said[0].startswith(
        "BackendUnavailable: HAL_BACKEND=nope: no installed backend is called 'nope'. There are: "
    )
    for part in (
        "fake (available: a fake chip)",
        "chip (unavailable: no /dev/chip0; fix: modprobe chip)",
        "boom (broken",
    ):
        assert part in said[0]
    assert "Traceback" not in said[0]
    assert "\x1b" not in said[0]


@pytest.mark.sampled
@pytest.mark.long(6)
@pytest.mark.parametrize("statement", ["os._exit(0)", "os.kill(os.getpid(), 11)"])
def test_a_plugin_that_ends_the_process_is_named(statement: str, bare: Interpreter, tmp_path: Path) -> None:
    ends = wrong("        return Probe(", f"        import os; {statement}\n        return Probe(")
    both = (Distribution("hal-ends", ends, "ends"), Distribution("hal-fake", fake_backend(), "fake"))
    seen = bare.seeing(install(tmp_path, *both))
    for line in ("backends", "doctor ends"):
        done = seen.hal(*line.split())
        assert "the process ended while the backend ends was asked" in done.stderr, (line, done.stderr)
    done = seen.hal("doctor", "fake", HAL_BACKEND="fake")
    assert done.returncode == 0 and "ended" not in done.stderr


@pytest.fixture(scope="module")
def answers(crowd: Interpreter) -> dict[str, tuple[int, str, str]]:
    """What cheap command lines answer, by a word for each."""
    runs = {
        "list": ("backends", {}),
        "narrow": ("backends", {"COLUMNS": "48", "HAL_BACKEND": "chip"}),
        "no room": ("backends", {"COLUMNS": "0"}),
        "json": ("backends --json", {"HAL_BACKEND": "half"}),
        "traceback": ("demo --backend nope", {"HAL_DEBUG": "1"}),
        "doctor": ("doctor fake nope", {}),
        "undeclared": (" ".join(("demo", *SMALL, "--backend", "half")), {}),
        "out": ("doctor chip", {}),
    }
    return dict(zip(runs, crowd.hal_each(*runs.values()), strict=True))


def test_the_traceback_is_there_for_who_wants_it(answers: dict[str, tuple[int, str, str]]) -> None:
    code, _, errors = answers["traceback"]
    assert code == 2
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("BackendUnavailable: --backend nope: no installed backend")


def test_the_list_of_backends(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers["list"]
    assert code == 0
    assert "\x1b" not in text, "no colours where there is no terminal"
    assert "LOUD" not in text, "what a plugin prints is no part of the answer"
    rows = [line.split() for line in text.splitlines()]
    assert ["●", "fake", "available", "100", hal.SPEC_VERSION, "hardware", "a", "fake", "chip"] in rows
    assert ["chip", "unavailable", "10", hal.SPEC_VERSION, "–", "no", "/dev/chip0"] in rows
    assert ["fix:", "modprobe", "chip"] in rows
    assert "libboom.so.3: [red]cannot open[/]" in text, "a plugin's text is text and not markup"
    last = (
        f"● in force: fake — automatic: the highest priority of the {len(SOURCES) - 2} available (HAL_BACKEND is unset)"
    )
    assert text.splitlines()[-1] == last


def test_the_list_is_whole_on_a_narrow_terminal(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers["narrow"]
    assert code == 0
    assert max(map(len, text.splitlines())) <= 48
    assert "…" not in text
    assert "in force: none — HAL_BACKEND=chip: unavailable: no /dev/chip0" in " ".join(text.split())


def test_a_terminal_too_narrow_for_anything_gets_it_all_the_same(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers["no room"]
    assert code == 0
    assert "…" not in text
    assert all(f" {name} " in text for name in SOURCES)


def test_the_list_as_json_is_whole(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers["json"]
    assert code == 0
    document = json.loads(text)
    assert document["in_force"] == {"name": "half", "why": "chosen by HAL_BACKEND=half", "error": None}
    known = {backend["name"]: backend for backend in document["backends"]}
    assert set(known) == set(SOURCES)
    fake, half, boom = known["fake"], known["half"], known["boom"]
    assert (fake["state"], fake["priority"], fake["evidence"], fake["in_force"]) == (
        "available",
        100,
        "hardware",
        False,
    )
    assert fake["details"] == {"driver": "fakedrv 7.1", "library": "libfake.so.2"}
    assert half["in_force"]
    capabilities = Capabilities.from_dict(half["capabilities"])
    assert capabilities.mla_dense is not None
    assert capabilities.mla_dense.dtypes == ("float16",)
    assert (boom["state"], boom["capabilities"], boom["priority"]) == ("broken", None, None)


def test_the_doctor_refuses_a_name_nobody_has(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, errors = answers["doctor"]
    assert (code, text) == (2, "")
    assert "no installed backend is called 'nope'" in errors


def test_the_doctor_says_how_to_fix_a_backend_that_is_out(answers: dict[str, tuple[int, str, str]]) -> None:
    code, text, _ = answers["out"]
    assert code == 1
    words = " ".join(text.split())
    assert "chip unavailable why no /dev/chip0 fix modprobe chip distribution hal-chip 1.0" in words
    assert words.endswith("chip does not work")


def test_the_demo_says_what_a_backend_does_not_declare(answers: dict[str, tuple[int, str, str]]) -> None:
    code, _, errors = answers["undeclared"]
    assert code == 2
    assert errors.splitlines()[-1].startswith("UnsupportedError: q: got dtype bfloat16")


def test_without_any_backend(bare: Interpreter) -> None:
    listed, doctored, demonstrated = bare.hal_each(("backends", {}), ("doctor --json", {}), ("demo", {}))
    assert (listed[0], listed[2]) == (0, "")
    assert "pip install hal-cpu" in listed[1]
    assert "in force: none — no backend is available" in listed[1]
    assert (doctored[0], doctored[2]) == (1, "")
    document = json.loads(doctored[1])
    assert (document["backends"], document["in_force"]["name"]) == ([], None)
    assert document["environment"]["variables"] == {}
    assert demonstrated[:2] == (2, "")
    assert demonstrated[2].startswith("BackendUnavailable: no backend is available.")


def test_the_doctor_finds_the_backend_in_force_well(crowd: Interpreter) -> None:
    done = crowd.hal("doctor", "fake", HAL_BACKEND="fake", HAL_VALIDATE="full")
    assert done.returncode == 0, done.stdout + done.stderr
    words = " ".join(done.stdout.split())
    for part in (
        f"torch {torch.__version__}",
        f"specification {hal.SPEC_VERSION}",
        "HAL_BACKEND fake",
        "HAL_VALIDATE full",
        "driver fakedrv 7.1",
        "check cpu PASS a decode of h_q 4, d 576, page 64, bfloat16 has the known answer",
        "fake works",
    ):
        assert part in words
    assert "LOUD" not in done.stdout


VERDICTS = {
    "crash": ("CRASH", "SIGSEGV"),
    "hang": ("TIMEOUT", "no answer in 2 s"),
    "raiser": ("ERROR", "RuntimeError: one two"),
    "scaled": ("FAIL", "differs from the known answer: sequence 0, query 0, head 0: out[0] is 1.02"),
    "peeking": ("FAIL", "out[0] is nan and should be 1"),
    "sparse": ("NOT RUN", "no dense MLA decode"),
}


@pytest.mark.long(12)
def test_the_doctor_survives_and_names_what_fails(crowd: Interpreter) -> None:
    found: dict[str, Any] = {}
    patient = [name for name in VERDICTS if name != "hang"]
    for arguments in (["--timeout", "100", "chip", "boom", *patient], ["--timeout", "2", "hang"]):
        done = crowd.hal("doctor", "--json", *arguments, timeout=200)
        assert done.returncode == 1
        document = json.loads(done.stdout)
        assert document["exit_code"] == 1
        found |= {backend["name"]: backend for backend in document["backends"]}
    for name, (verdict, note) in VERDICTS.items():
        (check,) = found[name]["checks"]
        assert (check["device"], check["verdict"]) == ("cpu", verdict), name
        assert note in check["note"]
        assert found[name]["works"] is False
    for name in ("chip", "boom"):
        assert (found[name]["works"], found[name]["checks"]) == (False, []), "nothing is run on a backend that is out"


@pytest.mark.sampled
@pytest.mark.long(2)
@pytest.mark.parametrize(("backend", "code"), [("half", 0), ("nope", 2)])
def test_the_doctor_answers_for_the_backend_in_force(backend: str, code: int, crowd: Interpreter) -> None:
    # In force by HAL_BACKEND: everything is reported, this one decides. The others would take seconds each here.
    script = (
        "import sys; from hal import plugins; found = plugins.registry()._found; "
        f"[found.pop(name) for name in list(found) if name not in ({backend!r}, 'boom')]; "
        "sys.argv = ['hal', 'doctor']; from hal.cli.app import main; main()"
    )
    done = crowd.run("-c", script, HAL_BACKEND=backend)
    assert done.returncode == code, done.stdout + done.stderr
    assert "boom broken" in done.stdout
    assert "/hal_boom.py:1fix" in "".join(done.stdout.split())
    assert ("BackendUnavailable: HAL_BACKEND=nope" in done.stderr) == (code == 2)


def test_the_demo_passes_and_repeats_itself(crowd: Interpreter) -> None:
    first, again = (crowd.hal("demo", *SMALL, "--s-q", "2", "--check", "0", "--seed", "7") for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    words = " ".join(first.stdout.split())
    for part in (
        "backend fake (hal-fake 1.0), automatic: the highest priority",
        "device cpu: a fake chip",
        "evidence hardware: ",
        "h_q 128, h_kv 1, d 576, d_v 512, bfloat16, pages of 64 shuffled, causal, s_q 2",
        "--seed 7 repeats this run",
        " tokens/s through 2 layers, ",
        " GFLOP/s, ",
        " GB/s",
        "torch:attend@cpu ×5",
        "all 12 results",
        "PASS all 3072 rows agree with the reference",
    ):
        assert part in words
    worst = [line for line in first.stdout.splitlines() if line.startswith("worst row")]
    assert worst[0] in again.stdout


def test_the_demo_fails_a_wrong_backend_and_says_where(crowd: Interpreter) -> None:
    done = crowd.hal("demo", *SMALL, "--backend", "scaled", "--dtype", "float32")
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = " ".join(done.stdout[done.stdout.index("\nFAIL") :].split())
    assert verdict.startswith("FAIL 1536 of 1536 rows are wrong; step 0, layer 0, sequence 0, query 0, head 0: out[")


def test_an_interrupt_is_quiet(crowd: Interpreter) -> None:
    for arguments, sign in (("demo --backend hang", "--seed"), ("doctor hang", "HAL_VALIDATE")):
        process = subprocess.Popen(
            crowd.command("-u", "-m", "hal", *arguments.split()),
            env=crowd.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background has SIGINT ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            assert process.stdout is not None
            next(line for line in process.stdout if sign in line)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        # A shell says 130 of both: a command that gave up, and a process that the signal ended.
        assert process.returncode in (130, -signal.SIGINT), (arguments, errors)
        assert "Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(crowd: Interpreter) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        crowd.command("-m", "hal", "backends"),
        env=crowd.environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "LOUD\n")


@pytest.mark.sampled
@pytest.mark.long(1)
@pytest.mark.parametrize("arguments", ["backends", "--version"])
def test_a_full_disk_is_one_line(arguments: str, crowd: Interpreter) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            crowd.command("-m", "hal", arguments),
            env=crowd.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    said = [line for line in done.stderr.splitlines() if line != "LOUD"]
    assert (done.returncode, said) == (1, ["hal: No space left on device: the answer is not whole"])


@pytest.mark.sampled
@pytest.mark.long(2)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_lacks_a_character_gets_the_rest(encoding: str, crowd: Interpreter) -> None:
    done = crowd.hal("backends", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "LOUD\n")
    assert "? in force: fake" in done.stdout


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_no_error(closed: int, bare: Interpreter, tmp_path: Path) -> None:
    # Native code of a plugin finds something open under the number too, and not a file that was opened meanwhile.
    source = fake_backend().replace(
        "import torch\n", "import os, torch\nassert [os.fstat(stream) for stream in (0, 1, 2)]\n", 1
    )
    seen = bare.seeing(install(tmp_path, Distribution("hal-fake", source, "fake")))
    shell = f'exec "$@" {closed}>&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *seen.command("-m", "hal", "doctor", "fake")],
        env=seen.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("fake works" in done.stdout) == (closed != 1)


def test_what_native_code_prints_is_no_part_of_the_answer(bare: Interpreter, tmp_path: Path) -> None:
    noise = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        libc.write(1, b"written", 7)
        libc.printf(b"buffered")
        os.system("printf spawned")
    """
    loud = textwrap.dedent(noise) + fake_backend()
    seen = bare.seeing(install(tmp_path, Distribution("hal-fake", loud, "fake")))
    done = seen.hal("backends", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["in_force"]["name"] == "fake"
    assert all(word in done.stderr for word in ("written", "buffered", "spawned")), done.stderr


@pytest.fixture(scope="module")
def extended(bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Distributions with commands of their own, half of them broken."""
    greet = """
        import typer
        app = typer.Typer(help="Greet the world.")
        @app.command()
        def greet(name: str = "world"):
            print("hello", name)
        def build():
            group = typer.Typer(help="Two commands.")
            group.command("one")(lambda: print("this is one"))
            group.command("two")(lambda: print("this is two"))
            return group
        def nothing():
            return 3
    """
    commands = {"greet": "tool_greet:app", "several": "tool_greet:build", "number": "tool_greet:nothing", "demo": "x:y"}
    folder = install(
        tmp_path_factory.mktemp("extended"),
        Distribution("tool-greet", greet, entry_points={COMMANDS: commands}),
        Distribution(
            "tool-boom", "raise ImportError('no [b]luck[/b]')", entry_points={COMMANDS: {"boom": "tool_boom:a"}}
        ),
        Distribution("tool-exit", "import sys; sys.exit(7)", entry_points={COMMANDS: {"exit": "tool_exit:app"}}),
        Distribution("tool-other", greet, entry_points={COMMANDS: {"twice": "tool_other:app"}}),
        Distribution("tool-another", greet, entry_points={COMMANDS: {"twice": "tool_another:app"}}),
    )
    return bare.seeing(folder)


def test_commands_of_other_distributions(extended: Interpreter) -> None:
    help_line, broken = (
        ("--help", {"COLUMNS": "200"}),
        "hal boom: the command of tool-boom is broken: ImportError: no [b]",
    )
    hint = "hal conform: not installed; it is in its own distribution, install it with: pip install hal-conformance\n"
    expected = {
        "greet --name moon": (0, "hello moon\n", ""),
        "several two": (0, "this is two\n", ""),
        "boom --any thing": (2, "", broken + "luck[/b]\n"),
        "exit": (2, "", "hal exit: the command of tool-exit is broken: SystemExit: 7\n"),
        "conform --backend cpu": (2, "", hint),
    }
    (code, text, _), *answers = extended.hal_each(help_line, *((line, {}) for line in expected))
    assert dict(zip(expected, answers, strict=True)) == expected
    assert code == 0
    lines = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    for described in (
        "several Two commands.",
        "boom Broken: ImportError: no [b]luck[/b]",
        "exit Broken: SystemExit: 7",
        "number Broken: TypeError: tool_greet:nothing gave a int, not a typer.Typer",
        "twice Broken: TypeError: registered by 2 distributions, tool-another and tool-other: uninstall all but one",
        "conform Decide whether a backend keeps the specification. Not installed: pip install hal-conformance",
    ):
        assert described in lines
    assert sum(line.startswith("demo ") for line in lines) == 1, "a built-in name cannot be taken"


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ("demo --batch 0", "--batch"),
        ("demo --max-len -5", "--max-len"),
        ("demo --layers many", "--layers"),
        ("demo --steps 0", "--steps"),
        ("demo --s-q 0", "--s-q"),
        ("demo --dtype int8", "--dtype"),
        ("demo --seed -1", "--seed"),
        ("demo --check -1", "--check"),
        ("demo --max-len 3 --steps 4", "--max-len"),
        ("demo --batch 1000000 --max-len 1000000", "--batch"),
        ("doctor --timeout 0", "--timeout"),
        ("backends --yaml", "--yaml"),
        ("demos", "demos"),
    ],
)
def test_a_bad_command_line_is_a_usage_error(arguments: str, about: str) -> None:
    result = CliRunner().invoke(app, arguments.split(), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert about in result.stderr
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_version_and_help() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout == f"hal {hal.__version__}, specification {hal.SPEC_VERSION}\n"
    for arguments in ([], ["-h"], ["backends", "-h"], ["doctor", "--help"], ["demo", "-h"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == (0 if arguments else 2)
        assert "Usage: hal" in result.output or "Usage: root" in result.output


def test_help_shows_the_extra_an_option_needs() -> None:
    """Square brackets are markup to the library that lays help out, which drops words it does not know."""
    shown = CliRunner().invoke(app, ["bench", "mla", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert "needs kernel-hal[bench]." in shown


def test_every_command_describes_itself_without_loading_torch_or_a_backend() -> None:
    code = (
        "import atexit, sys; from hal.cli.app import main; sys.argv = ['hal', '--help']; heavy = "
        "('torch', 'numpy', 'hal_cpu', 'hal.cli.microkernel', 'hal_conformance.session', 'rich.progress'); "
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules])); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "Decide whether a backend keeps the specification" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1] == "[]"


def test_one_wrong_row_among_many_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 1, 1024, 512, generator=generator, dtype=torch.float64)
    lse = torch.randn(2, 1024, 1, generator=generator, dtype=torch.float64)
    assert compare(out, lse, out, lse) == Agreement(2048, 0, 0.0, 0.0, 0.0, "")
    damaged = out.clone()
    damaged[1, 0, 700] = 0
    found = compare(damaged, lse, out, lse, "layer 3, ", first_sequence=4)
    assert (found.wrong, found.cosine, found.passed) == (1, 1.0, False)
    assert found.first_wrong.startswith("layer 3, sequence 5, query 0, head 700: out[0] is 0 and should be")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_wrong(value: float) -> None:
    out, lse = torch.zeros(1, 1, 2, 8), torch.full((1, 2, 1), torch.inf)
    assert compare(out, lse, out, lse).passed, "an empty row is 0 and +inf"
    bad_out, bad_lse = out.clone(), torch.zeros_like(lse)
    bad_out[0, 0, 1, 3] = value
    bad_lse[0, 1, 0] = value
    assert compare(bad_out, lse, out, lse).wrong == 1
    assert compare(out, bad_lse, out, torch.zeros_like(lse)).wrong == 1


def test_nothing_compared_is_no_pass() -> None:
    assert not Agreement().passed
    assert (Agreement(1) + Agreement(1, cosine=float("nan"))).cosine != 0
    assert (Agreement(1, 1, first_wrong="a") + Agreement(1, 1, first_wrong="b")).first_wrong == "a"


def test_the_workload_grows_in_place_and_hides_what_is_unused() -> None:
    shape = Shape(batch=4, max_len=200, layers=2, steps=3, s_q=2, dtype=torch.float32, h_q=2, head_dim=8, head_dim_v=4)
    work = Workload(shape, seed=3, device=torch.device("cpu"))
    assert list(work.build()) == [0, 1]
    before = torch.stack(work.caches)
    for number in range(shape.steps):
        step = work.step(number)
        lengths = step.cache_seqlens.tolist()
        assert lengths == work.lengths(number + 1)
        assert max(lengths) <= shape.max_len
        pages = [-(-length // shape.page_size) for length in lengths]
        for row, used in zip(step.table.tolist(), pages, strict=True):
            assert all(entry == UNUSED_ENTRY for entry in row[used:])
            assert all(0 <= entry < len(work.caches[0]) for entry in row[:used])
        cached = torch.stack(work.caches)
        assert int(cached[0, ..., 0].isfinite().sum()) == sum(lengths), "every token has a row, all else is NaN"
        kept = before.isfinite()
        assert torch.equal(cached[kept], before[kept]), "a step appends and changes nothing"
        out, _ = reference_decode(
            step.queries[0], work.caches[0], step.table, step.cache_seqlens, head_dim_v=4, causal=True
        )
        assert out.isfinite().all()
    again = Workload(shape, seed=3, device=torch.device("cpu"))
    assert list(again.build()) == [0, 1]
    assert torch.equal(torch.stack(again.caches).nan_to_num(), before.nan_to_num())


def test_the_work_is_counted_as_the_formulas_say() -> None:
    shape = Shape(batch=1, max_len=100, layers=1, steps=1, s_q=3, dtype=torch.bfloat16)
    work = Workload(shape, seed=0, device=torch.device("cpu"))
    work.start = [7]
    assert work.attended([10]) == 8 + 9 + 10
    assert work.flop(0) == 2 * 128 * (576 + 512) * 27
    assert work.bytes(0) == 2 * (3 * 128 * 576 + 10 * 576 + 3 * 128 * 512)


def test_words() -> None:
    assert plain("a\n  b\x1b[31m\tc\0") == "a b[31m c"
    error = BackendUnavailable("first\nsecond   third")
    assert paragraph(error) == "BackendUnavailable: first second third"
    assert "\n  here" in paragraph(CompileError("failed", log="line 1\n  here", source_path="k.h"))
    nothing = Capabilities(device_types=(), mla_dense=None, mla_sparse=None, ep=None)
    assert offers(nothing) == "nothing is declared yet"
    assert offers(replace(nothing, mla_dense=DENSE)) == "MLA decode (bfloat16, v32 cache)"


DENSE = hal.spec.capability.MlaCapabilities(
    dtypes=("bfloat16",),
    kv_formats=("plain", "v32"),
    head_dim=hal.spec.capability.only(576),
    head_dim_v=hal.spec.capability.only(512),
    h_q=hal.spec.capability.only(16),
    h_kv=hal.spec.capability.only(1),
    s_q=hal.spec.capability.only(1),
    page_size=hal.spec.capability.only(64),
    causal=True,
    ragged_q=False,
    batch_invariant=False,
    lse_bases=("e",),
    attn_sink=False,
    extra_kv_cache=False,
    topk=None,
)
