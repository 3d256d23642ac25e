"""``hal ep``: looking into expert-parallel groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hal.cli.text import console, plain

if TYPE_CHECKING:
    from rich.table import Table

    from hal.ep.doctor import Finding, RankState

app = typer.Typer(
    name="ep",
    help="Look into expert-parallel groups.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HELP: Final = (
    "Say who waits for whom: phase, expected and received rows and the last operations of every rank, for the live "
    "groups of this user on this machine, or for dumps that buffers wrote at a RankFailure (HAL_EP_DUMP=FOLDER).\n\n"
    "Exits with 0 if nobody is stuck, 1 if a rank failed or has waited for longer than a second, 2 if the request is "
    "wrong."
)


@app.callback()
def _options() -> None:
    """Look into expert-parallel groups."""


@app.command("doctor", help=HELP)
def doctor(
    dumps: Annotated[list[Path] | None, typer.Argument(help="Dumps to read instead of looking at live groups.")] = None,
    last: Annotated[int, typer.Option("--last", min=0, help="Operations of every rank to show.")] = 4,
    machine: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say who waits for whom."""
    from hal.ep import doctor as instrument

    found = [instrument.read_dump(path) for path in dumps] if dumps else instrument.live(_states())
    if machine:
        typer.echo(json.dumps({"groups": [one.as_json() for one in found]}, indent=1))
    else:
        _show(found, last)
    if any(one.stuck for one in found):
        raise typer.Exit(1)


def _states() -> list[RankState]:
    """What every usable backend sees of its groups."""
    from hal import plugins
    from hal.cli.status import plugins_to_stderr

    with plugins_to_stderr():
        usable = [status.name for status in plugins.registry().statuses() if status.state == "available"]
        return [state for name in usable for state in plugins.select(name).backend.ep_live()]


def _show(found: list[Finding], last: int) -> None:
    out = console()
    if not found:
        out.print("No expert-parallel group of this user is live on this machine.")
    for one in found:
        ranks = one.states[0].num_ranks if one.states else 0
        out.print(f"group {one.group} of {ranks} ranks ({one.source})")
        out.print(_table(one, last))
        if one.failure is not None:
            counts = _rows(one.failure)
            expert = "" if one.failure["expert"] is None else f" for expert {one.failure['expert']}"
            failed = f"rank {one.failure['rank']} failed in {one.failure['phase']}{expert}"
            out.print(plain(f"{failed}: {one.failure['reason']}") + (f"; {counts}" if counts else ""))
        for rank, what in one.culprits.items():
            waiting = [str(wait["rank"]) for wait in one.waits if wait["waits_for"] == rank]
            if waiting:
                out.print(plain(f"rank {rank} is waited for by rank {', '.join(waiting)}: {what}"))
        if not one.waits and one.failure is None:
            out.print("nobody waits")


def _table(found: Finding, last: int) -> Table:
    from rich.table import Table

    table = Table("rank", "process", "does", "waits for", "since", "rows", "last operations")
    waits = {wait["rank"]: wait for wait in found.waits}
    for state in found.states:
        wait = waits.get(state.rank)
        process = state.process if not state.pid else f"{state.pid} {state.process}"
        recent = state.records[-last:] if last else []
        history = ", ".join(_operation(record) for record in recent)
        if wait is None:
            now = state.records[-1] if state.records else None
            does = "nothing" if now is None or now["microseconds"] is not None else f"{now['kind']} ({now['phase']})"
            table.add_row(str(state.rank), process, does, "", "", "", history)
            continue
        table.add_row(
            str(state.rank),
            process,
            f"{wait['kind']} ({wait['phase']})",
            f"rank {wait['waits_for']}",
            f"{wait['seconds']:.1f} s",
            _rows(wait),
            history,
        )
    return table


def _rows(counts: dict[str, Any]) -> str:
    if counts["expected"] is None:
        return ""
    return f"expected {counts['expected']}, received {counts['received'] or 0}"


def _operation(record: Any) -> str:
    took = record["microseconds"]
    return f"#{record['operation']} {record['kind']} " + ("unfinished" if took is None else f"{took:.0f} µs")
