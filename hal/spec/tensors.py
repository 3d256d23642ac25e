"""Checks of single tensors, shared by every argument model. Each names the argument, what it got and what is legal."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.errors import SpecError, shown


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def require_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], ndim: int, layout: str) -> None:
    """A strided tensor of one of these dtypes and this rank, contiguous in its last dimension.

    ``layout`` describes the legal shape in words of the specification, for the error.
    """
    if not isinstance(value, Tensor):
        raise SpecError(name, type(value).__name__, f"a torch.Tensor {layout}")
    if value.layout is not torch.strided or value.is_nested or value.is_neg():
        kind = "nested" if value.is_nested else "lazily negated" if value.is_neg() else str(value.layout)
        raise SpecError(name, f"a {kind} tensor", f"a plain strided tensor {layout}")
    try:
        absent = value.data_ptr() == 0 and value.numel() > 0
    except RuntimeError:
        absent = True
    if absent:
        # Freed storage, meta tensors, and wrappers whose elements live elsewhere or nowhere, such as torch.func's.
        raise SpecError(name, "a tensor without memory", f"a tensor with memory of its own {layout}")
    if value.dtype not in dtypes:
        legal = " or ".join(map(dtype_name, dtypes))
        raise SpecError(name, f"dtype {dtype_name(value.dtype)}", f"dtype {legal}")
    if value.dim() != ndim:
        raise SpecError(name, f"shape {list(value.shape)}", layout)
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise SpecError(name, f"strides {list(value.stride())}", "a last dimension of stride 1 (call .contiguous())")
    spanned = value.numel() if value.is_contiguous() else _spanned(value)
    has, needs = value.untyped_storage().nbytes(), (value.storage_offset() + spanned) * value.itemsize
    if has < needs and spanned:
        # Resized under the tensor.
        raise SpecError(name, f"a storage of {has} bytes", f"a storage of the {needs} bytes that its elements span")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """Exactly this shape."""
    if value.shape != shape:
        raise SpecError(name, f"shape {list(value.shape)}", f"{layout} = {list(shape)}")


def require_device(name: str, value: Tensor, device: torch.device, of: str = "q") -> None:
    """The same device as the call's first tensor, which ``of`` names."""
    if value.device != device:
        raise SpecError(name, f"device {value.device}", f"the device of {of}, {device}")


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """An int (not a bool) within inclusive bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(name, f"{shown(value)} ({type(value).__name__})", "an int")
    if value < low or (high is not None and value > high):
        raise SpecError(name, value, f"{low} or more" if high is None else f"{low}…{high}")


def require_bool(name: str, value: Any) -> None:
    """True or False, not something truthy."""
    if value is not True and value is not False:
        raise SpecError(name, f"{shown(value)} ({type(value).__name__})", "True or False")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise SpecError(name, shown(value), " or ".join(map(repr, choices)))


def require_values(name: str, bad: Tensor, values: Tensor, legal: str) -> None:
    """No True in ``bad``; otherwise name the first offending element of ``values``. Reads device memory."""
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise SpecError(name, f"{values[tuple(index)].item()} at {index}", legal)


def require_writable(name: str, value: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Every element has memory of its own, and none of it lies within an input's byte range."""
    if not value.is_contiguous():
        _require_no_self_overlap(name, value)
    start, end = _storage_range(value)
    for other, tensor in inputs.items():
        if tensor is None:
            continue
        first, last = _storage_range(tensor)
        if start < last and first < end and tensor.device == value.device:
            _require_disjoint(name, value, other, tensor)


def _storage_range(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()


def _require_no_self_overlap(name: str, value: Tensor) -> None:
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride < extent:
            raise SpecError(name, f"strides {list(value.stride())}", "strides under which no two elements overlap")
        extent = stride * size


def _require_disjoint(name: str, value: Tensor, other: str, tensor: Tensor) -> None:
    start, end = _byte_range(value)
    first, last = _byte_range(tensor)
    if start < last and first < end:
        raise SpecError(name, f"memory that {other} also covers", "memory of its own")


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the elements of a tensor occupy."""
    start = tensor.data_ptr()
    return start, start + span_bytes(tensor)


def span_bytes(tensor: Tensor) -> int:
    """From the first element of a tensor to the end of its last."""
    return _spanned(tensor) * tensor.itemsize


def _spanned(tensor: Tensor) -> int:
    """How many elements lie between the first one and one past the last one in memory."""
    if tensor.is_contiguous():
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def require_write_access(name: str, value: Tensor) -> None:
    """The first and the last byte lie in memory that this process may write, which a mapped file need not be.

    Asks the operating system, which takes microseconds.
    """
    start, end = _byte_range(value)
    if start == end or value.device.type != "cpu":
        return
    # The kernel copies both bytes onto themselves, and says so where it must not. Where it may not be asked (EPERM in
    # some sandboxes), nothing is known and nothing refused.
    both = (ctypes.c_size_t * 4)(start, 1, end - 1, 1)
    copied = _copy(os.getpid(), both, 2, both, 2, 0)
    if copied == 1 or (copied < 0 and ctypes.get_errno() == errno.EFAULT):
        raise SpecError(name, "memory that may only be read", "memory that may be written")


_copy: Final = ctypes.CDLL(None, use_errno=True).process_vm_readv
_copy.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
]  # fmt: skip
_copy.restype = ctypes.c_ssize_t
