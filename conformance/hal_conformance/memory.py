"""Tensors inside guarded memory: views with chosen strides, everything around them poisoned and watched.

An allocation is larger than its tensor. What no element of the view covers is the *guard*: margins at both ends and the
gaps between padded rows. After a call the guard must hold the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1024
"""Elements of guard at both ends; enough for a kernel's whole tile row to land in it."""

UNWRITTEN: dict[torch.dtype, int] = {torch.bfloat16: 0x7FD5, torch.float16: 0x7ED5, torch.float32: 0x7FD5AAAA}
"""The bits of fresh outputs: a NaN no arithmetic makes, so that *never written* is told from *computed NaN*."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class Guarded:
    """A view and the allocation around it.

    Attributes
    ----------
    name : str
        Of the argument, for messages.
    view : Tensor
    storage : Tensor
        One-dimensional.
    before : Tensor
        Its bits when it was last sealed.
    inside : Tensor
        For every element of the allocation whether the view covers it.
    """

    name: str
    view: Tensor
    storage: Tensor
    before: Tensor
    inside: Tensor

    def seal(self) -> None:
        """Remember the present bits."""
        self.before = bits(self.storage).clone()

    def _changed(self) -> Tensor:
        return bits(self.storage) != self.before

    def overrun(self) -> str:
        """Where guard memory was written; empty if nowhere."""
        hit = self._changed() & ~self.inside
        if not bool(hit.any()):
            return ""
        where = hit.nonzero().flatten()
        first, last = self.inside.nonzero().flatten()[[0, -1]].tolist() if bool(self.inside.any()) else (0, 0)
        at = int(where[0])
        side = "before its first" if at < first else "after its last" if at > last else "between its rows, past an"
        return f"{len(where)} elements of memory around {self.name} were written, {side} element (offset {at - first})"

    def modified(self) -> str:
        """Where the tensor itself was written since it was sealed; empty if nowhere. For inputs."""
        hit = self._changed()
        if not bool(hit.any()):
            return ""
        return f"the input {self.name} was changed by the call ({int(hit.sum())} elements)"


def distinct(view: Tensor) -> Tensor:
    """The part of a view in which no two elements share memory: the first of every dimension of stride 0."""
    for dim, stride in enumerate(view.stride()):
        if stride == 0 and view.shape[dim] > 1:
            view = view.narrow(dim, 0, 1)
    return view


def write(view: Tensor, values: Tensor) -> None:
    """Copy into a view; of values that would share memory, the first."""
    to = distinct(view)
    to.copy_(values[tuple(slice(size) for size in to.shape)])


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN compares equal to itself."""
    return tensor.view(_BITS[tensor.element_size()])


def unwritten(tensor: Tensor) -> Tensor:
    """Which elements still hold what a fresh output holds."""
    return bits(tensor) == UNWRITTEN[tensor.dtype]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits."""
    return bool((bits(a.contiguous()) == bits(b.contiguous())).all()) if a.shape == b.shape else False


def place(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    fill: float | None,
    order: tuple[int, ...] | None = None,
    pad: tuple[int, ...] | None = None,
    start: int = 0,
    once: tuple[int, ...] = (),
) -> Guarded:
    """Allocate a guarded tensor.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype, device
    fill : float or None
        What the whole allocation holds at first; None for the mark of fresh outputs.
    order : tuple of int, optional
        The dimensions from outermost to innermost in memory; the last must stay last. Default as in ``shape``.
    pad : tuple of int, optional
        Extra elements (per dimension of ``shape``) between one index and the next of that dimension.
    start : int
        Elements between an aligned address and the first one: a legal view begins anywhere.
    once : tuple of int
        Dimensions that are in memory once, whatever their size: their stride is 0.
    """
    first = MARGIN + start
    order = order or tuple(range(len(shape)))
    pad = pad or (0,) * len(shape)
    strides = [0] * len(shape)
    extent = 1
    for dim in reversed(order):
        if dim in once:
            continue
        strides[dim] = extent + (pad[dim] if dim != len(shape) - 1 else 0)
        extent = strides[dim] * max(shape[dim], 1)
    if fill is None:
        mark = torch.full((extent + start + 2 * MARGIN,), UNWRITTEN[dtype], dtype=_BITS[dtype.itemsize], device=device)
        storage = mark.view(dtype)
    else:
        storage = torch.full((extent + start + 2 * MARGIN,), fill, dtype=dtype, device=device)
    view = storage.as_strided(shape, strides, first)
    inside = torch.zeros(storage.shape, dtype=torch.bool, device=device)
    distinct(inside.as_strided(shape, strides, first)).fill_(True)
    return Guarded(name, view, storage, bits(storage).clone(), inside)


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor that lies in its caller's memory as it may.

    Attributes
    ----------
    tensor : Tensor
    pad : int
        Unused elements after each row.
    start : int
        Elements between an aligned address and the first one.
    once : bool
        Whether there is one row in memory, which all rows are.
    """

    tensor: Tensor
    pad: int = 0
    start: int = 0
    once: bool = False

    def guarded(self, name: str, device: str) -> Guarded:
        """It in guarded memory, sealed. Around it lies what must not be read: NaN, and experts that do not exist."""
        shape, dtype = tuple(self.tensor.shape), self.tensor.dtype
        fill = float("nan") if dtype.is_floating_point else 77777
        pad = (*(0,) * (len(shape) - 2), self.pad, 0)[-len(shape) :]
        once = (0,) if self.once else ()
        guard = place(name, shape, dtype, device, fill=fill, pad=pad, start=self.start, once=once)
        write(guard.view, self.tensor.to(device))
        guard.seal()
        return guard
