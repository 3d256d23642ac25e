"""The shell lines that make a run, or just one case of it, again."""

from __future__ import annotations

from collections.abc import Iterable

from hal_conformance.context import Settings


def of_run(settings: Settings, only: Iterable[str] = (), case: int | None = None) -> str:
    """Everything that ran; of ``case`` the one obligation in ``only``."""
    chosen = sorted(only)
    if case is not None:
        return of_case(settings, chosen[0], case)
    words = [f"hal conform --backend {settings.backend} --seed {settings.seed}"]
    words += [f"--only {name}" for name in chosen]
    return " ".join([*words, *_options(settings)])


def of_case(settings: Settings, obligation: str, index: int) -> str:
    """Just this case."""
    line = f"hal conform --backend {settings.backend} --case {obligation}@{settings.seed}.{index}"
    return " ".join([line, *_options(settings)])


def _options(settings: Settings) -> list[str]:
    s = settings
    options = [f"--{s.mode}"] if s.mode != "default" else []
    options += [f"--tighten {s.tighten:g}"] if s.tighten != 1 else []
    options += [f"--patience {s.patience:g}"] if s.patience != 1 else []
    options += [f"--ranks {s.ranks}"] if s.ranks else []
    return options + ([f"--device {s.device}"] if s.device else [])
