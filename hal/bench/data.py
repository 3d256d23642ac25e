"""Paged caches to decode from: shuffled pages, and as many layers as it takes to keep them out of the caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from hal.bench.cases import MlaCase
from hal.bench.machine import last_level_cache
from hal.cli.verify import published

UNUSED_ENTRY: Final = 2147480000
"""What table entries past the last page hold, as in the published tests."""

MOST_LAYERS: Final = 1024
_DEVICE_WORKING_SET: Final = 256 << 20
_DEVICE_CHECKED: Final = 2e11
"""FLOP of the reference, which computes on the host, for one case of a device."""


def layers_of(case: MlaCase, device: torch.device) -> int:
    """Caches to walk through so that a call finds its own no longer in the last-level cache, as in a model."""
    rows = case.b * _pages(case.s_k, case.page_size) * case.page_size
    one = rows * case.d * case.dtype.itemsize
    working_set = 2 * last_level_cache() if device.type == "cpu" else _DEVICE_WORKING_SET
    return min(MOST_LAYERS, max(1, -(-working_set // one)))


def bytes_of(case: MlaCase, device: torch.device) -> int:
    """Memory of the caches of one case."""
    rows = case.b * _pages(case.s_k, case.page_size) * case.page_size
    return layers_of(case, device) * rows * case.d * case.dtype.itemsize


@dataclass(slots=True)
class MlaData:
    """Inputs of one case. All layers share q and the lengths; each has pages of its own in one cache tensor.

    Attributes
    ----------
    case : MlaCase
    q : Tensor
        [b, s_q, h_q, d].
    kv_cache : Tensor
        [layers · pages, page_size, 1, d]; NaN wherever no token is.
    tables : list of Tensor
        Per layer [b, max_blocks] int32.
    cache_seqlens : Tensor
        [b] int32.
    lengths : list of int
        The same on the host.
    """

    case: MlaCase
    q: Tensor
    kv_cache: Tensor
    tables: list[Tensor]
    cache_seqlens: Tensor
    lengths: list[int]
    _expected: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many caches there are."""
        return len(self.tables)

    @property
    def flop(self) -> int:
        """Of one call."""
        return self.case.flop(self.lengths)

    @property
    def moved(self) -> int:
        """Bytes of one call."""
        return self.case.moved(self.lengths)

    @property
    def checked(self) -> list[int]:
        """The sequences whose results are compared: all, or on a device a spread of as many as the host can afford."""
        b = self.case.b
        most = b if self.q.device.type == "cpu" else max(4, int(_DEVICE_CHECKED * b / max(self.flop, 1)))
        return list(range(b)) if most >= b else [i * (b - 1) // (most - 1) for i in range(most)]

    @property
    def uniform(self) -> bool:
        """Whether all sequences have one length."""
        return len(set(self.lengths)) == 1

    def gathered(self, layer: int) -> list[Tensor]:
        """The cached rows of each sequence, [length, d]: what a kernel without paging is given."""
        page = self.case.page_size
        rows = self.kv_cache.view(-1, self.case.d)
        found = []
        for table, length in zip(self.tables[layer], self.lengths, strict=True):
            positions = torch.arange(length, device=rows.device)
            found.append(rows[table[positions // page].long() * page + positions % page])
        return found

    def expected(self, layer: int) -> tuple[Tensor, Tensor]:
        """Out and lse of the float64 reference for the sequences in `checked`, computed once a layer."""
        if layer not in self._expected:
            from hal.reference import mla

            rows = self.checked
            lengths = self.cache_seqlens[rows].cpu()
            table = self.tables[layer][rows].cpu()
            # The reference takes the cache to the host, so it is given just the pages it reads.
            used = torch.arange(table.shape[1]) * self.case.page_size < lengths[:, None]
            pages = table[used].long()
            table[used] = torch.arange(len(pages), dtype=torch.int32)
            self._expected[layer] = mla.mla_decode(
                self.q[rows],
                self.kv_cache[pages.to(self.kv_cache.device)].cpu(),
                table,
                lengths,
                head_dim_v=self.case.d_v,
                causal=self.case.causal,
            )
        return self._expected[layer]


def make(case: MlaCase, seed: int, device: torch.device) -> MlaData:
    """Draw the inputs of one case as the published tests do, for which the published limits are made."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [case.s_k] * case.b
    if case.varlen:
        low = max(case.s_q, case.s_k // 2)
        lengths = torch.randint(low, case.s_k + 1, (case.b,), generator=generator).tolist()
    page, layers = case.page_size, layers_of(case, device)
    used = [_pages(length, page) for length in lengths]
    total = sum(used)
    order = torch.randperm(layers * total, generator=generator, dtype=torch.int32)
    cache = torch.empty(layers * total, page, 1, case.d, dtype=case.dtype, device=device)
    # Gigabytes are drawn where they are used.
    elements = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    for block in torch.split(cache, max(1, (4 << 20) // (page * case.d))):
        block.copy_(published(elements, *block.shape))
    tables = []
    for layer in range(layers):
        own = order[layer * total : (layer + 1) * total]
        table = torch.full((case.b, max(used)), UNUSED_ENTRY, dtype=torch.int32)
        for row, pages, length in zip(table, torch.split(own, used), lengths, strict=True):
            row[: len(pages)] = pages
            if length % page:
                cache[int(pages[-1]), length % page :] = torch.nan
        tables.append(table.to(device))
    q = published(generator, case.b, case.s_q, case.h_q, case.d).to(case.dtype)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return MlaData(case, q.to(device), cache, tables, seqlens.to(device), lengths)


def _pages(length: int, page_size: int) -> int:
    return -(-length // page_size)
