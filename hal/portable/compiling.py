"""Compilers: those that are programs are run here, and what any of them refuses is told with the place it names."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hal.portable import cache
from hal.spec.errors import BackendUnavailable, CompileError

_FILE: Final = re.compile(r'^#line \d+ "(.*)"$', re.M)
_ERROR: Final = re.compile(r"\berror\b", re.I)
_LESS: Final = re.compile(r"\b(warning|note|remark)\b", re.I)
_ANSWER: Final = 30.0
_COMPILE: Final = 900.0
"""Seconds: what has not ended then will not."""


def version(program: str, fix: str) -> str:
    """What a compiler says of itself.

    Parameters
    ----------
    program : str
    fix : str
        What decides which compiler is used.

    Raises
    ------
    BackendUnavailable
        It is no program, or does not answer.
    """
    try:
        done = _run([program, "--version"], _ANSWER)
    except OSError as error:
        raise BackendUnavailable(f"{program} does not run ({error.strerror}); {fix}") from error
    except subprocess.TimeoutExpired as error:
        raise BackendUnavailable(f"{program} --version: no answer within {_ANSWER:g} s; {fix}") from error
    if done.returncode:
        raise BackendUnavailable(f"{program} --version: {_end(done.returncode)}; {fix}")
    return done.stdout


def compiled(line: Sequence[str], text: str, suffix: str, message: str, path: str, fix: str) -> bytes:
    """What a compiler makes of a text.

    Parameters
    ----------
    line : sequence of str
        The command; the names of its output and of the text are added.
    text : str
    suffix : str
        What a file of such text ends with.
    message, path, fix : str
        As in `refusal`.

    Raises
    ------
    CompileError
        It finds fault, is killed, does not run, or writes nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        made, written = Path(folder, "kernels.out"), Path(folder, f"kernels{suffix}")
        written.write_text(text)
        return output([*line, "-o", str(made), str(written)], made, text, message, path, fix).read_bytes()


def output(line: Sequence[str], made: Path, text: str, message: str, path: str, fix: str) -> Path:
    """Run a compiler that is to write a file; that file. See `compiled`."""
    try:
        done = _run(line, _COMPILE)
    except OSError as error:
        raise refusal(f"{message}: {line[0]} does not run", str(error), text, path, fix) from error
    except subprocess.TimeoutExpired as error:
        raise refusal(f"{message}: {line[0]} has not ended within {_COMPILE:g} s", "", text, path, fix) from error
    if done.returncode:
        raise refusal(f"{message}: {_end(done.returncode)}", done.stdout + done.stderr, text, path, fix)
    if not made.is_file() or not made.stat().st_size:
        said = done.stdout + done.stderr
        raise refusal(f"{message}: {line[0]} ended without an error and has written nothing", said, text, path, fix)
    return made


def refusal(message: str, log: str, text: str, path: str, fix: str) -> CompileError:
    """What to raise where a compiler did not compile.

    Parameters
    ----------
    message : str
    log : str
        The compiler's own.
    text : str
        What it was given, whose ``#line`` say from which files that is.
    path : str
        The file to name where the log blames none of them.
    fix : str
        What decides which compiler is used.
    """
    blamed, line = _blamed(log, text) or (path, None)
    kept = cache.written(cache.private_folder("refused"), f"{cache.key(text)[:16]}.txt", text)
    shown = f"set {cache.ENV} to a folder of your own to keep what" if kept is None else f"{kept} is what"
    advice = f"{shown} the compiler was given; {fix}; a kernel of hal that does not build is to be reported"
    return CompileError(message, log=log, source_path=blamed, line=line, fix=advice)


def _blamed(log: str, text: str) -> tuple[str, int] | None:
    """File and line of the first error among the files of a text; of the first mention where no error is named."""
    files = "|".join(map(re.escape, sorted(set(_FILE.findall(text)), key=len, reverse=True)))
    if not files:
        return None
    place = re.compile(rf"({files})[:(](\d+)")
    found = [(match, match.string.replace(match[1], "")) for match in map(place.search, log.splitlines()) if match]
    errors = [match for match, words in found if _ERROR.search(words) and not re.search(r"\bwarning:", words)]
    others = [match for match, words in found if not _LESS.search(words)]
    first = next(iter(errors or others), None)
    return None if first is None else (first[1], int(first[2]))


def _run(line: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """In a group of its own: what a script has started would keep the pipes open after its end."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(line, text=True, errors="replace", start_new_session=True, **pipes) as process:
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(line, process.returncode, out, said)


def _end(code: int) -> str:
    if code >= 0:
        return f"it ended with {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it was killed by {name}" + (", as for want of memory" if -code == signal.SIGKILL else "")
