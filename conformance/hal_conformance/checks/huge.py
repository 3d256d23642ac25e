"""L2: caches with more elements than 32 bits can count."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from hal.spec.errors import DeviceError
from hal_conformance.checks import holds
from hal_conformance.context import BackendRaised, Context
from hal_conformance.decode import Outcome
from hal_conformance.inputs import Inputs
from hal_conformance.memory import Guarded, bits
from hal_conformance.virtual import NoRoom, reserve

_LIMITS: Final = (2**31, 2**32)
"""What an index of an element is kept in where it is not kept in 64 bits; the bytes are twice that, or more."""

_MOST_BLOCKS: Final = 2**31 - 1
"""A table entry is an int32."""


@holds("MLA-48")
def large_caches(context: Context) -> None:
    """A call on a few pages, then the same pages at the end of a cache of more than 2^31 or 2^32 elements."""
    draw = context.draw()
    case = draw.base().but(lengths=draw.lengths(batch=(2, 4)), data=draw.data())
    page = case.page if context.index % 2 == 0 else draw.page(usual=False)
    case = case.but(page=page, kv_layout="contiguous", dtype=min(context.dense.dtypes, key=_size))
    small, _, verdict = context.check(case)
    if not verdict.ok:
        return
    limit = _LIMITS[context.index % len(_LIMITS)]
    try:
        outcome = _run(context, _at_the_end(context.make(case, small.seed), limit))
    except NoRoom as refused:
        context.record.notes.append(f"no cache of more than {limit} elements was tried: {refused}")
        return
    context.compare(small, outcome, what=f"at the end of a cache of more than {limit} elements: ")


def _run(context: Context, large: Inputs) -> Outcome:
    """A call that the device may refuse: how much it gives at once, nobody can ask it by way of the HAL."""
    try:
        return context.run(large)
    except BackendRaised as raised:
        if isinstance(raised.error, DeviceError) and not _is_there(context):
            raise NoRoom(str(raised.error)) from raised
        raise


def _is_there(context: Context) -> bool:
    """Whether the cache is memory of this host that kernels of this host read: then nobody has to find room for it."""
    return torch.device(context.device).type == "cpu" and context.settings.evidence == "hardware"


def _size(dtype: str) -> int:
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found.itemsize


def _at_the_end(inputs: Inputs, limit: int) -> Inputs:
    """Move the cache of a call to the end of a larger one, of which nothing else is touched."""
    window = inputs.kv_cache.view
    used, row = window.shape[0], window[0].numel()
    blocks = min(-(-limit // row) + used, _MOST_BLOCKS)
    storage = reserve(blocks * row, window.dtype, inputs.case.device)
    cache = storage.view(blocks, *window.shape[1:])
    cache[-used:] = window
    ending = storage[-used * row :]
    inside = torch.ones(ending.shape, dtype=torch.bool, device=ending.device)
    table = torch.where((inputs.table >= 0) & (inputs.table < used), inputs.table + (blocks - used), inputs.table)
    inputs.block_table.view.copy_(table)
    inputs.block_table.seal()
    watched = Guarded("kv_cache", cache, ending, bits(ending).clone(), inside)
    return dataclasses.replace(inputs, kv_cache=watched, table=table)
