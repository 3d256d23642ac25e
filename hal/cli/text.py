"""Words on the terminal: the consoles, and text from plugins made safe to print."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import Final

from rich.console import Console

from hal.spec.capability import Capabilities, MlaCapabilities
from hal.spec.errors import CompileError, HalError

_PIPE_WIDTH: Final = 120
_LEAST_WIDTH: Final = 40
"""Below it tables would lose what they say; the terminal breaks lines instead."""


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr): colours only on a terminal, a fixed width where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    known_width = stream.isatty() or "COLUMNS" in os.environ
    made = Console(
        stderr=stderr, highlight=False, markup=False, emoji=False, width=None if known_width else _PIPE_WIDTH
    )
    if made.width < _LEAST_WIDTH:
        made.width = _LEAST_WIDTH
    return made


def plain(value: object) -> str:
    """One line without control characters, whatever a plugin passed as text."""
    line = " ".join(str(value).split())
    return "".join(c for c in line if c.isprintable())


def paragraph(error: HalError) -> str:
    """The error's name and message as one paragraph, wrapped only where a person reads it.

    A compiler's log keeps its lines.
    """
    if isinstance(error, CompileError):
        return f"CompileError: {error}"
    text = f"{type(error).__name__}: {plain(error)}"
    if not sys.stderr.isatty():
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)


def offers(capabilities: Capabilities) -> str:
    """What a backend offers, in a few words."""
    parts = []
    if capabilities.mla_dense is not None:
        parts.append(f"MLA decode ({_types(capabilities.mla_dense)})")
    if capabilities.mla_sparse is not None:
        parts.append(f"sparse MLA decode ({_types(capabilities.mla_sparse)})")
    if capabilities.ep is not None:
        modes = ", ".join(mode.replace("_", " ") for mode in capabilities.ep.modes)
        parts.append(f"expert-parallel ({modes})")
    return plain("; ".join(parts) or "nothing is declared yet")


def _types(declared: MlaCapabilities) -> str:
    packed = [name for name in declared.kv_formats if name != "plain"]
    return ", ".join([*declared.dtypes, *(f"{name} cache" for name in packed)])
