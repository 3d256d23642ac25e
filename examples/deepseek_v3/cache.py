"""The paged latent cache: pages, who holds them, and the rows of all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hal import SpecError


class PagePool:
    """Numbers of free pages; the last one returned is the next one taken.

    Attributes
    ----------
    size : int
        Pages in all.
    recycled : int
        Pages handed out that somebody had held before.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.recycled = 0
        self._free = list(reversed(range(size)))
        self._used: set[int] = set()
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Hand out one page.

        Raises
        ------
        SpecError
            None is free.
        """
        if not self._free:
            raise SpecError("pages", f"a request beyond all {self.size}", "at most as many as are free")
        page = self._free.pop()
        self.recycled += page in self._used
        self._used.add(page)
        self._held.add(page)
        return page

    def give_back(self, pages: Iterable[int]) -> None:
        """Take pages back.

        Raises
        ------
        SpecError
            A page that nobody holds.
        """
        for page in pages:
            if page not in self._held:
                raise SpecError("pages", f"page {page}, which is free", "pages that are held")
            self._held.remove(page)
            self._free.append(page)


class LatentCache:
    """Latent rows of every layer, [pages, page_size, 1, d] each: one page number is the same place in all of them.

    Pages nobody holds are full of NaN, so that a result shows it at once if anything reads them.
    """

    def __init__(
        self, layers: int, pages: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pool = PagePool(pages)
        self.page_size = page_size
        self.layers = [
            torch.full((pages, page_size, 1, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(layers)
        ]

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page_size)

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Put rows [n, d] at the places ``page * page_size + offset`` of one layer."""
        self.layers[layer].flatten(0, 2)[slots] = rows

    def release(self, pages: list[int]) -> None:
        """Return pages to the pool, their content gone."""
        for layer in self.layers:
            layer[pages] = torch.nan
        self.pool.give_back(pages)
