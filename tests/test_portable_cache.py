"""Compiled code on disk: private, whole, shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from hal.portable import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))
    found = cache.private_folder("device")
    assert found is not None
    return found


def forbidden() -> bytes:
    raise AssertionError("it was there already")


def test_what_was_made_is_found(folder: Path) -> None:
    assert cache.kept(folder, "a.bin", lambda: b"code") == b"code"
    assert cache.kept(folder, "a.bin", forbidden) == b"code"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a.bin").stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 36])
def test_a_damaged_entry_is_made_anew(folder: Path, damage: bytes) -> None:
    cache.kept(folder, "a.bin", lambda: b"code")
    (folder / "a.bin").write_bytes(damage)
    assert cache.kept(folder, "a.bin", lambda: b"new code") == b"new code"
    assert cache.kept(folder, "a.bin", forbidden) == b"new code"


def test_a_bit_that_flipped_is_noticed(folder: Path) -> None:
    cache.kept(folder, "a.bin", lambda: b"code")
    content = bytearray((folder / "a.bin").read_bytes())
    content[-1] ^= 1
    (folder / "a.bin").write_bytes(content)
    assert cache.kept(folder, "a.bin", lambda: b"code") == b"code"


def test_every_part_of_a_key_counts() -> None:
    keys = {cache.key(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), ("", "ab"), ("b", "a")]}
    assert len(keys) == 5


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_others_can_write_to_is_not_trusted(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert cache.private_folder("device") is None
    assert cache.kept(None, "a.bin", lambda: b"code") == b"code"


def test_a_place_where_nothing_can_be_written_costs_only_the_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENV, str(tmp_path / "file" / "below"))
    assert cache.private_folder() is None


def _many(folder: Path, number: int) -> None:
    for _ in range(40):
        (folder / "a.bin").unlink(missing_ok=True)
        found = cache.kept(folder, "a.bin", lambda: bytes([number]) * 200_000)
        if len(found) != 200_000 or len(set(found)) != 1:
            os._exit(1)


def test_many_processes_never_read_half_an_entry(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_many, args=(folder, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert [path.name for path in folder.iterdir()] == ["a.bin"]
