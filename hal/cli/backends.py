"""``hal backends``: what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

import hal
from hal.cli.status import InForce, as_json, in_force, in_force_json, statuses
from hal.cli.text import console, offers, plain

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from hal.plugins import Status

HELP: Final = (
    "List every installed backend: its state and why, what it offers, and which one is in force.\n\n"
    "Exits with 0 whenever the list could be made; hal doctor says whether a backend works."
)

STYLES: Final = {"available": "green", "unavailable": "yellow", "refused": "magenta", "broken": "red"}

_WIDE: Final = 100
_FACTS: Final = ("priority", "spec", "evidence")


def backends(
    machine: Annotated[bool, typer.Option("--json", help="One JSON document, with all capabilities.")] = False,
) -> None:
    """List every installed backend."""
    known = statuses()
    chosen = in_force()
    if machine:
        document = {
            "hal": hal.__version__,
            "spec_version": hal.SPEC_VERSION,
            "in_force": in_force_json(chosen),
            "backends": [as_json(status, chosen) for status in known],
        }
        typer.echo(json.dumps(document, indent=2, default=str))
        return
    out = console()
    if known:
        out.print(_table(known, chosen, wide=out.width >= _WIDE))
    else:
        out.print("No backend is installed. 'pip install hal-cpu' gives the embedded one.")
    out.print(force_line(chosen))


def force_line(chosen: InForce) -> Text:
    """One line: which backend is in force and who chose it."""
    from rich.text import Text

    if chosen.name is None:
        return Text.assemble(("in force: none", "bold red"), " — ", chosen.why)
    return Text.assemble("● in force: ", (chosen.name, "bold"), " — ", chosen.why)


def _table(known: list[Status], chosen: InForce, wide: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("", width=1)
    for heading in ("backend", "state", *(_FACTS if wide else ())):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is, or why it is out", overflow="fold")
    for status in known:
        facts = _facts(status)
        table.add_row(
            "●" if status.name == chosen.name else "",
            Text(plain(status.name), style="bold"),
            Text(status.state, style=STYLES[status.state]),
            *(facts if wide else ()),
            _about(status, () if wide else facts),
        )
    return table


def _facts(status: Status) -> list[str]:
    """Values of the columns `_FACTS`."""
    backend, probe = status.backend, status.probe
    return [
        "–" if backend is None else plain(backend.priority),
        "–" if backend is None else plain(backend.spec_version),
        "–" if probe is None or not probe.available else plain(probe.evidence),
    ]


def _about(status: Status, facts: Sequence[str]) -> Text:
    from rich.text import Text

    lines = [Text(plain(status.reason))]
    if status.capabilities is not None:
        lines.append(Text(offers(status.capabilities)))
    if status.fix:
        lines.append(Text.assemble(("fix: ", "bold"), plain(status.fix)))
    stated = [f"{name} {fact}" for name, fact in zip(_FACTS, facts, strict=False) if fact != "–"]
    lines.append(Text(", ".join([plain(status.distribution), *stated]), style="dim"))
    return Text("\n").join(lines)
