"""``hal doctor``: why each backend is in or out, and whether those that are in really work."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import traceback
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import hal
from hal import plugins
from hal.cli.backends import STYLES, force_line
from hal.cli.status import InForce, as_json, ask, in_force, in_force_json, plugins_to_stderr, statuses
from hal.cli.text import console, offers, plain
from hal.spec import validation
from hal.spec.errors import BackendUnavailable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from hal.cli.microkernel import Check
    from hal.plugins import Status

HELP: Final = (
    "Say of every backend (or of those named) why it is in or out, and run a small decode with a known answer on each "
    "device of those that are in.\n\n"
    "Exits with 0 if the backend in force (or every one named) works, 1 if it does not, 2 if no such backend is "
    "installed or the command line is wrong."
)

_VERDICT_STYLES: Final = {"PASS": "bold green", "NOT RUN": "bold yellow"}


def doctor(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Backends to look at.")] = None,
    machine: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a device may take, compilation included.")] = 120,
) -> None:
    """Say why each backend is in or out, and run a small decode on those that are in."""
    known = _named(names) if names else statuses()
    chosen = in_force()
    out = console()
    if not machine:
        _print_environment(out)
    diagnoses: list[dict[str, Any]] = []
    for status in known:
        checks = _checks(status, timeout)
        works = bool(checks) and all(check.verdict == "PASS" for check in checks)
        diagnoses.append(as_json(status, chosen) | {"works": works, "checks": [_check_json(c) for c in checks]})
        if not machine:
            _print_backend(out, status, checks, status.name == chosen.name)
    code = _exit_code(diagnoses, chosen, bool(names))
    if machine:
        document = {
            "environment": _environment(),
            "in_force": in_force_json(chosen),
            "backends": diagnoses,
            "exit_code": code,
        }
        typer.echo(json.dumps(document, indent=2, default=str))
    else:
        _print_conclusion(out, chosen, diagnoses, bool(names))
    if code == 2 and chosen.error is not None:
        raise chosen.error
    raise typer.Exit(code)


def _named(names: list[str]) -> list[Status]:
    """Raise BackendUnavailable for the first name nobody registers."""
    with plugins_to_stderr():
        ask(names)
        return [plugins.registry().status(name) for name in dict.fromkeys(names)]


def _checks(status: Status, timeout: float) -> list[Check]:
    if status.capabilities is None or status.state != "available":
        return []
    from hal.cli.microkernel import Check, check_devices, devices

    where = devices(status.capabilities)
    if not where:
        kinds = ", ".join(status.capabilities.device_types)
        return [Check("none", "NOT RUN", plain(f"torch sees no device of the types it takes: {kinds or 'none'}"))]
    with console(stderr=True).status(f"running a decode on {plain(status.name)} …"):
        return list(check_devices(status.name, where, timeout))


def _check_json(check: Check) -> dict[str, Any]:
    # JSON has no NaN: a result that holds one has no worst error, and its note says where.
    numbers = dataclasses.asdict(check)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _exit_code(diagnoses: list[dict[str, Any]], chosen: InForce, named: bool) -> int:
    if named:
        return 0 if all(d["works"] for d in diagnoses) else 1
    if chosen.error is not None:
        return 2 if _unknown(chosen.error) else 1
    return 0 if any(d["works"] for d in diagnoses if d["in_force"]) else 1


def _unknown(error: BackendUnavailable) -> bool:
    return error.requested is not None and error.requested not in error.reasons


def _environment() -> dict[str, Any]:
    import torch

    variables = {key: value for key, value in sorted(os.environ.items()) if key.startswith("HAL_")}
    return {
        "hal": hal.__version__,
        "spec_version": hal.SPEC_VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "variables": variables,
    }


def _print_environment(out: Console) -> None:
    found = _environment()
    variables = {plugins.ENV: "(unset: the best available one)", validation.ENV: "(unset: shapes)"}
    variables |= found.pop("variables")
    found["specification"] = found.pop("spec_version")
    _heading(out, "environment")
    for key, value in [*found.items(), *variables.items()]:
        _fact(out, key, value)
    out.print()


def _print_backend(out: Console, status: Status, checks: list[Check], is_in_force: bool) -> None:
    from rich.text import Text

    mark = "● " if is_in_force else ""
    _heading(out, Text.assemble(mark, plain(status.name), " ", (status.state, STYLES[status.state])))
    _fact(out, "why", status.reason)
    if status.error is not None and (raised := traceback.extract_tb(status.error.__traceback__)):
        _fact(out, "where", f"{raised[-1].filename}:{raised[-1].lineno}")
    if status.fix:
        _fact(out, "fix", status.fix, "bold")
    _fact(out, "distribution", status.distribution)
    if status.backend is not None:
        _fact(out, "specification", status.backend.spec_version)
    if status.probe is not None:
        if status.probe.available:
            _fact(out, "evidence", status.probe.evidence)
        for key, value in status.probe.details.items():
            _fact(out, plain(key), value)
    if status.capabilities is not None:
        _fact(out, "offers", offers(status.capabilities))
    for check in checks:
        _fact(out, f"check {check.device}", _describe(check))
    out.print()


def _describe(check: Check) -> Text:
    from rich.text import Text

    text = Text.assemble((check.verdict, _VERDICT_STYLES.get(check.verdict, "bold red")), "  ", plain(check.note))
    if check.milliseconds is not None:
        text.append(
            f" (worst row: out off by {check.out_error:.2g}, cosine difference {check.cosine:.2g}, "
            f"lse off by {check.lse_error:.2g}; {check.milliseconds:.3g} ms)"
        )
    return text


def _print_conclusion(out: Console, chosen: InForce, diagnoses: list[dict[str, Any]], named: bool) -> None:
    from rich.text import Text

    if not diagnoses:
        out.print("No backend is installed. 'pip install hal-cpu' gives the embedded one.")
    if not named:
        out.print(force_line(chosen))
    for diagnosis in diagnoses:
        if named or diagnosis["in_force"]:
            verdict = ("works", "bold green") if diagnosis["works"] else ("does not work", "bold red")
            out.print(Text.assemble(plain(diagnosis["name"]), " ", verdict))


def _heading(out: Console, title: str | Text) -> None:
    from rich.text import Text

    text = Text(title) if isinstance(title, str) else title
    text.stylize("bold")
    out.print(text)


def _fact(out: Console, key: str, value: object, style: str = "") -> None:
    """One ``key  value`` line; what does not fit continues under the value."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=14, style="dim", overflow="fold")
    grid.add_column(overflow="fold")
    grid.add_row(plain(key), value if isinstance(value, Text) else Text(plain(value), style=style))
    out.print(Padding(grid, (0, 0, 0, 2)))
