"""The list of mutants, and the throw-away distribution that makes them backends like any vendor's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants.sample import Plugin

_MLA = ("l0", "l1", "l2_memory", "l2_numbers", "l2_options", "fatal", "hostile", "sizes", "beyond")
CATALOGUES = (*_MLA, "e1_routes", "e1_sums", "e2", "e3", "e3_masks", "between", "ep_pairs", "ep_beside", "ep_forms")

LEFT = "/dev/shm/hal-mutant-"
"""What mutants that leave files leave begins with this."""

CORRECT = (
    "sample = mutants.sample:plugin",
    "ep-sample = mutants.ep_sample:plugin",
    "ep-modest = mutants.ep_sample:modest",
    "ep-low-latency-only = mutants.ep_sample:low_latency_only",
)
"""Backends without a bug, as entry points."""


@dataclass(frozen=True)
class Mutant:
    """A backend with one bug.

    ``level`` is the one that claims to cover it; ``story`` is the bug as its author would tell it; ``cause`` is a part
    of what the report must name as the likely cause (or several, with |), empty where no hypothesis covers it. ``only``
    is the obligation that covers it in a default run: of what it takes for it to show, a quick run has a part.
    ``tampers`` with its process: the next one there would pass or fail for what this one did.
    """

    name: str
    level: str
    story: str
    entry: str
    cause: str = ""
    only: str = ""
    tampers: bool = False


MUTANTS: dict[str, Mutant] = {}
PLUGINS: dict[str, Any] = {}


def mutant(level: str, story: str, cause: str = "", only: str = "", tampers: bool = False) -> Callable[[type], type]:
    """Register a backend class as a mutant under its own name."""

    def register(cls: type) -> type:
        name = "mutant-" + "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")
        assert name not in MUTANTS, name
        PLUGINS[name] = Plugin(cls)
        attribute = name.replace("-", "_")
        MUTANTS[name] = Mutant(name, level, story, f"mutants.entry:{attribute}", cause, only, tampers)
        return cls

    return register


def engine(level: str, story: str, cause: str = "", only: str = "") -> Callable[[type], type]:
    """Register an expert-parallel engine as a mutant: a backend that opens it."""
    from mutants.ep_sample import EpSample

    def register(cls: type) -> type:
        mutant(level, story, cause, only)(type(cls.__name__, (EpSample,), {"engine": cls}))
        return cls

    return register


def load() -> dict[str, Mutant]:
    """Every mutant of every catalogue."""
    for catalogue in CATALOGUES:
        importlib.import_module(f"mutants.{catalogue}")
    return MUTANTS


def install(folder: Path) -> None:
    """Write the metadata of a distribution that registers the samples and all mutants as backends."""
    info = folder / "hal_mutants-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hal-mutants\nVersion: 1.0\n")
    lines = ["[hal.backends]", *CORRECT]
    lines += [f"{m.name} = {m.entry}" for m in load().values()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
