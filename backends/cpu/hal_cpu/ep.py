"""Expert parallelism of the CPU backend: what it declares, and how an engine is opened."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Final

from hal.ep.engine import (
    EpEngine,
)
from hal.ep.nodes import NodesEngine
from hal.spec.ep import EpBufferArgs, whole_ep
from hal_cpu.ep_normal import NormalCalls
from hal_cpu.ep_packed import PackedCalls
from hal_cpu.ep_parts import (
    launches,
)

CAPABILITIES: Final = whole_ep("shm", "torch.distributed")


class CpuEpEngine(NormalCalls, PackedCalls):
    """The engine of one node: peer windows in shared memory, moved and summed by compiled code."""


def missing() -> str | None:
    """Why there is no compiled engine, or None if there is one."""
    if importlib.util.find_spec("hal_cpu._ep") is None:
        return "hal-cpu was installed without compiled kernels: no C++17 compiler, or the build failed"
    try:
        import hal_cpu._ep  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        return f"the compiled engine does not load here ({error})"
    return None


def open_engine(args: EpBufferArgs) -> EpEngine:
    """The engine of a group: of its one node, or of all its nodes."""
    if args.num_nodes == 1:
        return CpuEpEngine(args)
    # A rank that waits for one of another node is not to be taken for lost by those of its own.
    patient = replace(args, timeout=2 * args.timeout) if args.mask_ranks else args
    return NodesEngine(args, CpuEpEngine(patient))


__all__ = ["CAPABILITIES", "CpuEpEngine", "launches", "missing", "open_engine"]
