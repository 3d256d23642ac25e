"""The host side of expert parallelism: an engine over any driver of `hal.portable.runtime`, and what it can declare.

A node's ranks are processes of one machine, whose windows their device shares; between nodes torch.distributed serves,
by `hal.ep.nodes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from hal.ep.engine import EpEngine
from hal.ep.nodes import NodesEngine
from hal.portable.direct import MOST_BINS, MOST_CHOICES, DirectEpEngine
from hal.portable.ep_packed import PackedCalls
from hal.portable.runtime import MeetingDevice, SharingDevice
from hal.spec.capability import EpCapabilities
from hal.spec.ep import EpBufferArgs, whole_ep
from hal.spec.errors import UnsupportedError


class PortableEpEngine(PackedCalls):
    """The engine of a node whose ranks meet over sockets: of several nodes, or of devices without `MeetingDevice`."""


def capabilities(transport: str) -> EpCapabilities:
    """What may be declared of a device whose windows are shared so."""
    whole = whole_ep(transport, "torch.distributed")
    across = tuple(one for one in whole.across_nodes if one != "mask_ranks")
    return replace(whole, mask_ranks=False, across_nodes=across)


def open_engine(args: EpBufferArgs, device: SharingDevice, backend: str) -> EpEngine:
    """The engine of a group.

    Raises
    ------
    UnsupportedError
        Faults are to be injected, which is not written.
    """
    if args.faults is not None:
        raise UnsupportedError(backend, "faults", "faults to inject", "None")
    if args.num_nodes > 1:
        return NodesEngine(args, PortableEpEngine(args, device))
    bins = args.num_ranks * args.local_experts
    if hasattr(device, "mailbox") and bins <= MOST_BINS and args.topk <= MOST_CHOICES:
        return DirectEpEngine(args, cast(MeetingDevice, device))
    return PortableEpEngine(args, device)
