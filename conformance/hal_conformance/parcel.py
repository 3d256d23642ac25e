"""Plain data and tensors of every dtype as bytes, between this process and its ranks."""

from __future__ import annotations

import io
import pickle
from typing import Any, Final

import torch
from torch import Tensor


class _Packer(pickle.Pickler):
    """Takes tensors by value: torch's own reduction knows no FP8, or shares memory that outlives nobody."""

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is taken apart."""
        if not isinstance(value, Tensor):
            return NotImplemented
        # A copy: of one element any stride counts as contiguous, and is kept.
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
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


_PLAIN: Final = {
    "hal_conformance.parcel": ("_tensor",),
    "hal_conformance.ep": ("Done",),
    "hal_conformance.ranks": ("RankResult", "GroupResult"),
    "torch": ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "uint8", "bool", "int16", "int32", "int64"),
}
"""All that data of other processes may be made of, beside plain data."""


class _Plain(pickle.Unpickler):
    """Refuses everything that is not plain data: a process that packed it may want more than to be read."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what is listed."""
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        return super().find_class(module, name)


def unpack_plain(data: bytes) -> Any:
    """The inverse of `pack` for data of a process that is not trusted."""
    return _Plain(io.BytesIO(data)).load()


def unpack(data: bytes) -> Any:
    """The inverse; only for what `pack` made in a process of this run."""
    return pickle.loads(data)
