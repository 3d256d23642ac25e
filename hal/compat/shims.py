"""Packages called ``flash_mla`` and ``deep_ep`` that resolve to this one, for scripts that nobody edits.

`install` writes them where Python looks, `uninstall` takes them away again, and ``python -m hal.compat run`` makes them
importable for one run. All three use the same two small packages, in ``hal/compat/packages``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from hal.spec.errors import SpecError

PACKAGES: Final = Path(__file__).parent / "packages"
"""A folder that, on ``sys.path``, makes both names importable."""

NAMES: Final = ("deep_ep", "flash_mla")

_MARK: Final = "Written by ``hal install-shims``."
# Modules that callers import by their published path, and where their names are here.
_MODULES: Final = {
    "deep_ep.buffer": "hal.compat.deep_ep",
    "deep_ep.buffers": "hal.compat.deep_ep",
    "deep_ep.buffers.elastic": "hal.compat.deep_ep",
    "deep_ep.buffers.legacy": "hal.compat.deep_ep",
    "deep_ep.utils": "hal.compat.deep_ep.utils",
    "deep_ep.utils.event": "hal.compat.deep_ep.utils",
    "flash_mla.flash_mla_interface": "hal.compat.flash_mla",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the published modules among this package's own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for `_MODULES` only."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make a module that holds the names of ours; ours stays what it is."""
        made = ModuleType(spec.name)
        _copy(importlib.import_module(_MODULES[spec.name]), made)
        if any(name.startswith(spec.name + ".") for name in _MODULES):
            spec.submodule_search_locations = []
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def stand_in(name: str) -> None:
    """Fill the package that is being imported with the names of ``hal.compat``'s module of that name."""
    _copy(importlib.import_module(f"hal.compat.{name}"), sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _copy(ours: ModuleType, made: ModuleType) -> None:
    for name, value in vars(ours).items():
        if not name.startswith("__") or name in ("__all__", "__version__"):
            setattr(made, name, value)


@dataclass(frozen=True)
class Done:
    """What became of one package.

    Attributes
    ----------
    name : str
    changed : bool
    ok : bool
        Whether what was asked for holds now.
    said : str
        One line.
    """

    name: str
    changed: bool
    ok: bool
    said: str


def install(target: Path | None = None) -> list[Done]:
    """Write both packages, each only where no other package of that name is installed.

    Both places are looked at before anything is written.

    Parameters
    ----------
    target : Path, optional
        A folder that Python looks in; by default the one where pip installs.

    Raises
    ------
    SpecError
        The folder is missing, or cannot be written, or holds a file in the place of a package.
    """
    folder = _folder(target)
    others = {name: _other(name, folder) for name in NAMES}
    for name, other in others.items():
        place = folder / name
        if other is None and os.path.lexists(place) and not place.is_dir():
            raise SpecError("target", f"{folder} with the file {place}", "a folder where that file is not in the way")
    done = []
    for name, other in others.items():
        place = folder / name
        if other is not None:
            done.append(Done(name, False, False, f"left alone: a {name} is installed in {other}"))
            continue
        there = _is_ours(place)
        try:
            place.mkdir(exist_ok=True)
            shutil.copyfile(PACKAGES / name / "__init__.py", place / "__init__.py")
        except OSError as error:
            raise SpecError("target", f"{folder} ({error.strerror})", "a folder that can be written") from None
        said = f"{'was' if there else 'installed'} in {place}; 'import {name}' gives hal.compat.{name}"
        done.append(Done(name, not there, True, said))
    return done


def uninstall(target: Path | None = None) -> list[Done]:
    """Take away what `install` wrote, and nothing else.

    Parameters
    ----------
    target : Path, optional
        As in `install`.

    Raises
    ------
    SpecError
        As in `install`.
    """
    folder = _folder(target)
    done = []
    for name in NAMES:
        place = folder / name
        if not _is_ours(place):
            said = f"left alone: {place} is another package" if place.exists() else f"not installed in {folder}"
            done.append(Done(name, False, not place.exists(), said))
            continue
        try:
            shutil.rmtree(place / "__pycache__", ignore_errors=True)
            (place / "__init__.py").unlink()
            rest = sorted(one.name for one in place.iterdir())
            if not rest:
                place.rmdir()
        except OSError as error:
            raise SpecError("target", f"{folder} ({error.strerror})", "a folder that can be written") from None
        said = f"removed from {place}" + (f"; kept there: {', '.join(rest)}" if rest else "")
        done.append(Done(name, True, True, said))
    return done


def _folder(target: Path | None) -> Path:
    folder = Path(sysconfig.get_path("purelib")) if target is None else target
    if not folder.is_dir():
        raise SpecError("target", str(folder), "an existing folder")
    return folder.resolve()


def _is_ours(place: Path) -> bool:
    try:
        return _MARK in (place / "__init__.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _other(name: str, folder: Path) -> Path | None:
    """Where another package of this name is: in the folder itself, or anywhere else that Python looks."""
    for found in _specs(name, folder):
        places = [Path(one) for one in found.submodule_search_locations or ()]
        if found.origin is not None and not places:
            return Path(found.origin)
        other = [one for one in places if not _is_ours(one)]
        if other and (found.origin is not None or any((one / "__init__.py").exists() for one in other)):
            return other[0]
    return None


def _specs(name: str, folder: Path) -> Iterator[importlib.machinery.ModuleSpec]:
    """All answers to an import of this name: an import of ours must not hide what is installed."""
    path_finder = importlib.machinery.PathFinder
    answers = [path_finder.find_spec(name, [entry or "."]) for entry in [str(folder), *sys.path]]
    # Packages installed editable are found by finders of their own.
    others = [one for one in sys.meta_path if one is not path_finder and not isinstance(one, _Finder)]
    answers += [one.find_spec(name, None) for one in others if hasattr(one, "find_spec")]
    return (one for one in answers if one is not None)
