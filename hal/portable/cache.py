"""Compiled code on disk: found again by what it was made from, whole or not at all.

Code in the cache is run, so its folder belongs to the user alone. Entries are renamed into place, so any number of
processes may write the same one, and carry a checksum, so a damaged one is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

ENV: Final = "HAL_KERNEL_CACHE"
"""Folder of all compiled kernels; by default ``kernel-hal`` in the user's cache folder."""

_DIGEST: Final = hashlib.sha256().digest_size


def key(*parts: str) -> str:
    """Name an entry by everything that decides what it holds."""
    # Lengths keep two different lists of parts from being one text.
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


def private_folder(*below: str, variable: str = ENV) -> Path | None:
    """A folder of the cache that nobody else can write to; None where there can be none, and nothing is kept.

    Parameters
    ----------
    *below : str
        Names of folders within the cache.
    variable : str
        The environment variable that says where the cache is.
    """
    chosen = os.environ.get(variable)
    try:
        common = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kernel-hal")
        base = Path(chosen) if chosen else common
        folder = base.joinpath(*below)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private else None


def kept(folder: Path | None, name: str, make: Callable[[], bytes]) -> bytes:
    """The entry of this name, made and kept if it is not there whole."""
    if folder is None:
        return make()
    path = folder / name
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def drop(folder: Path | None, name: str) -> None:
    """Forget an entry that is whole and nevertheless of no use."""
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write beside and rename. A full disk costs only the next compilation."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
