"""What is known of every backend, and which one is in force and why: shared by all commands."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from hal import plugins
from hal.cli.text import plain
from hal.plugins import Selected, Status
from hal.spec.errors import BackendUnavailable

_WITNESS: Final = 'while IFS= read -r line; do [ -n "$line" ] || exit 0; last=$line; done; printf "%s\\n" "$last" >&2'
"""Says the last line it was given if what gives them ends before it has given an empty one."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The backend a call without ``backend=`` would use now.

    Attributes
    ----------
    selected : Selected or None
        None where the choice cannot be met.
    why : str
        Who chose it, or the first sentence of why nothing can be used.
    error : BackendUnavailable or None
        Why there is none.
    """

    selected: Selected | None
    why: str
    error: BackendUnavailable | None = None

    @property
    def name(self) -> str | None:
        """Its name, None where there is none."""
        return self.selected.name if self.selected is not None else None


@contextlib.contextmanager
def plugins_to_stderr() -> Iterator[None]:
    """Whatever plugins print while they are asked goes to stderr, so that stdout holds only the answer.

    What their native code writes too: for that long file descriptor 1 is a copy of 2.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        # C keeps what it prints to a file or a pipe until its buffer is full.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def ask(names: Iterable[str]) -> None:
    """Ask these backends, where they were not before; stderr names the one that ends the process, as its libraries may.

    Raises
    ------
    BackendUnavailable
        No installed distribution registers one of them.
    """
    # Of a process that ended nothing is left to tell it, hence another one; Ctrl-C is not for it.
    line = ["/bin/sh", "-c", _WITNESS]
    with subprocess.Popen(line, stdin=subprocess.PIPE, bufsize=0, start_new_session=True) as witness:
        assert witness.stdin is not None
        try:
            for name in names:
                said = (
                    f"hal: the process ended while the backend {plain(name)} was asked, by its plugin or a library.",
                    f"To see where it crashes: python -X faulthandler -m hal doctor {plain(name)}.",
                    f"Until it is mended or uninstalled, {plugins.ENV} set to another keeps it from being asked.",
                )
                witness.stdin.write(f"{' '.join(said)}\n".encode())
                plugins.registry().status(name)
        finally:
            witness.stdin.write(b"\n")


def choose(name: str | None = None) -> InForce:
    """The backend of ``--backend`` if given, else of ``HAL_BACKEND``, else the best available one.

    Raises
    ------
    BackendUnavailable
        It cannot be used.
    """
    environment = os.environ.get(plugins.ENV) or None
    chosen, installed = name or environment, plugins.registry().names()
    with plugins_to_stderr():
        ask([chosen] if chosen in installed else installed)
        if name is not None:
            return InForce(plugins.registry().select(name, f"--backend {name}"), "chosen by --backend")
        if environment is not None:
            source = f"{plugins.ENV}={environment}"
            return InForce(plugins.registry().select(environment, source), f"chosen by {source}")
        selected = plugins.select()
        available = [s for s in plugins.registry().statuses() if s.state == "available"]
    if len(available) == 1:
        return InForce(selected, f"automatic: the only one available ({plugins.ENV} is unset)")
    best = f"the highest priority of the {len(available)} available"
    return InForce(selected, f"automatic: {best} ({plugins.ENV} is unset)")


def in_force() -> InForce:
    """As `choose`, but a choice that cannot be met is an answer and not an error."""
    try:
        return choose()
    except BackendUnavailable as error:
        requested = error.requested
        reason = error.reasons.get(requested or "", "no installed backend has that name")
        why = f"{plugins.ENV}={requested}: {reason}" if requested else "no backend is available"
        return InForce(None, plain(why), error)


def statuses() -> list[Status]:
    """Ask every installed backend."""
    with plugins_to_stderr():
        ask(plugins.registry().names())
        return plugins.registry().statuses()


def as_json(status: Status, chosen: InForce) -> dict[str, Any]:
    """Everything known of one backend, as plain data. Nothing is shortened."""
    backend, probe = status.backend, status.probe
    return {
        "name": status.name,
        "in_force": status.name == chosen.name,
        "state": status.state,
        "reason": plain(status.reason),
        "fix": plain(status.fix),
        "distribution": status.distribution,
        "priority": None if backend is None else backend.priority,
        "spec_version": None if backend is None else backend.spec_version,
        "evidence": None if probe is None else probe.evidence,
        "details": {} if probe is None else {str(key): str(value) for key, value in probe.details.items()},
        "capabilities": None if status.capabilities is None else status.capabilities.to_dict(),
        "error": None if status.error is None else f"{type(status.error).__name__}: {status.error}",
    }


def in_force_json(chosen: InForce) -> dict[str, Any]:
    """The choice, as plain data."""
    return {"name": chosen.name, "why": chosen.why, "error": None if chosen.error is None else str(chosen.error)}
