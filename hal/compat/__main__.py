"""``python -m hal.compat run script.py args…``: one run in which ``flash_mla`` and ``deep_ep`` resolve to this package.

Nothing is installed. Processes that the script starts see the same two packages.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType
from typing import Any

from hal.compat.shims import NAMES, PACKAGES

_USAGE = "usage: python -m hal.compat run [-m module | script.py] [args…]"
_HELP = ("-h", "--help")


def run(arguments: Sequence[str]) -> None:
    """Run a script or a module as ``python`` would, with the shims ahead of everything installed."""
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(PACKAGES) + (os.pathsep + inherited if inherited else "")
    for name in NAMES:
        sys.modules.pop(name, None)
    is_module = arguments[0] == "-m"
    script = os.path.abspath(arguments[0])
    # As python does it: a folder or an archive is a place to import __main__ from.
    is_place = not is_module and pkgutil.get_importer(script) is not None
    first = os.getcwd() if is_module else script if is_place else os.path.dirname(os.path.realpath(script))
    is_safe = getattr(sys.flags, "safe_path", False)  # since Python 3.11
    if not is_safe:
        del sys.path[0]  # the current folder, for this launcher's own -m
    sys.path[:0] = [str(PACKAGES)] if is_safe and not is_place else [str(PACKAGES), first]
    sys.argv = list(arguments[1:] if is_module else arguments)
    if is_module:
        spec = _module(arguments[1])
        sys.argv[0] = spec.origin or arguments[1]
        _run_spec(spec)
    elif is_place:
        _run_spec(_found("__main__", PathFinder.find_spec("__main__", [script])))
    else:
        _run_file(script)


def _module(name: str) -> ModuleSpec:
    """The module that ``-m name`` means: of a package, its ``__main__``."""
    spec = _found(name, importlib.util.find_spec(name))
    if spec.submodule_search_locations is None:
        return spec
    return _found(f"{name}.__main__", importlib.util.find_spec(f"{name}.__main__"))


def _found(name: str, spec: ModuleSpec | None) -> ModuleSpec:
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return spec


def _run_spec(spec: ModuleSpec) -> None:
    get_code = getattr(spec.loader, "get_code", None)
    code = None if get_code is None else get_code(spec.name)
    if code is None:
        raise ImportError(f"{spec.name} has no code to run", name=spec.name)
    _run_code(code, spec.origin, spec.loader, spec)


def _run_file(path: str) -> None:
    if path.endswith(".pyc"):
        compiled = SourcelessFileLoader("__main__", path)
        code = compiled.get_code("__main__")
        assert code is not None
        _run_code(code, path, compiled)
    else:
        source = SourceFileLoader("__main__", path)
        _run_code(source.source_to_code(source.get_data(path), path), path, source)


def _run_code(code: CodeType, file: str | None, loader: Any, spec: ModuleSpec | None = None) -> None:
    """Run code in a ``__main__`` that stays: exit handlers and threads that go on find the script's names there."""
    main = ModuleType("__main__")
    names = {"__builtins__": builtins, "__file__": file, "__cached__": None, "__loader__": loader, "__spec__": spec}
    vars(main).update(names, __package__=None if spec is None else spec.parent)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def main() -> None:
    """Read the command line."""
    arguments = sys.argv[1:]
    asked = arguments[1:2] if arguments[:1] == ["run"] else arguments[:1]
    if asked and asked[0] in _HELP:
        print(_USAGE)
        return
    if len(arguments) < 2 or arguments[0] != "run" or (arguments[1] == "-m" and len(arguments) < 3):
        sys.exit(_USAGE)
    if arguments[1] != "-m" and not os.path.exists(arguments[1]):
        sys.exit(f"{_USAGE}\nthere is no file {arguments[1]}")
    run(arguments[1:])


if __name__ == "__main__":
    main()
