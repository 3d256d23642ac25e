"""Scripts written against the published interfaces run unmodified; the packages that make it so come and go cleanly."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from hal.cli.app import app
from hal.compat import shims
from hal.compat.__main__ import main
from hal.spec.errors import SpecError

SCRIPTS = Path(__file__).parent / "published"
LIMIT = 120  # seconds; a few are needed where nothing else runs


def python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HAL_BACKEND": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    # A group of its own, so that ranks of a script that hangs end with it.
    with subprocess.Popen(
        command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.sampled
@pytest.mark.long(4)
@pytest.mark.parametrize(
    "script",
    [
        "flash_mla_decode.py",
        "intranode.py --num-processes 4",
        "low_latency.py --num-processes 2",
        "elastic.py --num-processes 2",
    ],
)
def test_a_published_style_script_runs_unmodified(script: str) -> None:
    name, *arguments = script.split()
    done = python("-m", "hal.compat", "run", str(SCRIPTS / name), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("passed\n")


WHERE = """
import sys, deep_ep, flash_mla
from deep_ep import Buffer, Config
from deep_ep.buffer import Buffer as same
from deep_ep.utils import EventOverlap
from flash_mla.flash_mla_interface import flash_mla_with_kvcache
import hal.compat.deep_ep, hal.compat.flash_mla
assert same is Buffer is hal.compat.deep_ep.Buffer and EventOverlap is hal.compat.deep_ep.EventOverlap
assert flash_mla.flash_mla_with_kvcache is flash_mla_with_kvcache is hal.compat.flash_mla.flash_mla_with_kvcache
print(deep_ep.__file__, deep_ep.__version__, sys.argv[1:], __name__)
"""


def test_run_is_for_one_run(tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    done = python("-m", "hal.compat", "run", str(tmp_path / "where.py"), "--flag", "x")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{shims.PACKAGES / 'deep_ep' / '__init__.py'} 2.1.0 ['--flag', 'x'] __main__\n"
    done = python("-m", "hal.compat", "run", "-m", "where", "y", cwd=tmp_path)
    assert done.stdout.endswith("['y'] __main__\n"), done.stderr
    assert python("-c", "import deep_ep").returncode == 1


def test_run_gives_the_path_that_python_gives(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "script.py").write_text("import sys; print(*sys.path, sep='\\n')")
    plain = python("dir/script.py", cwd=tmp_path).stdout.splitlines()
    done = python("-m", "hal.compat", "run", "dir/script.py", cwd=tmp_path)
    assert done.stdout.splitlines() == [str(shims.PACKAGES), *plain], done.stderr


LATER = """
import atexit, sys, threading, time
name = "script"
def look(who):
    print(who, sys.modules["__main__"].name)
def wait():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    look("thread")
atexit.register(look, "exit")
threading.Thread(target=wait).start()
"""


@pytest.mark.parametrize("how", [("later.py",), ("-m", "later")])
def test_run_leaves_the_script_as_main(how: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text(LATER)
    done = python("-m", "hal.compat", "run", *how, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "thread script\nexit script\n"), done.stderr


MAIN = """
import sys, other
print(__name__, __file__, __package__, getattr(__spec__, "name", None), sys.argv, other.__name__)
"""


@pytest.mark.parametrize("how", ["folder", "archive.zip", "folder/__main__.py", "-m folder", "-m folder.other"])
def test_run_takes_what_python_takes(how: str, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("")
    (tmp_path / "folder").mkdir()
    for name, text in {"__main__.py": MAIN, "other.py": "print(__name__, __package__)", "__init__.py": ""}.items():
        (tmp_path / "folder" / name).write_text(text)
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "folder")
    plain = python(*how.split(), "x", cwd=tmp_path)
    done = python("-m", "hal.compat", "run", *how.split(), "x", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr


@pytest.mark.parametrize("asked", ["run --help", "run -h", "--help"])
def test_run_helps(asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hal.compat", *asked.split()])
    main()
    assert capsys.readouterr().out.startswith("usage: python -m hal.compat run")


@pytest.mark.parametrize("wrong", ["", "run", "run -m", "run nothing.py", "walk where.py"])
def test_run_says_how_it_is_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hal.compat", *wrong.split()])
    with pytest.raises(SystemExit, match=r"usage: python -m hal\.compat run"):
        main()


def hal(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["install-shims", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_install_and_uninstall(tmp_path: Path) -> None:
    target = "--target", str(tmp_path)
    code, said = hal(*target)
    assert code == 0
    assert f"deep_ep: installed in {tmp_path / 'deep_ep'}; 'import deep_ep' gives hal.compat.deep_ep" in said
    assert "flash_mla: installed in" in said
    done = python("-c", WHERE, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "was in" in hal(*target)[1]
    code, said = hal("--uninstall", *target)
    assert code == 0
    assert "deep_ep: removed from" in said
    assert list(tmp_path.iterdir()) == []
    assert hal("--uninstall", *target) == (
        0,
        f"deep_ep: not installed in {tmp_path}\nflash_mla: not installed in {tmp_path}\n",
    )


def test_another_package_is_never_touched(tmp_path: Path) -> None:
    real = tmp_path / "deep_ep" / "__init__.py"
    real.parent.mkdir()
    real.write_text("REAL = True\n")
    code, said = hal("--target", str(tmp_path))
    assert code == 1
    assert f"deep_ep: left alone: a deep_ep is installed in {real.parent}" in said
    assert "flash_mla: installed in" in said
    code, said = hal("--uninstall", "--target", str(tmp_path))
    assert code == 1
    assert "deep_ep: left alone" in said
    assert real.read_text() == "REAL = True\n"
    assert not (tmp_path / "flash_mla").exists()


def test_one_installed_elsewhere_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "flash_mla.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "target").mkdir()
    code, said = hal("--target", str(tmp_path / "target"))
    assert code == 1
    assert f"flash_mla: left alone: a flash_mla is installed in {tmp_path / 'site' / 'flash_mla.py'}" in said


class Editable:
    """A finder as an editable install puts it on ``sys.meta_path``: a class that maps names to folders."""

    places: ClassVar[dict[str, Path]] = {}

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        place = cls.places.get(fullname)
        if place is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, place / "__init__.py", submodule_search_locations=[str(place)]
        )


def test_one_installed_editable_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source" / "flash_mla", tmp_path / "target"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("REAL = True\n")
    target.mkdir()
    monkeypatch.setattr(Editable, "places", {"flash_mla": source, "deep_ep": shims.PACKAGES / "deep_ep"})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    code, said = hal("--target", str(target))
    assert code == 1
    assert f"flash_mla: left alone: a flash_mla is installed in {source}" in said
    assert "deep_ep: installed in" in said
    assert not (target / "flash_mla").exists()


def test_a_file_in_the_way_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "flash_mla").write_text("mine")
    with pytest.raises(SpecError, match=f"the file {tmp_path / 'flash_mla'}"):
        hal("--target", str(tmp_path))
    assert [one.name for one in tmp_path.iterdir()] == ["flash_mla"]


def test_what_else_lies_there_is_kept(tmp_path: Path) -> None:
    hal("--target", str(tmp_path))
    (tmp_path / "deep_ep" / "notes.txt").write_text("mine")
    assert "kept there: notes.txt" in hal("--uninstall", "--target", str(tmp_path))[1]
    assert (tmp_path / "deep_ep" / "notes.txt").read_text() == "mine"
    with pytest.raises(Exception, match="an existing folder"):
        hal("--target", str(tmp_path / "nowhere"))
