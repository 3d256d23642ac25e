"""Throw-away distributions: real wheels, really installed by pip into a folder, and interpreters that see only them.

`fake_backend` is the source of a module with a correct backend that computes with torch; tests break it on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hal

BACKENDS = "hal.backends"
COMMANDS = "hal.commands"

_BACKEND_SOURCE = '''
import torch
from hal.backend import Backend, Probe
from hal.plugins import hookimpl
from hal.spec.capability import Capabilities, Ints, MlaCapabilities, only


def attend(args, b):
    """One sequence: gather its rows, then softmax(q k) v in float32, KV head by KV head."""
    length = int(args.cache_seqlens[b])
    positions = torch.arange(length)
    pages = args.block_table[b][positions // args.page_size].long()
    rows = args.kv_cache[pages, positions % args.page_size].float()
    group = args.h_q // args.h_kv
    for h in range(args.h_kv):
        heads, keys = slice(h * group, (h + 1) * group), rows[:, h]
        scores = (args.q[b, :, heads].float() @ keys.T) * args.softmax_scale
        if args.causal:
            last = length - args.s_q + torch.arange(args.s_q)
            scores = scores.masked_fill(positions > last[:, None, None], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        nothing = lse == -torch.inf
        weights = torch.exp(scores - lse.masked_fill(nothing, 0)[..., None])
        args.out[b, :, heads] = (weights @ keys[:, : args.head_dim_v]).to(args.out.dtype)
        args.lse[b, heads] = lse.masked_fill(nothing, torch.inf).T


class Fake(Backend):
    spec_version = {spec_version!r}
    priority = {priority}
    calls = 0

    def probe(self):
        return Probe(True, {reason!r}, details={{"driver": "fakedrv 7.1", "library": "libfake.so.2"}})

    def capabilities(self):
        dense = MlaCapabilities(
            dtypes=("bfloat16", "float16", "float32"), kv_formats=("plain",), head_dim=Ints(1, 576),
            head_dim_v=Ints(1, 576), h_q=Ints(1), h_kv=Ints(1), s_q=Ints(1), page_size=Ints(1, 256), causal=True,
            ragged_q=False, batch_invariant=False, lse_bases=("e",), attn_sink=False, extra_kv_cache=False, topk=None,
        )
        return Capabilities(device_types=("cpu",), mla_dense=dense, mla_sparse=None, ep=None)

    def mla_plan(self, args):
        return None

    def mla_decode(self, args):
        Fake.calls += 1
        for b in range(args.batch):
            attend(args, b)

    def ep_buffer(self, args):
        raise NotImplementedError

    def launches(self):
        return {{"torch:attend@cpu": Fake.calls}}


@hookimpl
def hal_backend():
    return Fake()
'''


def fake_backend(*, priority: int = 10, spec_version: str = hal.SPEC_VERSION, reason: str = "a fake chip") -> str:
    """Source of a module with a backend that works; ``str.replace`` makes it one that does not."""
    return _BACKEND_SOURCE.format(priority=priority, spec_version=spec_version, reason=reason)


@dataclass(frozen=True)
class Distribution:
    """One distribution with one module and its entry points.

    ``entry_points`` maps a group to names and values; the default registers the module as a backend called ``backend``.
    """

    name: str
    source: str
    backend: str = ""
    version: str = "1.0"
    entry_points: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    def wheel(self, folder: Path) -> Path:
        """Write the wheel."""
        groups = self.entry_points or {BACKENDS: {self.backend: self.module}}
        lines = []
        for group, entries in groups.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        info = f"{self.module}-{self.version}.dist-info"
        files = {
            f"{self.module}.py": textwrap.dedent(self.source),
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": "\n".join(lines) + "\n",
        }
        record = [f"{path},{_digest(text)},{len(text.encode())}" for path, text in files.items()]
        files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
        path = folder / f"{self.module}-{self.version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"


def install(folder: Path, *distributions: Distribution) -> Path:
    """Install them with pip and return the folder they are in."""
    wheels, target = folder / "wheels", folder / "installed"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--isolated", "--no-deps", "--no-index", "--no-compile"]
    paths = [str(d.wheel(wheels)) for d in distributions]
    subprocess.run([*pip, "--target", str(target), *paths], check=True, timeout=120)
    return target


def bare_site(folder: Path) -> Path:
    """Everything this interpreter has installed except distributions that extend the HAL; with the HAL under test."""
    folder.mkdir(parents=True)
    (folder / "hal").symlink_to(Path(hal.__file__).parent)
    for site in dict.fromkeys(str(d.locate_file("")) for d in importlib.metadata.distributions()):
        for item in Path(site).iterdir():
            extends = item.suffix == ".dist-info" and "[hal." in _read(item / "entry_points.txt")
            if not extends and item.suffix != ".pth" and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


def suite_site(bare: Interpreter, folder: Path) -> Path:
    """The conformance suite as a distribution that is installed there, beside what this interpreter sees."""
    import hal_conformance
    from hal_conformance.waivers import tomllib

    package, root = Path(hal_conformance.__file__).parent, Path(__file__).resolve().parent.parent
    info = folder / "hal_conformance-0.1.0.dist-info"
    info.mkdir(parents=True)
    if not (bare.folders[-1] / "hal_conformance").exists():
        (folder / "hal_conformance").symlink_to(package)
    project = tomllib.loads((root / "conformance" / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hal-conformance\nVersion: 0.1.0\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


_EACH = """
import contextlib, io, json, os, sys
from hal.cli.app import main
answers = []
for arguments, variables in json.loads(sys.argv[1]):
    out, errors, sys.argv = io.StringIO(), io.StringIO(), ["hal", *arguments]
    os.environ.update(variables)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            answers.append([end.code, out.getvalue(), errors.getvalue()])
    for name in variables:
        del os.environ[name]
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Interpreter:
    """Runs Python in a process where only the distributions of ``folders`` extend the HAL."""

    folders: tuple[Path, ...]

    def seeing(self, *folders: Path) -> Interpreter:
        """One that also sees what is installed in these folders."""
        return Interpreter((*folders, *self.folders))

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HAL_", "PYTHON", "COV_")) and k != "COLUMNS"}
        path = os.pathsep.join(map(str, self.folders))
        return kept | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | variables

    def command(self, *arguments: str) -> list[str]:
        # -S leaves out this interpreter's own site-packages, so that only PYTHONPATH counts.
        return [sys.executable, "-S", *arguments]

    def run(self, *arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def hal(self, *arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command ``hal``."""
        return self.run("-m", "hal", *arguments, timeout=timeout, **variables)

    def hal_each(self, *runs: tuple[str, dict[str, str]]) -> list[tuple[int, str, str]]:
        """Run the command ``hal`` once for each command line and environment, all in one process, which is faster.

        Gives exit code, stdout and stderr of each.
        """
        lines = json.dumps([(line.split(), variables) for line, variables in runs])
        done = self.run("-c", _EACH, lines)
        assert done.returncode == 0, done.stdout + done.stderr
        return [tuple(answer) for answer in json.loads(done.stdout)]

    def script(self, source: str, **variables: str) -> str:
        """Run a script that must succeed; its output."""
        done = self.run("-c", textwrap.dedent(source), **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
