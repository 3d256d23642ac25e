"""Forms of calls: everything that checks look at but the values, so that the same form need not be checked again."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from torch import Tensor

_SCALARS: Final = frozenset((bool, int, str, float, type(None)))
_LIMIT: Final = 4096
"""Forms that are remembered; few calls of an engine differ in form, and memory is not to grow with those that do."""
_Forms = TypeVar("_Forms", bound="set[object] | dict[object, Any]")


def with_room(remembered: _Forms) -> _Forms:
    """Forms that passed, to which one is to be added: all are forgotten where they are too many."""
    if len(remembered) >= _LIMIT:
        remembered.clear()
    return remembered


def form_of(tensors: tuple[Any, ...], scalars: tuple[Any, ...]) -> object:
    """None for what is not plainly tensors and scalars, and needs the full check."""
    types = tuple(map(type, scalars))
    if not _SCALARS.issuperset(types):
        return None
    # Types of the scalars matter: True equals 1.
    form: list[Any] = [*scalars, *types]
    try:
        for one in tensors:
            if one is None:
                form.append(None)
            elif type(one) is Tensor:
                # A storage may be resized under its tensor. One that has no memory has no bytes.
                size = one.untyped_storage().nbytes()
                form += (one.dtype, one.shape, one.stride(), one.device, one.storage_offset(), size, one.is_neg())
            else:
                return None
    except (RuntimeError, NotImplementedError):
        return None  # what has no strides or no storage: sparse and nested tensors, those of torch.func
    return tuple(form)
