"""The command ``hal`` itself: its commands, and what every one of them does with an error.

A `HalError` that reaches `main` becomes one paragraph on stderr and exit code 2; ``HAL_DEBUG=1`` adds the traceback.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import Annotated

import typer

import hal
from hal.cli import backends, bench, demo, doctor, ep, new_backend, shims
from hal.cli.extensions import Commands
from hal.cli.text import paragraph

app = typer.Typer(
    name="hal",
    cls=Commands,
    help="One kernel interface, every accelerator: see which backends there are and whether they work.",
    epilog="HAL_BACKEND=name chooses the backend. Exit codes: 0 done, 1 the answer is no, 2 the request is wrong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("backends", help=backends.HELP)(backends.backends)
app.command("doctor", help=doctor.HELP)(doctor.doctor)
app.command("demo", help=demo.HELP)(demo.demo)
app.command("install-shims", help=shims.HELP)(shims.install_shims)
app.command("new-backend", help=new_backend.HELP)(new_backend.new_backend)
app.add_typer(bench.app, name="bench")
app.add_typer(ep.app, name="ep")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hal {hal.__version__}, specification {hal.SPEC_VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Take the options that stand before the command."""


def _open_closed_streams() -> None:
    """Give a standard stream that the caller closed the null device: the exit code is still an answer."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It takes the number that is free, which the next file opened would take otherwise.
            null = open(os.devnull, mode)  # noqa: SIM115 - lives as long as the process
            os.set_inheritable(null.fileno(), True)
            setattr(sys, name, null)


def _write_in_any_encoding() -> None:
    """What a stream's encoding lacks, such as the bullet of the backend in force in ASCII, becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _give_up_stdout() -> None:
    """Whatever is left to write goes nowhere: the interpreter would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line and exit with its code."""
    _open_closed_streams()
    _write_in_any_encoding()
    try:
        try:
            app(prog_name="hal")
        except hal.HalError as error:
            if os.environ.get("HAL_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            print(paragraph(error), file=sys.stderr)
            raise SystemExit(2) from None
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        # The command line's own handling ends where the command does; what comes just after is the same interrupt.
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has gone: nothing is left to say.
        _give_up_stdout()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _give_up_stdout()
        print(f"hal: {error.strerror}: the answer is not whole", file=sys.stderr)
        raise SystemExit(1) from None
