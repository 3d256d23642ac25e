"""Compilers that refuse, fail or are none: what is said names the file and line at fault, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hal.portable import cache, compiling
from hal.portable.host import HostDevice, compiler
from hal.portable.runtime import Source
from hal.spec.errors import BackendUnavailable, CompileError

HEADER = "HAL_INLINE float kept(float x) {\n  return x;\n}\nHAL_INLINE float wrong(float x) {\n  return valve;\n}\n"
KERNEL = '#include "wrong.h"\nHAL_KERNEL(8)\nvoid mine(HAL_GLOBAL float *to, float x) {\n  to[0] = wrong(x);\n}\n'
TEXT = '#line 1 "/k/first.h"\n#line 1 "/k/first.h.old"\n#line 1 "/k/second.h"\n#line 7 "/k/first.h"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))
    return tmp_path


def source(folder: Path, header: str = HEADER) -> Source:
    """A fault in a header, which the first of two files includes."""
    (folder / "wrong.h").write_text(header)
    (folder / "mine.h").write_text(KERNEL)
    (folder / "last.h").write_text("/* nothing */\n")
    return Source((str(folder / "mine.h"), str(folder / "last.h")), ())


def test_the_file_that_the_log_blames_is_named(folder: Path) -> None:
    with pytest.raises(CompileError) as caught:
        HostDevice().build(source(folder))
    error = caught.value
    assert (error.source_path, error.line) == (str(folder / "wrong.h"), 5)
    assert f"{folder / 'wrong.h'}:5" in str(error).splitlines() and "valve" in error.log and error.log in str(error)


def test_it_says_what_to_do_and_keeps_what_was_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError) as caught:
        HostDevice().build(source(folder))
    kept = next((folder / "cache" / "refused").iterdir())
    assert "return valve" in kept.read_text()
    assert caught.value.fix.startswith(f"{kept} is what the compiler was given; CXX names the C++ compiler; ")
    assert caught.value.fix in str(caught.value)
    monkeypatch.setenv(cache.ENV, str(folder / "wrong.h"))
    with pytest.raises(CompileError, match="set HAL_KERNEL_CACHE to a folder of your own to keep what the compiler"):
        HostDevice().build(source(folder))


@pytest.mark.parametrize(
    ("log", "where"),
    [
        ("/k/second.h:3:9: error: no\n/k/first.h:1:1: error: no", ("/k/second.h", 3)),
        ("/k/first.h(12): error: identifier is undefined", ("/k/first.h", 12)),
        ("error: /k/first.h:2:10: use of undeclared identifier", ("/k/first.h", 2)),
        ("/k/first.h.old:8:1: fatal error: no", ("/k/first.h.old", 8)),
        ("/k/second.h:3:9: warning: error prone\n/k/first.h:4:1: error: no", ("/k/first.h", 4)),
        ("/k/second.h:3:9: note: here\n/k/first.h:4:1: undefined reference", ("/k/first.h", 4)),
        ("/elsewhere/third.h:3:9: error: no", ("last.h", None)),
        ("Killed", ("last.h", None)),
    ],
)
def test_logs_of_many_compilers(log: str, where: tuple[str, int | None]) -> None:
    error = compiling.refusal("no", log, TEXT, "last.h", "do something")
    assert (error.source_path, error.line, error.log) == (*where, log)


def script(folder: Path, text: str) -> str:
    """A compiler that knows its version and does what the text says."""
    path = folder / "broken"
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo broken 1; exit;; esac\n{text}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 0", "ended without an error and has written nothing"),
        ('while [ "$1" != -o ]; do shift; done; : >"$2"', "ended without an error and has written nothing"),
        ("kill -9 $$", "it was killed by SIGKILL, as for want of memory"),
        ("echo out of order; exit 3", "it ended with 3"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish >"$2"', "what it has written does not load"),
    ],
)
def test_a_compiler_that_does_not_work_is_a_compile_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    right = source(folder, HEADER.replace("valve", "x"))
    monkeypatch.setenv("CXX", script(folder, text))
    with pytest.raises(CompileError, match=said) as caught:
        HostDevice().build(right)
    assert "CXX names the C++ compiler" in caught.value.fix
    if "out of order" in text:
        assert caught.value.log == "out of order\n"
    monkeypatch.delenv("CXX")
    assert HostDevice().build(right).source is right


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such program; name one, without options, or unset it"),
        ("", "does not run .Exec format error.; CXX names the C"),
        ("#!/no/such/shell\n", "does not run .No such file or directory.; CXX names the C"),
        ("#!/bin/sh\nexit 1\n", "broken --version: it ended with 1; CXX names the C"),
        ("#!/bin/sh\nkill -9 $$\n", "broken --version: it was killed by SIGKILL, as for want of memory; CXX"),
    ],
)
def test_what_is_no_compiler_is_unavailable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    path = folder / "broken"
    if content is not None:
        path.write_text(content)
        path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BackendUnavailable, match=said):
        HostDevice().build(source(folder))


def test_a_compiler_that_is_gone_between_two_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(folder, "exit 0"))
    line = [compiler()]
    Path(line[0]).unlink()
    with pytest.raises(CompileError, match=r"no: .*broken does not run"):
        compiling.compiled(line, "", ".cpp", "no", "last.h", "do something")


def test_a_compiler_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = folder / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 1000\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(compiling, "_ANSWER", 0.2)
    monkeypatch.setattr(compiling, "_COMPILE", 0.2)
    with pytest.raises(BackendUnavailable, match=r"--version: no answer within 0\.2 s; CXX"):
        compiling.version(str(hangs), "CXX")
    with pytest.raises(CompileError, match=r"has not ended within 0\.2 s"):
        compiling.compiled([str(hangs)], "int x;", ".cpp", "no", "/k/x.h", "CXX")
