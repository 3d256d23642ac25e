"""Expert parallelism of the CPU backend: what it declares, and how an engine is opened."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Final

from hal.ep.engine import (
    EpEngine,
)
from hal.ep.nodes import NodesEngine
from hal.spec.capability import EpCapabilities, Ints
from hal.spec.ep import (
    CASTS,
    OVERFLOW,
    EpBufferArgs,
)
from hal_cpu.ep_normal import NormalCalls
from hal_cpu.ep_packed import PackedCalls
from hal_cpu.ep_parts import (
    launches,
)

CAPABILITIES: Final = EpCapabilities(
    modes=("normal", "low_latency"),
    layouts=("rank", "expand"),
    dtypes=("bfloat16", "float16", "float32", "float8_e4m3fn"),
    casts=CASTS,
    transports=("shm", "torch.distributed"),
    overflow=OVERFLOW,
    ranks=Ints(1, 512),
    nodes=Ints(1, 64),
    topk=Ints(1),
    num_experts=Ints(1),
    row_bytes=Ints(16, multiple_of=16),
    recv_hook=True,
    async_finish=True,
    cached_handle=True,
    mask_ranks=True,
    zero_copy_combine=True,
    pre_reduce=True,
    across_nodes=("normal", "low_latency", "error", "drop", "grow", "mask_ranks"),
)


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
