"""The plans of a run by the kind of call they are for, as far as a backend declares it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hal.spec.capability import Capabilities, EpCapabilities, only
from hal_conformance import cover_ep, cover_mla
from hal_conformance.cover import Cover


def at(declared: EpCapabilities, ranks: int) -> EpCapabilities:
    """What is declared for groups of so many ranks; of any size for 0."""
    return dataclasses.replace(declared, ranks=only(ranks)) if ranks and ranks in declared.ranks else declared


def covers(capabilities: Capabilities, ranks: int = 0) -> dict[str, Cover[Any]]:
    """Plans by what they are of."""
    found: dict[str, Cover[Any]] = {}
    dense = cover_mla.plain_dense(capabilities)
    if dense is not None:
        found["decode"] = cover_mla.decode(dense)
    if capabilities.ep is not None:
        declared = at(capabilities.ep, ranks)
        for mode, plan in (("normal", cover_ep.normal), ("low_latency", cover_ep.low_latency)):
            if mode in declared.modes:
                found[f"EP {mode}"] = plan(declared)
                if {mode, "error"} <= set(declared.across_nodes) and cover_ep.ranks_of(declared, nodes=True):
                    found[f"EP {mode} across nodes"] = plan(declared, nodes=True)
    return found
