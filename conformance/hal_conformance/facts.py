"""What is known of a backend and of this machine before anything is tested: versions, devices, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import hal
from hal import plugins
from hal_conformance import SUITE_VERSION

_SUITE = "hal-conformance"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_AT_START = ("sitecustomize", "usercustomize")
_JUDGES = ("hal", "hal_conformance", "torch", "numpy", "pytest", "_pytest", "hypothesis", "pluggy", "jsonschema")
"""Packages a verdict rests on."""


def facts(backend: str) -> dict[str, Any]:
    """Capabilities, probe, distribution and environment; every value ready for JSON."""
    status = plugins.registry().status(backend)
    probe = status.probe
    return {
        "state": status.state,
        "reason": status.reason,
        "capabilities": _declared(status),
        "evidence": probe.evidence if probe is not None else None,
        "details": dict(probe.details) if probe is not None else {},
        "distribution": distribution(backend),
        "environment": environment(),
    }


def _declared(status: plugins.Status) -> dict[str, Any] | None:
    """The capabilities as data, or None where the backend's answer is not even that."""
    try:
        assert status.capabilities is not None
        declared: dict[str, Any] = json.loads(status.capabilities.to_json())
        type(status.capabilities).from_dict(declared)
    except Exception:
        return None
    return declared


def environment() -> dict[str, str]:
    """Where this runs. No host name, no user, no path."""
    return {
        "hal": hal.__version__,
        "specification": hal.SPEC_VERSION,
        "suite": SUITE_VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def distribution(backend: str) -> dict[str, Any]:
    """Which installed distribution registers a backend, and a hash over its files.

    ``hash`` is over the contents of every file the distribution installed (bytecode and the installer's own records
    aside); ``editable`` says that it has no fixed files to hash: then the hash is over the package as it is now.
    ``requires`` has the same of every distribution it depends on, for kernels may lie in one.
    """
    entries = list(entry_points(group=plugins.GROUP, name=backend))
    if len(entries) != 1 or entries[0].dist is None:
        return {"name": None, "version": None, "editable": False, "hash": None, "requires": [], "reaches": []}
    entry, dist = entries[0], entries[0].dist
    editable = _editable(dist)
    files = _package_files(entry) if editable else _installed_files(dist)
    needed = [] if editable else dependencies(dist)
    return {
        "name": dist.name,
        "version": dist.version,
        "editable": editable,
        "hash": _hash(files),
        "requires": [_dependency(name) for name in needed],
        "reaches": [] if editable else reaches(dist) + unlisted(entry, dist) + of_dependencies(needed),
    }


def dependencies(dist: Distribution) -> list[str]:
    """What a distribution requires, by name; what the suite requires too is its own."""
    return sorted(required(dist.name) - required(_SUITE) - {_canonical(dist.name)})


def _dependency(name: str) -> dict[str, Any]:
    dist = metadata.distribution(name)
    # Of an editable install there are no fixed files.
    return {"name": name, "version": dist.version, "hash": None if _editable(dist) else _hash(_installed_files(dist))}


def of_dependencies(names: Iterable[str]) -> list[str]:
    """Where what a distribution requires reaches beyond its own packages."""
    found = []
    for name in names:
        # Plugins of pytest are not among it: runs by pytest certify nothing.
        found += [f"its dependency {name}: {text}" for text in reaches(metadata.distribution(name), plugins=False)]
    return found


def required(name: str) -> set[str]:
    """The installed distributions that one requires, and those that they require; itself too, if it is installed."""
    found: set[str] = set()
    wanted = [name]
    while wanted:
        one = _canonical(wanted.pop())
        try:
            requirements = metadata.distribution(one).requires or []
        except metadata.PackageNotFoundError:
            continue
        if one not in found:
            found.add(one)
            # What is for an extra may be there as well: whoever installs more than is needed has more examined.
            wanted += [match[0] for match in map(_NAME.match, requirements) if match]
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def reaches(dist: Distribution, *, plugins: bool = True) -> list[str]:
    """Where a distribution reaches beyond its own package, into processes or packages that judge it."""
    found = [f"it is loaded by pytest: {e.value}" for e in dist.entry_points if plugins and e.group == "pytest11"]
    for name in sorted(f.as_posix() for f in dist.files or []):
        top, _, rest = name.partition("/")
        package = top if rest else top.removesuffix(".py")
        if top.endswith(".pth") or package in _AT_START:
            found.append(f"{name} is executed wherever Python starts")
        elif package in _JUDGES:
            found.append(f"{name} lies in the package {package}")
    return found


def unlisted(entry: EntryPoint, dist: Distribution) -> list[str]:
    """Files of the backend's package that its distribution does not list, so that no hash is over them."""
    listed = {path.resolve() for _, path in _installed_files(dist)}
    return [
        f"{name} is not among its listed files" for name, path in _package_files(entry) if path.resolve() not in listed
    ]


def _editable(dist: Distribution) -> bool:
    text = dist.read_text("direct_url.json")
    return bool(text and json.loads(text).get("dir_info", {}).get("editable"))


def _installed_files(dist: Distribution) -> list[tuple[str, Path]]:
    skipped = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
    listed = [f for f in dist.files or [] if f.name not in skipped and f.suffix != ".pyc"]
    return [(str(f), Path(str(f.locate()))) for f in listed]


def _package_files(entry: EntryPoint) -> list[tuple[str, Path]]:
    spec = find_spec(entry.module.partition(".")[0])
    found: list[tuple[str, Path]] = []
    if spec is not None and spec.origin and not spec.submodule_search_locations:
        found.append((Path(spec.origin).name, Path(spec.origin)))
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        found += [(str(p.relative_to(root)), p) for p in sorted(Path(root).rglob("*")) if p.is_file()]
    return [(name, path) for name, path in found if path.suffix != ".pyc"]


def _hash(files: list[tuple[str, Path]]) -> str | None:
    digest = hashlib.sha256()
    present = [(name, path) for name, path in sorted(files) if path.is_file()]
    for name, path in present:
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if present else None


def suite_hash() -> str:
    """A hash over this suite and all of the HAL: what it judges by, and what a backend may be made of."""
    homes = {"hal_conformance": Path(__file__).parent, "hal": Path(hal.__file__).parent}
    files = [
        (f"{name}/{p.relative_to(home)}", p)
        for name, home in homes.items()
        for p in home.rglob("*")
        if "__pycache__" not in p.parts
    ]
    digest = _hash(files)
    assert digest is not None
    return digest
