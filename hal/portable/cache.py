"""Compiled code on disk: found again by what it was made from, whole or not at all.

Code in the cache is run, so nobody else can write to its folder or put another in its place. Entries are renamed into
place, so any number of processes may write the same one, and carry a checksum, so a damaged one is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

ENV: Final = "HAL_KERNEL_CACHE"
"""Folder of all compiled kernels; by default ``kernel-hal`` in the user's cache folder."""

_DIGEST: Final = hashlib.sha256().digest_size
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_T = TypeVar("_T")


class UnsafeFolder(OSError):
    """A folder that others could write to or put another in the place of."""


def key(*parts: str) -> str:
    """Name an entry by everything that decides what it holds."""
    # Lengths keep two different lists of parts from being one text.
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


def private_folder(*below: str, variable: str = ENV) -> Path | None:
    """As `safe_folder`; None where there is none, with a warning that says why, and nothing is kept."""
    try:
        return safe_folder(*below, variable=variable)
    except UnsafeFolder as error:
        warnings.warn(f"no compiled code is kept: {error}", stacklevel=2)
    except OSError:
        pass  # a home that cannot be written to is nothing unusual
    return None


def safe_folder(*below: str, variable: str = ENV) -> Path:
    """A folder of the cache that nobody else can write to or replace.

    Parameters
    ----------
    *below : str
        Names of folders within the cache.
    variable : str
        The environment variable that says where the cache is.

    Raises
    ------
    UnsafeFolder
        Others could write there; says where, and what to do.
    OSError
        There can be none.
    """
    chosen = os.environ.get(variable)
    try:
        common = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kernel-hal")
        # No link is left in what is returned: whoever can change one could do so after the check.
        folder = (Path(chosen) if chosen else common).joinpath(*below).resolve()
    except RuntimeError as error:  # nobody's home, or links in a circle
        raise OSError(f"{error}; set {variable} to a folder of your own") from error
    for one in (*reversed(folder.parents), folder):
        one.mkdir(mode=0o700, exist_ok=True)
        found, wrong = one.stat(), ""
        if found.st_uid != os.getuid() and (one == folder or found.st_uid):
            wrong = f"{one} belongs to user {found.st_uid} (chown {os.getuid()} {one}"
        # In a sticky folder nobody can move or remove what is another's.
        elif found.st_mode & _OTHERS_WRITE and (one == folder or not found.st_mode & stat.S_ISVTX):
            wrong = f"others can write to {one} (chmod go-w {one}"
        if wrong:
            raise UnsafeFolder(f"{wrong}, or set {variable} to a folder below ones that are yours or root's)")
    return folder


def kept(folder: Path | None, name: str, make: Callable[[], bytes]) -> bytes:
    """The entry of this name, made and kept if it is not there whole."""
    if folder is None:
        return make()
    path = folder / name
    found = _read(path)
    if found is None:
        found = make()
        _put(path, hashlib.sha256(found).digest() + found)
    return found


def loaded(
    folder: Path | None, name: str, make: Callable[[], bytes], load: Callable[[bytes], _T], refuses: type[Exception]
) -> _T:
    """What ``load`` makes of the entry of this name.

    One that it refuses is whole and nevertheless of no use, as after a driver has changed without saying so: it is made
    anew, once.
    """
    try:
        return load(kept(folder, name, make))
    except refuses:
        drop(folder, name)
    try:
        return load(kept(folder, name, make))
    except refuses:
        drop(folder, name)
        raise


def written(folder: Path | None, name: str, text: str) -> Path | None:
    """Leave a text in the cache, to be looked at; where it is."""
    if folder is None or not _put(folder / name, text.encode()):
        return None
    return folder / name


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


def _put(path: Path, content: bytes) -> bool:
    """Write beside and rename. A full disk costs only the next compilation."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(path)
            return True
        except OSError:
            Path(name).unlink(missing_ok=True)
    return False
