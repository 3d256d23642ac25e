"""Where the entry points of the mutants point: one attribute each."""

from __future__ import annotations

from typing import Any

from mutants.registry import PLUGINS, load


def __getattr__(name: str) -> Any:
    load()
    plugin = PLUGINS.get(name.replace("_", "-"))
    if plugin is None:
        raise AttributeError(name)
    return plugin
