"""``docs/adding-a-backend.md`` is run as it stands: its commands, its edits, its code, and the output it shows."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-backend.md"
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    language: str
    title: str
    text: str
    line: int


def blocks() -> list[Block]:
    page = PAGE.read_text()
    return [Block(f[1], f[2] or "", f[3], page[: f.start()].count("\n") + 1) for f in _FENCE.finditer(page)]


def machine(folder: Path) -> dict[str, str]:
    """A virtual environment that sees what this interpreter sees, and where `pip` needs no network."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    sees = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (packages / "everything.pth").write_text(sees)
    for name in ("hal", "pip"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {name} "$@"\n')
        script.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HAL_", "PYTHON", "PYTEST_", "COV_"))}
    return kept | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of yes
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HAL_KERNEL_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
    }


def run_console(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Run each command, and look for the lines that are shown below it, in their order."""
    shown: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            shown.append((line[2:], []))
        else:
            shown[-1][1].append(line)
    for command, expected in shown:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{PAGE.name}:{block.line}: {command}\n{done.stdout}"
        output = iter(done.stdout.splitlines())
        for line in expected:
            wanted = re.compile(".*".join(re.escape(part.strip()) for part in line.split("…")))
            assert any(wanted.fullmatch(got.strip()) for got in output), (
                f"{PAGE.name}:{block.line}: {command}: no line {line!r} (or not after the one before) in\n{done.stdout}"
            )


def edit(block: Block, folder: Path) -> int:
    """Make an edit; how many lines it takes."""
    path, lines = folder / block.title, block.text.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(old) == 1, f"{PAGE.name}:{block.line}: found {text.count(old)} times in {block.title}"
    path.write_text(text.replace(old, new))
    return sum(line[0] in "+-" for line in lines)


@pytest.mark.sampled
@pytest.mark.long(60)
@pytest.mark.timeout(900)
def test_the_tutorial_is_true(tmp_path: Path) -> None:
    environment = machine(tmp_path / "venv")
    edited, until_l1 = 0, None
    for block in blocks():
        if block.language == "diff":
            edited += edit(block, tmp_path)
        elif block.language == "python":
            done = subprocess.run(
                [str(tmp_path / "venv" / "bin" / "python"), "-c", block.text],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.stdout == "(1, 1, 4, 64) (1, 4, 1)\n", done.stdout + done.stderr
        elif block.language == "console":
            run_console(block, tmp_path, environment)
            if "--only L1" in block.text:
                until_l1 = edited
    assert until_l1 is not None and 0 < until_l1 <= 30
    clean = [[sys.executable, "-m", "ruff", *words] for words in (["check", "--no-cache"], ["format", "--check"])]
    for command in clean:
        done = subprocess.run(command, cwd=tmp_path / "hal-acme", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_of_the_tutorial_is_run_or_says_that_it_is_not() -> None:
    found = blocks()
    assert PAGE.read_text().count("\n```") == 2 * len(found)
    assert {block.language for block in found} == {"text", "console", "diff", "python"}
    assert all(block.title for block in found if block.language == "diff")
