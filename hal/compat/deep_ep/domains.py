"""How the ranks of a group lie on nodes, as V2 of the published interface tells it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hal.compat.flags import zero_or_one
from hal.ep.launch import launched_ranks_per_node
from hal.spec.errors import SpecError
from hal.spec.tensors import require_bool


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """Nodes, and ranks of a node.

    Parameters
    ----------
    group : ProcessGroup
    """
    size = _size(group)
    per_node = launched_ranks_per_node(size) or size
    return -(-size // per_node), min(per_node, size)


@zero_or_one
def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """One domain of all ranks: crossing nodes is the buffer's own business.

    Parameters
    ----------
    group : ProcessGroup
    allow_hybrid_mode : bool
        Checked; without effect.
    """
    require_bool("allow_hybrid_mode", allow_hybrid_mode)
    return 1, _size(group)


def _size(group: Any) -> int:
    if not isinstance(group, dist.ProcessGroup):
        raise SpecError("group", type(group).__name__, "a torch.distributed.ProcessGroup this process belongs to")
    return group.size()
