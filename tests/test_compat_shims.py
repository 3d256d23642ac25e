"""Scripts written against the published interfaces run unmodified; the packages that make it so come and go cleanly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hal.cli.app import app
from hal.compat import shims
from hal.compat.__main__ import main

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


@pytest.mark.parametrize(
    "script",
    [
        "flash_mla_decode.py",
        "intranode.py --num-processes 2",
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


def test_what_else_lies_there_is_kept(tmp_path: Path) -> None:
    hal("--target", str(tmp_path))
    (tmp_path / "deep_ep" / "notes.txt").write_text("mine")
    assert "kept there: notes.txt" in hal("--uninstall", "--target", str(tmp_path))[1]
    assert (tmp_path / "deep_ep" / "notes.txt").read_text() == "mine"
    with pytest.raises(Exception, match="an existing folder"):
        hal("--target", str(tmp_path / "nowhere"))
