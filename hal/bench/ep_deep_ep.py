"""DeepEP itself beside the HAL's calls, where it is installed: V1's ``Buffer``, called as its own tests call it.

As with the HAL a dispatch begins with the routes: the layout is part of the call.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor

from hal.bench.ep_cases import Shape
from hal.bench.ep_site import Call
from hal.spec.errors import first_line

_COMPILED: Final = "deep_ep_cpp"
"""What only DeepEP's own distribution brings: the HAL's drop-in has the other name too."""

_WINDOW: Final = 2 << 30


def missing() -> str:
    """Why it cannot be asked; empty if it can."""
    if importlib.util.find_spec(_COMPILED) is None:
        return f"DeepEP is not installed: there is no {_COMPILED}"
    try:
        importlib.import_module("deep_ep")
    except ImportError as error:
        return f"deep_ep does not import: {first_line(error)}"
    return ""


class DeepEp:
    """Its buffer for one case, over the default group.

    Parameters
    ----------
    shape : Shape
    ranks : int
    """

    def __init__(self, shape: Shape, ranks: int) -> None:
        made = importlib.import_module("deep_ep").Buffer
        self._shape = shape
        if shape.low_latency:
            size = made.get_low_latency_rdma_size_hint(shape.tokens, shape.hidden, ranks, shape.experts)
            queues = max(1, shape.experts // ranks)
            options: dict[str, Any] = {"low_latency_mode": True, "num_qps_per_rank": queues}
            self._buffer = made(dist.group.WORLD, 0, size, explicitly_destroy=True, **options)
        else:
            self._buffer = made(dist.group.WORLD, _WINDOW, 0, explicitly_destroy=True)

    def close(self) -> None:
        """Give its memory back."""
        self._buffer.destroy()

    def dispatch(self, x: Any, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Any, ...]:
        """Rows, local experts, weights, scales (or None) and the handle."""
        per_rank, _, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(topk_idx, self._shape.experts)
        rows, idx, weights, _, handle, _ = self._buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        values, scales = rows if isinstance(rows, tuple) else (rows, None)
        return values, idx, weights, scales, handle

    def combine(self, outputs: Tensor, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Call:
        """The call that brings outputs back, of a dispatch made now."""
        return partial(self._buffer.combine, outputs, self.dispatch(x, topk_idx, topk_weights)[-1])

    def low_latency_dispatch(self, x: Tensor, topk_idx: Tensor, fp8: bool | None = None) -> Any:
        """What it gives."""
        shape = self._shape
        fp8 = shape.fp8 if fp8 is None else fp8
        return self._buffer.low_latency_dispatch(x, topk_idx, shape.tokens, shape.experts, use_fp8=fp8)

    def low_latency_combine(self, packed: Tensor, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Call:
        """The call that brings packed rows back, of a dispatch made now."""
        handle = self.low_latency_dispatch(x, topk_idx, False)[2]
        return partial(self._buffer.low_latency_combine, packed, topk_idx, topk_weights, handle)
