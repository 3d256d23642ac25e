"""Which documented features a call used, read off the case that a report keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Uses = Callable[[dict[str, Any]], Any]

_MLA: Final[dict[str, Uses]] = {
    "dense": lambda c: True,
    "causal": lambda c: c.get("causal"),
    "several_queries": lambda c: max(c.get("q_lens") or [c.get("s_q", 1)]) > 1,
    "several_kv_heads": lambda c: c.get("h_kv", 1) > 1,
    "ragged_q": lambda c: c.get("q_lens") is not None,
    "batch_invariant": lambda c: c.get("batch_invariant"),
    "lse_base_2": lambda c: c.get("lse_base") == "2",
}

_EP: Final[dict[str, Uses]] = {
    "ep_expand": lambda c: c.get("expand"),
    "ep_fp8": lambda c: c.get("scales"),
    "ep_drop": lambda c: c.get("overflow") == "drop",
    "ep_grow": lambda c: c.get("overflow") == "grow",
    "ep_cast_fp8": lambda c: c.get("cast") == "fp8",
    "ep_cast_pow2": lambda c: c.get("cast") == "fp8_pow2",
    "ep_cast_ue8m0": lambda c: c.get("cast") == "fp8_ue8m0",
    "ep_nodes": lambda c: c.get("per_node") is not None and c["per_node"] < c["ranks"],
    "ep_pre_reduce": lambda c: c.get("pre_reduce"),
}


def used(case: dict[str, Any] | None) -> set[str]:
    """Names of the requirements (`hal_conformance.requirements`) that the call of a failing case made use of."""
    if not case:
        return set()
    return {name for name, uses in (_EP if "ranks" in case else _MLA).items() if uses(case)}
