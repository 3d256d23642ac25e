"""Cases of expert-parallel obligations: sizes, routing and data of every rank, as data that can be printed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hal.reference import ep as oracle
from hal.reference.ep import RankInput
from hal.spec.ep import FP8, SCALE_GROUP

ROUTINGS: Final = ("mixed", "distinct", "zipf", "one", "one_rank", "avoid", "same", "none", "half")
TIMEOUT: Final = 10.0
"""Of the buffers of ordinary cases: longer than anything a correct backend needs."""

_LARGE: Final = 1.5 * 2.0**15
_SMALL: Final = 2.0**-11
"""Representable in every dtype of rows; their sum is not, in float32."""


@dataclass(frozen=True, slots=True)
class EpCase:
    """Sizes, options and attacks of one case, the same for all ranks.

    Attributes
    ----------
    ranks, experts, topk, hidden : int
    tokens : tuple of int
        Of each rank.
    dtype : str
    routing : str
        Member of `ROUTINGS`: with holes and duplicates, without, skewed, all to one expert, all to one rank, none to
        the first rank, one expert K times, no expert at all, every second token nowhere.
    data : str
        ``normal``; ``order``: sums depend on their order; ``extreme``: groups of columns hard to quantise; ``bits``:
        rows of any bits, of denormal numbers and of signed zeros, and sums of denormal numbers.
    scales : str
        Empty, or the dtype of the scales that travel with FP8 rows.
    weights : str
        ``usual``; ``any``: of any size and sign; ``holes``: NaN where no expert is chosen; empty for none.
    expand : bool
    alignment, worst, bias : int
    capacity : int
        ``max_tokens_per_rank``; 0 for just enough.
    room : int or None
        ``max_recv_tokens``.
    overflow : str
    per_node : int or None
    pre_reduce : bool
    cast : str
    pad : int
        Unused elements after each row of the inputs.
    start : int
        Elements between an aligned address and the first one of every tensor.
    once : bool
        Whether all tokens of a rank are one row of memory.
    width : int
        The buffer's ``topk`` where that is more than the choices of this call.
    handle : str
        ``new``, or ``cached``: other rows over the routes of an earlier dispatch.
    back : bool
        Whether weights that came go back in combine.
    finish : str
        How its calls end: ``call``, ``event`` or ``hook``.
    zero_copy : bool
    out : str
        ``none``, ``contiguous`` or ``padded``: where a low-latency combine is to put its sums.
    statistics : bool
        Whether counters of received rows and of waits are given.
    """

    ranks: int = 2
    experts: int = 8
    topk: int = 3
    hidden: int = 64
    tokens: tuple[int, ...] = (5, 7)
    dtype: str = "bfloat16"
    routing: str = "mixed"
    data: str = "normal"
    scales: str = ""
    weights: str = "usual"
    expand: bool = False
    alignment: int = 1
    worst: int = 0
    bias: int = 0
    capacity: int = 0
    room: int | None = None
    overflow: str = "error"
    per_node: int | None = None
    pre_reduce: bool = False
    cast: str = "none"
    pad: int = 0
    start: int = 0
    once: bool = False
    width: int = 0
    handle: str = "new"
    back: bool = True
    finish: str = "call"
    zero_copy: bool = False
    out: str = "none"
    statistics: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of unquantised rows."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def local(self) -> int:
        """Experts a rank."""
        return oracle.local_experts(self.experts, self.ranks)

    @property
    def most(self) -> int:
        """``max_tokens_per_rank``."""
        return max(self.capacity, *self.tokens, 1)

    def but(self, **changes: Any) -> EpCase:
        """The same case with some fields changed."""
        return dataclasses.replace(self, **changes)

    def sizes(self) -> dict[str, int]:
        """How large it is along every axis a port may be wrong on."""
        found = {
            "ranks": self.ranks,
            "num_experts": self.experts,
            "experts of a rank": self.local,
            "topk": self.topk,
            "tokens of a rank": max(self.tokens),
            "row_bytes": self.hidden * self.torch_dtype.itemsize,
        }
        groups = -(-self.hidden // SCALE_GROUP)
        return found | ({"scaled groups of a row": groups} if self.scales or self.cast != "none" else {})

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, and what a person has to read."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        must = ("ranks", "experts", "topk", "hidden", "tokens", "routing")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if k in must or v != defaults[k]}

    def buffer(self, mode: str | tuple[str, ...] = "normal", **more: Any) -> dict[str, Any]:
        """Arguments of its `hal.EpBuffer`."""
        return {
            "num_experts": self.experts,
            "hidden": self.hidden,
            "topk": max(self.topk, self.width),
            "max_tokens_per_rank": self.most,
            "dtype": self.torch_dtype,
            "modes": (mode,) if isinstance(mode, str) else mode,
            "max_recv_tokens": self.room,
            "overflow": self.overflow,
            "ranks_per_node": self.ranks if self.per_node is None else self.per_node,
            "pre_reduce": self.pre_reduce,
            "timeout": TIMEOUT,
            **more,
        }

    def inputs(self, seed: int) -> list[RankInput]:
        """What every rank passes in."""
        rng = torch.Generator().manual_seed(seed % 2**63)
        made = []
        for n in self.tokens:
            x = self._rows(n, rng)
            scales = None
            if self.scales:
                x = self._any_bits(n, FP8, rng) if self.data == "bits" else x.clamp(-400, 400).to(FP8)
                groups = -(-self.hidden // SCALE_GROUP)
                if self.scales == "int32":
                    scales = torch.randint(-(2**31), 2**31 - 1, (n, -(-groups // 4)), generator=rng, dtype=torch.int32)
                elif self.data == "bits":
                    scales = torch.randint(-(2**31), 2**31, (n, groups), generator=rng).int().view(torch.float32)
                else:
                    scales = torch.rand(n, groups, generator=rng) + 0.5
            idx = self._routes(n, rng)
            weights = self._weights(n, rng)
            if self.data == "order":
                # Powers of two, so that weighted rows cancel too; and for every other token thirds, with which they
                # cancel only if each product was rounded before it was added.
                weights = torch.exp2(-torch.randint(0, 2, (n, self.topk), generator=rng).float())
                weights[1::2] = 1 / 3
            if self.weights == "holes":
                weights[idx < 0] = torch.nan
            rows = x if self.scales else x.to(self.torch_dtype)
            if self.data == "bits" and not self.scales:
                rows = self._any_bits(n, self.torch_dtype, rng)
            rows = rows[:1].expand_as(rows) if self.once else rows
            made.append(RankInput(rows, idx, weights if self.weights else None, scales))
        return made

    def _weights(self, n: int, rng: torch.Generator) -> Tensor:
        shape = (n, self.topk)
        some = torch.rand(shape, generator=rng)
        if self.weights != "any":
            return some + 0.05
        signs = torch.randint(-1, 2, shape, generator=rng)
        return signs * (some + 0.5) * torch.exp2(torch.randint(-12, 13, shape, generator=rng).float())

    def _rows(self, n: int, rng: torch.Generator) -> Tensor:
        x = torch.randn(n, self.hidden, generator=rng)
        if self.data == "order":
            x = x * torch.tensor([4096.0, 1.0, 0.03])[torch.randint(3, (n, 1), generator=rng)]
        if self.data == "extreme":
            groups = -(-self.hidden // SCALE_GROUP)
            sizes = torch.tensor([0.0, 1e-6, 3e-5, 1.0, 448.0, 7.0, 1e4, 2.0**-9])
            size = sizes[torch.randint(len(sizes), (n, groups), generator=rng)]
            x = x * size.repeat_interleave(SCALE_GROUP, 1)[:, : self.hidden]
            # Groups whose largest magnitude is exactly a power of two times 448: no rounding up there.
            exact = torch.rand(n, groups, generator=rng) < 0.3
            at = torch.arange(groups) * SCALE_GROUP
            x[:, at] = torch.where(
                exact, 448.0 * torch.exp2(torch.randint(-8, 4, (n, groups), generator=rng)), x[:, at]
            )
        return x

    def _any_bits(self, n: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
        """Rows in turn of any bits, NaN and inf among them, of denormal numbers, and of zeros of both signs."""
        size = 8 * dtype.itemsize
        words = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[size]
        found = torch.randint(2**size, (n, self.hidden), generator=rng)
        sign = 1 << (size - 1)
        mantissa = round(-math.log2(torch.finfo(dtype).eps))
        kind = (torch.arange(n) + int(torch.randint(3, (1,), generator=rng)))[:, None] % 3
        found = torch.where(kind == 1, found & (sign | ((1 << mantissa) - 1)), found)
        found = torch.where(kind == 2, found & sign, found)
        signed = found if words is torch.uint8 else found - ((found & sign) << 1)
        return signed.to(words).view(dtype)

    def _routes(self, n: int, rng: torch.Generator) -> Tensor:
        experts, topk = self.experts, self.topk
        shape = (n, topk)
        if self.routing == "distinct":
            # Of fewer experts than choices, the rest are holes.
            chosen = torch.rand(n, experts, generator=rng).topk(min(topk, experts), dim=1).indices
            return torch.cat([chosen, torch.full((n, topk - chosen.shape[1]), -1)], 1)
        if self.routing == "zipf":
            share = (1.0 / torch.arange(1, experts + 1)).cumsum(0)
            return torch.searchsorted(share, torch.rand(shape, generator=rng) * share[-1]).clamp(max=experts - 1)
        if self.routing == "one":
            return torch.full(shape, experts - 1)
        if self.routing == "one_rank":
            first = (experts - 1) // self.local * self.local
            return torch.randint(first, experts, shape, generator=rng)
        if self.routing == "avoid" and experts > self.local:
            return torch.randint(self.local, experts, shape, generator=rng)
        if self.routing == "same":
            return torch.randint(experts, (n, 1), generator=rng).expand(shape).contiguous()
        if self.routing == "none":
            return torch.full(shape, -1)
        idx = torch.randint(experts, shape, generator=rng)
        if self.routing == "half":
            idx[::2] = -1
            return idx
        hole = torch.rand(shape, generator=rng) < 0.2
        # Duplicates on purpose: an expert again in the next column.
        again = torch.rand(n, generator=rng) < 0.4
        if topk > 1:
            idx[:, -1] = torch.where(again, idx[:, 0], idx[:, -1])
        return idx.masked_fill(hole, -1)

    def outputs(self, rows: list[int], seed: int) -> list[Tensor]:
        """What the experts of every rank make of so many rows: sums of them depend on their order."""
        rng = torch.Generator().manual_seed(seed % 2**63)
        return [self._cancelling(count, rng) for count in rows]

    def biases(self, seed: int) -> list[list[Tensor]]:
        """``bias`` tensors of every rank."""
        rng = torch.Generator().manual_seed(seed % 2**63)
        return [[self._cancelling(n, rng) for _ in range(self.bias)] for n in self.tokens]

    def _cancelling(self, rows: int, rng: torch.Generator) -> Tensor:
        """Numbers of which the large ones cancel, and swallow in float32 the small ones added before they do."""
        shape = (rows, self.hidden)
        if self.data == "bits":
            # Denormal numbers with a quarter of what the mantissa holds: sums are exact, mostly denormal too, and need
            # all of its bits. A few are inf or NaN, and so is what they are added to.
            numbers = torch.finfo(self.torch_dtype)
            most = round(0.25 / numbers.eps)
            whole = torch.randint(-most, most + 1, shape, generator=rng)
            tiny = (whole.double() * numbers.smallest_normal * numbers.eps).to(self.torch_dtype)
            chance = torch.rand(shape, generator=rng)
            return tiny.masked_fill(chance < 0.02, torch.inf).masked_fill(chance > 0.99, torch.nan)
        signs = torch.randint(0, 2, shape, generator=rng) * 2 - 1
        large = torch.rand(shape, generator=rng) < 0.4
        return torch.where(large, signs * _LARGE, torch.randn(shape, generator=rng) * _SMALL).to(self.torch_dtype)
