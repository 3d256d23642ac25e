"""Commands that other distributions add: entry points of the group ``hal.commands``.

The entry point's *name* is the command's name; its value is a `typer.Typer` app, or a callable that returns one::

    [project.entry-points."hal.commands"]
    conform = "hal_conformance.cli:app"

One is imported when it is run or when ``hal --help`` describes it, inside a fence: whatever it raises becomes its own
help line and never touches another command. The built-in names cannot be taken.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import typer
from typer.core import TyperGroup

from hal.cli.text import plain

GROUP: Final = "hal.commands"

KNOWN: Final = {"conform": ("Decide whether a backend keeps the specification.", "hal-conformance")}
"""Commands worth a hint while the distribution that has them is not installed: what they do, and who has them."""


class Commands(TyperGroup):
    """The built-in commands first, then those of other distributions, then hints for `KNOWN` ones."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name; imports nothing."""
        built_in = list(super().list_commands(ctx))
        added = {entry.name for entry in entry_points(group=GROUP)} | set(KNOWN)
        return built_in + sorted(added - set(built_in))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One command; imports at most the distribution that has it."""
        built_in = super().get_command(ctx, cmd_name)
        if built_in is not None:
            return built_in
        entries = list(entry_points(group=GROUP, name=cmd_name))
        if entries:
            return _added(cmd_name, entries)
        if cmd_name in KNOWN:
            summary, distribution = KNOWN[cmd_name]
            hint = f"it is in its own distribution, install it with: pip install {distribution}"
            return _unusable(cmd_name, f"{summary} Not installed: pip install {distribution}", f"not installed; {hint}")
        return None


def _added(name: str, entries: list[EntryPoint]) -> Any:
    """The command of another distribution, or one that says why it cannot run."""
    owners = " and ".join(sorted(e.dist.name if e.dist is not None else e.value for e in entries))
    try:
        if len(entries) > 1:
            raise TypeError(f"registered by {len(entries)} distributions, {owners}: uninstall all but one")
        made = entries[0].load()
        made = made if isinstance(made, typer.Typer) else made()
        if not isinstance(made, typer.Typer):
            raise TypeError(f"{entries[0].value} gave a {type(made).__name__}, not a typer.Typer")
        command = typer.main.get_command(made)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit too: a module that calls sys.exit() at import must not end `hal --help`.
        reason = plain(f"{type(error).__name__}: {error}")
        return _unusable(name, f"Broken: {reason}", f"the command of {owners} is broken: {reason}")
    command.name = name
    return command


def _unusable(name: str, summary: str, message: str) -> Any:
    """A command that takes anything, says one line and exits with 2."""
    from rich.markup import escape

    def refuse() -> None:
        typer.echo(f"hal {name}: {message}", err=True)
        raise typer.Exit(2)

    stand_in = typer.Typer(add_completion=False, rich_markup_mode=None)
    anything = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    stand_in.command(name, help=escape(summary), context_settings=anything, add_help_option=False)(refuse)
    return typer.main.get_command(stand_in)
