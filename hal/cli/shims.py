"""``hal install-shims``: let scripts import ``flash_mla`` and ``deep_ep`` and get the HAL's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

HELP: Final = (
    "Write importable packages flash_mla and deep_ep that resolve to the HAL's, for scripts that nobody edits.\n\n"
    "A name that is installed already is left alone. 'python -m hal.compat run script.py' does the same for one run. "
    "Exits with 1 if one of the two could not be written or removed."
)


def install_shims(
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Remove what this command wrote.")] = False,
    target: Annotated[
        Path | None, typer.Option("--target", help="The folder to write in; by default where pip installs.")
    ] = None,
) -> None:
    """Write the two packages, or remove them."""
    from hal.compat import shims

    done = shims.uninstall(target) if uninstall else shims.install(target)
    for one in done:
        typer.echo(f"{one.name}: {one.said}")
    if not all(one.ok for one in done):
        raise typer.Exit(1)
