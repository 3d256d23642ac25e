"""Weights that come back with the rows of a token."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(values: Tensor, idx: Tensor, first: Tensor) -> Tensor:
    """Give every choice of an expert the value of the first one: [n, K] each, ``first`` true for those with a value."""
    same = (idx[:, :, None] == idx[:, None, :]) & first[:, None, :]
    return torch.where(idx >= 0, (same * values[:, None, :]).sum(2), 0.0)


def summed(table: Tensor, first: Tensor) -> Tensor:
    """Sum [n, K, K] over the choices that carry a row, in their order: [n, K]."""
    total = torch.zeros_like(table[:, 0])
    for k in range(table.shape[1]):
        total += table[:, k].where(first[:, k, None], 0.0)
    return total
