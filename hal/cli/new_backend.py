"""``hal new-backend``: an installable distribution with a backend that is listed, probed and tested from the first day.

Templates are files below ``templates/backend``, of a backend called acme. A runtime is a folder there with a
``runtime.json``, which says what other folders it takes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Final

import typer

from hal import plugins
from hal.spec import SPEC_VERSION
from hal.spec.errors import SpecError

_TEMPLATES: Final = Path(__file__).parent / "templates" / "backend"
_SUFFIX: Final = ".in"
_NAME: Final = re.compile(r"[a-z][a-z0-9]{1,19}")
_DEFAULT: Final = "host"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a generated driver stands on.

    Attributes
    ----------
    name, about : str
    folders : list of str
        Of templates, beside its own.
    priority : int
        Of the backend: what plays on the host is never chosen by itself.
    dependencies, development : list of str
        Requirements of the distribution, and of its tests.
    environment : dict of str to str
        What its tests set where there is no device.
    """

    name: str
    about: str
    folders: list[str]
    priority: int
    dependencies: list[str]
    development: list[str]
    environment: dict[str, str]

    def section(self, number: int) -> str:
        """Of ``about.md``: the rows of its files, or the steps."""
        return (_TEMPLATES / self.name / "about.md").read_text().split("---\n")[number].rstrip("\n")


def runtimes() -> dict[str, Runtime]:
    """Every runtime there are templates for, by name."""
    found = sorted(_TEMPLATES.glob("*/runtime.json"))
    return {path.parent.name: Runtime(path.parent.name, **json.loads(path.read_text())) for path in found}


HELP: Final = (
    "Make an installable distribution hal-NAME: entry point, probe, driver, tuning table, tests, CI file, README.\n\n"
    "It is in 'hal backends' as soon as it is installed, and 'hal conform' says what is next, and in which file."
)
_RUNTIME_HELP: Final = f"What its driver stands on: {'; '.join(f'{r.name}, {r.about}' for r in runtimes().values())}."


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the backend: what HAL_BACKEND will say.")],
    runtime: Annotated[str, typer.Option("--runtime", help=_RUNTIME_HELP)] = _DEFAULT,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to make; default hal-NAME, here.")] = None,
) -> None:
    """Make the distribution and say what to type next."""
    folder = Path(f"hal-{name}") if out is None else out
    files = generate(name, runtime, folder)
    typer.echo(f"{folder}: {len(files)} files")
    typer.echo("\nnext:")
    for line in (
        f"pip install -e {shlex.quote(str(folder))}",
        "hal backends",
        f"hal conform --backend {name} --quick    # says what to write, and where",
    ):
        typer.echo(f"  {line}")


def generate(name: str, runtime: str, folder: Path) -> list[Path]:
    """Write the files of a new backend.

    Parameters
    ----------
    name : str
    runtime : str
        One of `runtimes`.
    folder : Path
        Must not exist, or be empty.

    Returns
    -------
    list of Path
        What was written, below the folder.

    Raises
    ------
    SpecError
        The name cannot be used or is taken, the runtime is not known, or the folder holds something.
    """
    known = runtimes()
    _check_name(name)
    if runtime not in known:
        raise SpecError("--runtime", repr(runtime), " or ".join(known))
    _check_folder(folder)
    texts = _texts(known[runtime])
    written = []
    try:
        for path, text in texts.items():
            target = folder / _renamed(str(path), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_renamed(text, name))
            written.append(target)
    except OSError as error:
        raise SpecError("--out", str(folder), f"a folder that can be written to: {error.strerror}") from error
    return written


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SpecError("NAME", repr(name), "2 to 20 lowercase letters and digits, a letter first")
    if name in plugins.registry().names():
        raise SpecError("NAME", repr(name), "a name that no installed backend has: two of one name are both refused")
    try:
        taken = distribution(f"hal-{name}").name
    except PackageNotFoundError:
        taken = f"hal_{name}" if importlib.util.find_spec(f"hal_{name}") is not None else ""
    if taken:
        raise SpecError("NAME", repr(name), f"a name that is not taken: {taken} is installed")


def _check_folder(folder: Path) -> None:
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError("--out", str(folder), f"a folder that can be made: {error.strerror}") from error
    if not free:
        raise SpecError("--out", str(folder), "a folder that is new or empty: nothing is written over")


def _texts(runtime: Runtime) -> dict[Path, str]:
    """Every template of a runtime, by the path it is written to, with what differs between runtimes filled in."""
    variables = "".join(f'      {key}: "{value}"\n' for key, value in runtime.environment.items())
    blanks = {
        "@SPEC@": SPEC_VERSION,
        "@PRIORITY@": str(runtime.priority),
        "@RUNTIME@": runtime.name,
        "@FILES@": runtime.section(0),
        "@STEPS@": runtime.section(1),
        "@DEPENDENCIES@": ", ".join(f'"{one}"' for one in runtime.dependencies),
        "@DEVELOPMENT@": "".join(f', "{one}"' for one in runtime.development),
        "@ENVIRONMENT@": f"    env:\n{variables}" if variables else "",
    }
    texts = {}
    for folder in (*runtime.folders, runtime.name):
        root = _TEMPLATES / folder
        for path in sorted(root.rglob(f"*{_SUFFIX}")):
            text = path.read_text()
            for blank, filling in blanks.items():
                text = text.replace(blank, filling)
            texts[path.relative_to(root).with_suffix("")] = text
    return texts


def _renamed(text: str, name: str) -> str:
    """The backend acme under its own name."""
    return text.replace("acme", name).replace("Acme", name.capitalize()).replace("ACME", name.upper())
