"""The oracle for dense MLA decode: float64, one sequence and one head group at a time, as the formula is written.

No kernel or front imports it, and it imports nothing of the HAL, so that no mistake can be shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    lse_base: str = "e",
) -> tuple[Tensor, Tensor]:
    """Dense MLA decode in float64 on the host.

    Parameters
    ----------
    q : Tensor
        [b, s_q, h_q, d], or [total_q, h_q, d] with ``cu_seqlens_q``.
    kv_cache : Tensor
        [num_blocks, page_size, h_kv, d].
    block_table : Tensor
        [b, max_blocks] int32; only entries within ``cache_seqlens`` are looked at.
    cache_seqlens : Tensor
        [b] int32.
    head_dim_v, softmax_scale, causal, cu_seqlens_q, lse_base
        As in `hal.mla_decode`.

    Returns
    -------
    out : Tensor
        float64, like q with last dimension ``head_dim_v``; 0 where a query attends nothing.
    lse : Tensor
        float64, [b, h_q, s_q] or [h_q, total_q]; +inf where a query attends nothing.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_q is None:
        queries = list(q.double().cpu())
    else:
        starts = cu_seqlens_q.tolist()
        queries = [q[a:z].double().cpu() for a, z in itertools.pairwise(starts)]
    outs, lses = [], []
    for rows, table, length in zip(queries, block_table.cpu(), cache_seqlens.tolist(), strict=True):
        keys = _gather(kv_cache, table, length)
        out, lse = _attend(rows, keys, head_dim_v, scale, causal)
        outs.append(out)
        lses.append(lse)
    if lse_base == "2":
        lses = [lse / torch.log(torch.tensor(2.0, dtype=torch.float64)) for lse in lses]
    h_q = q.shape[-2]
    if cu_seqlens_q is None:
        out = torch.stack(outs) if outs else torch.zeros(*q.shape[:-1], head_dim_v, dtype=torch.float64)
        return out, torch.stack(lses) if lses else torch.zeros(0, h_q, q.shape[1], dtype=torch.float64)
    empty_out = torch.zeros(0, h_q, head_dim_v, dtype=torch.float64)
    empty_lse = torch.zeros(h_q, 0, dtype=torch.float64)
    return torch.cat([empty_out, *outs]), torch.cat([empty_lse, *lses], dim=1)


def _gather(kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first ``length`` cached tokens of one sequence: [length, h_kv, d] float64."""
    page_size = kv_cache.shape[1]
    positions = torch.arange(length)
    pages = table[positions // page_size].long()
    return kv_cache.cpu()[pages, positions % page_size].double()


def _attend(q: Tensor, keys: Tensor, head_dim_v: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence: q [s_q, h_q, d], keys [length, h_kv, d] → out [s_q, h_q, d_v], lse [h_q, s_q]."""
    s_q, h_q, _ = q.shape
    length, h_kv, _ = keys.shape
    group = h_q // h_kv
    out = torch.zeros(s_q, h_q, head_dim_v, dtype=torch.float64)
    lse = torch.full((h_q, s_q), torch.inf, dtype=torch.float64)
    for i in range(s_q):
        seen = min(length, length - s_q + i + 1) if causal else length
        if seen <= 0:
            continue
        for h in range(h_kv):
            heads = slice(h * group, (h + 1) * group)
            scores = scale * (q[i, heads] @ keys[:seen, h].T)
            out[i, heads] = torch.softmax(scores, dim=-1) @ keys[:seen, h, :head_dim_v]
            lse[heads, i] = torch.logsumexp(scores, dim=-1)
    return out, lse


def mla_merge(outs: Sequence[Tensor], lses: Sequence[Tensor], *, lse_base: str = "e") -> tuple[Tensor, Tensor]:
    """Merge partial attention results in float64, row by row.

    Parameters
    ----------
    outs : sequence of Tensor
        [b, s_q, h_q, d_v] or [total_q, h_q, d_v] each.
    lses : sequence of Tensor
        [b, h_q, s_q] or [h_q, total_q] each; ±inf marks an empty part.
    lse_base : {"e", "2"}

    Returns
    -------
    out, lse : Tensor
        float64. A row that is empty everywhere gives 0 and +inf.
    """
    ln_base = torch.log(torch.tensor(2.0 if lse_base == "2" else torch.e, dtype=torch.float64))
    out = torch.zeros(outs[0].shape, dtype=torch.float64)
    lse = torch.full(lses[0].shape, torch.inf, dtype=torch.float64)
    heads_last = [part.double().cpu().transpose(-1, -2) * ln_base for part in lses]
    for row in torch.cartesian_prod(*map(torch.arange, out.shape[:-1])).reshape(-1, out.dim() - 1).tolist():
        at = tuple(row)
        parts = [(o[at].double().cpu(), lg[at]) for o, lg in zip(outs, heads_last, strict=True) if not lg[at].isinf()]
        if not parts:
            continue
        total = torch.logsumexp(torch.stack([lg for _, lg in parts]), dim=0)
        out[at] = sum((torch.exp(lg - total) * o for o, lg in parts), torch.zeros_like(out[at]))
        lse.transpose(-1, -2)[at] = total / ln_base
    return out, lse
