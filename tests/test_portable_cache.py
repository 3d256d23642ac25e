"""Compiled code on disk: private, whole, shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hal.portable import cache, sim
from hal.spec.errors import BackendUnavailable


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
    with pytest.warns(UserWarning, match=f"others can write to {folder} "):
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


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_below_one_that_others_can_write_to_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Whoever can write to it can put another folder in the place of ours."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv(cache.ENV, str(shared / "of mine" / "cache"))
    assert cache.private_folder("device") is not None
    shared.chmod(mode)
    with pytest.warns(UserWarning, match=f"others can write to {shared} .chmod go-w {shared}, or set {cache.ENV} to"):
        assert cache.private_folder("device") is None
    monkeypatch.setenv(sim.CACHE_ENV, str(shared / "simulator"))
    with pytest.raises(BackendUnavailable, match=f"to build the simulator in: others can write to {shared} "):
        sim.program("mcc")
    shared.chmod(mode | stat.S_ISVTX)
    assert cache.private_folder("device") == shared / "of mine" / "cache" / "device"


def test_a_folder_below_one_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.ENV, str(tmp_path / "theirs" / "cache"))
    there, stat_of = str(tmp_path / "theirs"), os.stat

    def owned(path: Any, *given: Any, **named: Any) -> os.stat_result:
        found = stat_of(path, *given, **named)
        fields = list(found)
        fields[stat.ST_UID] = 4711
        return os.stat_result(fields) if str(path) == there else found

    monkeypatch.setattr(os, "stat", owned)
    with pytest.warns(UserWarning, match=f"{there} belongs to user 4711 .chown {os.getuid()} {there}, or set"):
        assert cache.private_folder() is None


def test_what_is_returned_has_no_link_that_could_be_changed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv(cache.ENV, str(tmp_path / "link"))
    assert cache.private_folder("device") == (tmp_path / "real" / "device").resolve()


def test_folders_are_made_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the process gives to those it makes: of a group's members nobody would be trusted afterwards."""
    monkeypatch.setenv(cache.ENV, str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        assert cache.private_folder("c") is not None
    finally:
        os.umask(before)
    assert {stat.S_IMODE(one.stat().st_mode) for one in (tmp_path / "a", tmp_path / "a" / "b")} == {0o700}


def test_an_entry_that_is_refused_is_made_anew_once(folder: Path) -> None:
    cache.kept(folder, "a.bin", lambda: b"old")
    made = []

    def make() -> bytes:
        made.append(1)
        return b"new"

    def load(code: bytes) -> bytes:
        if code == b"old":
            raise LookupError
        return code

    assert cache.loaded(folder, "a.bin", make, load, LookupError) == b"new" and len(made) == 1
    with pytest.raises(LookupError):
        cache.loaded(folder, "b.bin", lambda: b"old", load, LookupError)
    assert not (folder / "b.bin").exists()
