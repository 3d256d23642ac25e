"""Plain data and tensors of every dtype as bytes, between this process and its ranks."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    """Takes tensors by value: torch's own reduction knows no FP8, or shares memory that outlives nobody."""

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is taken apart."""
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1)
        return _tensor, (flat.view(torch.uint8).numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def pack(value: Any) -> bytes:
    """As bytes."""
    buffer = io.BytesIO()
    _Packer(buffer).dump(value)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """The inverse; only for what `pack` made in a process of this run."""
    return pickle.loads(data)
