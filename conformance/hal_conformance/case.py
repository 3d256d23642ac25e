"""One MLA decode call as data: small, printable, replayable. The tensors are made from it and a seed in `inputs`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from hal.spec.errors import SpecError


@dataclass(frozen=True, slots=True)
class MlaCase:
    """Sizes, options and attacks of one call.

    Attributes
    ----------
    dtype : str
    lengths : tuple of int
        ``cache_seqlens``; its size is the batch.
    s_q : int
        Queries a sequence; ignored where ``q_lens`` is given.
    q_lens : tuple of int or None
        Ragged queries: how many each sequence has.
    h_q, h_kv, d, d_v, page : int
    causal, batch_invariant : bool
    lse_base : str
    scale : float or None
        ``softmax_scale``.
    data : str
        What the numbers look like; see `hal_conformance.inputs.DATA`.
    pages : str
        ``ordered``, ``shuffled``, ``shared`` (sequences have pages in common, one uses a page twice), or ``pool`` (all
        sequences draw from the same few pages, so that a large batch needs little memory).
    poison : str
        What unused cache memory holds: ``zero``, ``nan``, ``inf`` or ``huge``.
    garbage : int
        What unused table entries hold.
    q_layout, kv_layout, out_layout, table_layout : str
        ``contiguous`` or the name of a view with legal strides; ``out_layout`` also ``none``: not passed. ``expanded``:
        a dimension of stride 0, of q the first, of the cache the KV heads, of the table the sequences. A table that is
        ``wide`` has many more columns than any sequence uses.
    q_start, kv_start, out_start, table_start : int
        By how many elements a view begins off its alignment; ``table_start`` is for lengths and offsets too.
    plan : bool
        Whether the call uses a plan.
    device : str
    """

    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (64,)
    s_q: int = 1
    q_lens: tuple[int, ...] | None = None
    h_q: int = 16
    h_kv: int = 1
    d: int = 576
    d_v: int = 512
    page: int = 64
    causal: bool = False
    batch_invariant: bool = False
    lse_base: str = "e"
    scale: float | None = None
    data: str = "normal"
    pages: str = "shuffled"
    poison: str = "nan"
    garbage: int = 2147480000
    q_layout: str = "contiguous"
    kv_layout: str = "contiguous"
    out_layout: str = "none"
    table_layout: str = "contiguous"
    q_start: int = 0
    kv_start: int = 0
    out_start: int = 0
    table_start: int = 0
    plan: bool = False
    device: str = "cpu"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def queries(self) -> tuple[int, ...]:
        """Number of queries of each sequence."""
        return self.q_lens if self.q_lens is not None else (self.s_q,) * self.batch

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def flops(self) -> float:
        """Multiply-adds counted twice, by the published formula: h_q · Σ s_q · s · 2 (d + d_v)."""
        pairs = sum(n * s for n, s in zip(self.queries, self.lengths, strict=True))
        return 2.0 * self.h_q * pairs * (self.d + self.d_v)

    def bytes(self) -> float:
        """Bytes that must move at least: q, the cached tokens, out."""
        size = self.torch_dtype.itemsize
        rows = sum(self.queries) * self.h_q * (self.d + self.d_v)
        return float(size * (rows + sum(self.lengths) * self.h_kv * self.d))

    def visible(self, sequence: int, query: int) -> int:
        """How many keys a query of a sequence may see."""
        length = self.lengths[sequence]
        return max(0, length - self.queries[sequence] + query + 1) if self.causal else length

    def sizes(self) -> dict[str, int]:
        """How large it is along every axis a port may be wrong on."""
        longest = max(self.lengths, default=0)
        return {
            "head_dim": self.d,
            "head_dim_v": self.d_v,
            "h_q": self.h_q,
            "h_kv": self.h_kv,
            "s_q": max(self.queries, default=0),
            "page_size": self.page,
            "batch": self.batch,
            "cache_seqlens": longest,
            "pages of a sequence": -(-longest // self.page),
        }

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults: what a person has to read."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        must = ("dtype", "lengths", "h_q")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if k in must or v != defaults[k]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MlaCase:
        """The inverse of `to_dict`.

        Raises
        ------
        SpecError
            A field is unknown.
        """
        known = {f.name for f in dataclasses.fields(MlaCase)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise SpecError("case", unknown, sorted(known))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return MlaCase(**values)

    def but(self, **changes: Any) -> MlaCase:
        """The same case with some fields changed."""
        return dataclasses.replace(self, **changes)
