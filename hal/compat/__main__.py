"""``python -m hal.compat run script.py args…``: one run in which ``flash_mla`` and ``deep_ep`` resolve to this package.

Nothing is installed. Processes that the script starts see the same two packages.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from hal.compat.shims import NAMES, PACKAGES

_USAGE = "usage: python -m hal.compat run [-m module | script.py] [args…]"


def run(arguments: Sequence[str]) -> None:
    """Run a script or a module as ``python`` would, with the shims ahead of everything installed."""
    sys.path.insert(0, str(PACKAGES))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(PACKAGES) + (os.pathsep + inherited if inherited else "")
    for name in NAMES:
        sys.modules.pop(name, None)
    if arguments[0] == "-m":
        sys.argv = [arguments[1], *arguments[2:]]
        sys.path.insert(1, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(1, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    """Read the command line."""
    arguments = sys.argv[1:]
    if len(arguments) < 2 or arguments[0] != "run" or (arguments[1] == "-m" and len(arguments) < 3):
        sys.exit(_USAGE)
    if arguments[1] != "-m" and not os.path.isfile(arguments[1]):
        sys.exit(f"{_USAGE}\nthere is no file {arguments[1]}")
    run(arguments[1:])


if __name__ == "__main__":
    main()
