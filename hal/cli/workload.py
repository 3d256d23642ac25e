"""Paged caches as a serving engine has them, and the decode steps of one batch over several layers.

Pages are shuffled, memory that holds no token is NaN and table entries past the last page are `UNUSED_ENTRY`: what a
kernel must not read shows up in the result if it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hal.cli.verify import published

UNUSED_ENTRY: Final = 2147480000
"""What table entries past the last page hold, as in the published tests."""


def shuffled_table(lengths: Sequence[int], page_size: int, generator: torch.Generator) -> Tensor:
    """A block table [b, max_blocks] for so many tokens a sequence, over exactly the pages they need."""
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages), generator=generator, dtype=torch.int32)
    table = torch.full((len(pages), max(*pages, 1)), UNUSED_ENTRY, dtype=torch.int32)
    for row, own in zip(table, torch.split(order, pages), strict=True):
        row[: len(own)] = own
    return table


def rows_of(table: Tensor, page_size: int, sequence: int, start: int, stop: int) -> Tensor:
    """Where tokens ``start`` to ``stop`` of one sequence lie, as rows of the cache seen as [tokens, h_kv, d]."""
    positions = torch.arange(start, stop)
    return table[sequence, positions // page_size].long() * page_size + positions % page_size


def empty_cache(table: Tensor, page_size: int, h_kv: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A cache [num_blocks, page_size, h_kv, d] with a page for every entry in use, all NaN."""
    blocks = int((table != UNUSED_ENTRY).sum())
    return torch.full((max(blocks, 1), page_size, h_kv, head_dim), torch.nan, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the workload; the defaults are one attention of DeepSeek-V3.

    Attributes
    ----------
    batch, layers, steps, s_q : int
        Sequences, caches (one a layer), decode steps, new tokens a sequence and step.
    max_len : int
        The longest a sequence may be after the last step.
    """

    batch: int
    max_len: int
    layers: int
    steps: int
    s_q: int
    dtype: torch.dtype
    h_q: int = 128
    h_kv: int = 1
    head_dim: int = 576
    head_dim_v: int = 512
    page_size: int = 64

    def bytes_at_most(self) -> int:
        """Host memory the caches, the queries and the results can take, with the float32 they are drawn in."""
        rows = self.batch * (self.max_len + self.page_size)
        kv = rows * self.h_kv * self.head_dim
        tokens = self.batch * self.s_q * self.layers * self.steps
        return self.dtype.itemsize * (kv * self.layers + tokens * self.h_q * (self.head_dim + self.head_dim_v)) + 8 * kv


@dataclass(frozen=True, slots=True)
class Step:
    """What one decode step passes to `hal.mla_decode`: one query tensor a layer, the rest shared by all layers."""

    queries: list[Tensor]
    table: Tensor
    cache_seqlens: Tensor


class Workload:
    """A batch of sequences of random lengths whose caches grow by ``s_q`` tokens a step.

    Everything is drawn on the host from one seed, so that every device sees the same numbers. Rows are standard
    normal, as the normalised latents of the model are.
    """

    def __init__(self, shape: Shape, seed: int, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)
        room = shape.max_len - shape.steps * shape.s_q
        mean = room / 2
        drawn = mean + mean / 2 * torch.randn(shape.batch, generator=self._generator)
        self.start = [int(length) for length in drawn.clamp(0, room)]
        self.table = shuffled_table(self.lengths(shape.steps), shape.page_size, self._generator)
        self.caches: list[Tensor] = []

    def lengths(self, steps: int) -> list[int]:
        """Cached tokens of each sequence once so many steps have appended theirs."""
        return [length + steps * self.shape.s_q for length in self.start]

    def build(self) -> Iterator[int]:
        """Fill one cache after the other with the tokens before the first step; yields the layer done."""
        s = self.shape
        for layer in range(s.layers):
            cache = empty_cache(self.table, s.page_size, s.h_kv, s.head_dim, s.dtype).to(self.device)
            self.caches.append(cache)
            for sequence, length in enumerate(self.start):
                self._append(cache, sequence, 0, length)
            yield layer

    def step(self, number: int) -> Step:
        """Append the tokens of step ``number`` to every cache and draw its queries."""
        s = self.shape
        before, after = self.lengths(number), self.lengths(number + 1)
        for cache in self.caches:
            for sequence in range(s.batch):
                self._append(cache, sequence, before[sequence], after[sequence])
        queries = [self._normal(s.batch, s.s_q, s.h_q, s.head_dim) for _ in range(s.layers)]
        cache_seqlens = torch.tensor(after, dtype=torch.int32)
        used = (cache_seqlens + s.page_size - 1) // s.page_size
        beyond = torch.arange(self.table.shape[1]) >= used[:, None]
        table = self.table.masked_fill(beyond, UNUSED_ENTRY)
        return Step(queries, table.to(self.device), cache_seqlens.to(self.device))

    def attended(self, lengths: Sequence[int]) -> int:
        """Keys attended in one layer, summed over queries: the last query sees all, each earlier one less."""
        s_q = self.shape.s_q
        return sum(length - s_q + i + 1 for length in lengths for i in range(s_q))

    def flop(self, step: int) -> int:
        """2 · h_q · (d + d_v) · attended keys, of one layer of this step."""
        s = self.shape
        return 2 * s.h_q * (s.head_dim + s.head_dim_v) * self.attended(self.lengths(step + 1))

    def bytes(self, step: int) -> int:
        """Q, each cached row once, and out, of one layer of this step."""
        s = self.shape
        cached = sum(self.lengths(step + 1)) * s.h_kv * s.head_dim
        return s.dtype.itemsize * (s.batch * s.s_q * s.h_q * (s.head_dim + s.head_dim_v) + cached)

    def _append(self, cache: Tensor, sequence: int, start: int, stop: int) -> None:
        s = self.shape
        rows = rows_of(self.table, s.page_size, sequence, start, stop).to(self.device)
        cache.view(-1, s.h_kv, s.head_dim)[rows] = self._normal(stop - start, s.h_kv, s.head_dim)

    def _normal(self, *size: int) -> Tensor:
        return published(self._generator, *size).to(self.device, self.shape.dtype)
