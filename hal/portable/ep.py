"""The host side of expert parallelism: an engine over any driver of `hal.portable.runtime`, and what it can declare.

A node's ranks are processes of one machine, whose windows their device shares; between nodes torch.distributed serves,
by `hal.ep.nodes`.
"""

from __future__ import annotations

from hal.ep.engine import EpEngine
from hal.ep.nodes import NodesEngine
from hal.portable.ep_packed import PackedCalls
from hal.portable.runtime import SharingDevice
from hal.spec.capability import EpCapabilities, Ints
from hal.spec.ep import CASTS, OVERFLOW, EpBufferArgs
from hal.spec.errors import UnsupportedError


class PortableEpEngine(PackedCalls):
    """The engine of one node."""


def capabilities(transport: str) -> EpCapabilities:
    """What may be declared of a device whose windows are shared so."""
    return EpCapabilities(
        modes=("normal", "low_latency"),
        layouts=("rank", "expand"),
        dtypes=("bfloat16", "float16", "float32", "float8_e4m3fn"),
        casts=CASTS,
        transports=(transport, "torch.distributed"),
        overflow=OVERFLOW,
        ranks=Ints(1, 512),
        nodes=Ints(1, 64),
        topk=Ints(1),
        num_experts=Ints(1),
        row_bytes=Ints(16, multiple_of=16),
        recv_hook=True,
        async_finish=True,
        cached_handle=True,
        mask_ranks=False,
        zero_copy_combine=True,
        pre_reduce=True,
        across_nodes=("normal", "low_latency", *OVERFLOW),
    )


def open_engine(args: EpBufferArgs, device: SharingDevice, backend: str) -> EpEngine:
    """The engine of a group.

    Raises
    ------
    UnsupportedError
        Faults are to be injected, which is not written.
    """
    if args.faults is not None:
        raise UnsupportedError(backend, "faults", "faults to inject", "None")
    node = PortableEpEngine(args, device)
    return node if args.num_nodes == 1 else NodesEngine(args, node)
