"""``deep_ep`` on any backend: the published V1 ``Buffer`` and V2 ``ElasticBuffer`` over `hal.EpBuffer`.

Names, argument order, defaults, results and handle tuples are the published ones. Where the published code asserts,
this raises `hal.SpecError` with the caller's argument; what the backend cannot do raises `hal.UnsupportedError`.

What differs, and what it costs:

* A published buffer is bytes; a `hal.EpBuffer` has a geometry. The geometry is known at the first call, so the first
  call of each geometry opens a buffer: a collective of a few milliseconds (agreement over the group and an exchange of
  windows), in which all ranks must take part. Sizes in bytes given to the constructors are checked and not needed.
* Numbers of SMs, queue pairs and chunk sizes are checked and have no effect.
* Results always come in the order of source rank and source position, and sums have one order: ``deterministic`` is
  what every call is.
"""

from __future__ import annotations

import torch

from hal.compat.deep_ep.buffer import Buffer
from hal.compat.deep_ep.config import Config
from hal.compat.deep_ep.domains import get_logical_domain_size, get_physical_domain_size
from hal.compat.deep_ep.elastic import ElasticBuffer
from hal.compat.deep_ep.event import EventHandle, EventOverlap
from hal.compat.deep_ep.handle import EPHandle

topk_idx_t = torch.int64
"""The element type of expert indices."""

__version__ = "2.1.0"
"""The version of the published interface that this one follows."""

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
