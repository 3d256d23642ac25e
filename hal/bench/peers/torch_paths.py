"""What torch itself offers: eager float32, and scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

from hal.bench.cases import MlaCase
from hal.bench.data import MlaData
from hal.bench.peers.base import Peer, Prepared, Presence


class _Gathering(Prepared):
    """Gathers pages with torch, then attends: all sequences at once where they have one length, else one by one."""

    def __init__(self, data: MlaData) -> None:
        self._data = data
        self._pool = data.kv_cache.squeeze(2)
        case, page = data.case, data.case.page_size
        self._scale = case.d**-0.5
        self._out: Tensor | list[Tensor] | None = None
        groups = [list(range(case.b))] if data.uniform else [[j] for j in range(case.b)]
        self._groups = [(rows, data.lengths[rows[0]], -(-data.lengths[rows[0]] // page)) for rows in groups]
        # The index of the pages is the block table without its unused entries, as an engine would keep it.
        self._pages = [
            [table[rows, :pages].long().flatten() for rows, _, pages in self._groups] for table in data.tables
        ]
        self._queries = [data.q[rows].flatten(1, 2) for rows, _, _ in self._groups]
        self._masks = [self._mask(length) for _, length, _ in self._groups]

    def call(self, layer: int) -> None:
        """Gather and attend."""
        outs = []
        for (rows, length, pages), index, q, mask in zip(
            self._groups, self._pages[layer], self._queries, self._masks, strict=True
        ):
            size = pages * self._data.case.page_size
            kv = self._pool.index_select(0, index).view(len(rows), size, self._data.case.d)[:, :length]
            outs.append(self.attend(q, kv, mask))
        self._out = outs

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """Q [n, s_q · h_q, d] over kv [n, length, d]; the mask is True where a query sees a key."""
        raise NotImplementedError

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Out only."""
        assert self._out is not None
        case = self._data.case
        return torch.cat(list(self._out)).view(case.b, case.s_q, case.h_q, case.d_v), None

    def poison(self) -> None:
        """Forget the result: every call allocates its own."""
        self._out = None

    def _mask(self, length: int) -> Tensor | None:
        case = self._data.case
        if not case.causal or case.s_q == 1:
            return None
        seen = length - case.s_q + torch.arange(case.s_q)
        mask = torch.arange(length) <= seen[:, None]
        return mask.repeat_interleave(case.h_q, 0).to(self._pool.device)


class _Eager(_Gathering):
    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        rows = kv.float()
        scores = torch.matmul(q.float() * self._scale, rows.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.matmul(torch.softmax(scores, -1), rows[..., : self._data.case.d_v]).to(q.dtype)


class _Sdpa(_Gathering):
    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        # One head of many queries: K is shared and never expanded. V is the whole row, since equal head sizes are what
        # the fused path asks for; its last columns are dropped.
        q, kv = q.unsqueeze(1), kv.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask, scale=self._scale)
        return out.squeeze(1)[..., : self._data.case.d_v]


class _TorchPeer(Peer):
    """What both ways through torch have in common."""

    lacks = ("lse",)

    def presence(self) -> Presence:
        """Always there."""
        return Presence(True, f"torch {torch.__version__}")

    def elsewhere(self, device: torch.device) -> str:
        """Nowhere: torch runs wherever its tensors are."""
        return ""

    def cannot(self, case: MlaCase) -> str:
        """Nothing."""
        return ""


class TorchEager(_TorchPeer):
    """Page gather, two matrix products and a softmax in float32."""

    name = "torch-eager"
    summary = "torch eager in float32: page gather, upcast, matmul, softmax, matmul"

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Page indices and masks."""
        return _Eager(data)


class TorchSdpa(_TorchPeer):
    """scaled_dot_product_attention with K shared over heads."""

    name = "torch-sdpa"
    summary = "torch scaled_dot_product_attention in q's dtype: page gather, K shared over heads, V = K"

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Page indices and masks."""
        return _Sdpa(data)
