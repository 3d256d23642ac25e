"""What a combine sums, kept so that it can be summed in other ways: the one that explains a wrong sum is its cause."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hal.reference.ep import RankInput, RankPacked, RankReceived
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_causes import equal
from hal_conformance.memory import bits


@dataclass(frozen=True, slots=True)
class Term:
    """One row that a sum takes: who sends it, which expert it comes from (-1: a whole rank), its weight."""

    row: Tensor
    rank: int
    expert: int
    weight: float


@dataclass(frozen=True, slots=True)
class Sums:
    """What a combine sums on one rank, so that it can be summed in other ways.

    Attributes
    ----------
    terms : list of list of Term
        For every token in the order of summation.
    bias : sequence of Tensor
    topk_idx : Tensor
    ranks, rank : int
    per_node : int
    dtype : torch.dtype
    weighted : bool
        Whether the sum is weighted, as in low-latency mode.
    """

    terms: list[list[Term]]
    bias: Sequence[Tensor]
    topk_idx: Tensor
    ranks: int
    rank: int
    per_node: int
    dtype: torch.dtype
    weighted: bool

    def experts(self, token: int) -> list[int]:
        """The top-k of a token."""
        return [int(e) for e in self.topk_idx[token].tolist()]

    def cause(self, got: Any, want: Tensor) -> str:
        """The first other way of summing that gives exactly this."""
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            return ""
        if equal(got, want):
            return "rows are summed as they must be, their weights are not"
        tiny = want.abs() < torch.finfo(torch.float32).tiny
        if bool((want[tiny] != 0).any()) and equal(got.abs(), want.abs().where(~tiny, torch.zeros_like(want))):
            return "denormal sums come as 0"
        if equal(got, torch.zeros_like(got)):
            return "the result is 0: nothing is summed"
        for name, options in _SUMS:
            if name in _ONLY_WITH_BIAS and not self.bias:
                continue
            if self._explains(got, self._sum(**options), want, "power" in options or "normal" in options):
                return name
        wrong = (bits(got) != bits(want)).any(1)
        for name, options in _SUMS:
            again = self._sum(**options)
            if not bool((bits(got) != bits(again)).any(1)[wrong].any()):
                return f"{name} (in the wrong rows; the others are right)"
        columns = (bits(got) != bits(want)).any(0).nonzero().flatten()
        if int(columns[0]) >= want.shape[1] - 16 // want.element_size():
            return "the last 16 bytes of a row are lost"
        return ""

    def _explains(self, got: Tensor, other: Tensor, want: Tensor, loosely: bool) -> bool:
        """Whether a way of summing gives this: its bits, or where products may be rounded otherwise, nearly."""
        if not loosely:
            return equal(got, other)
        close = 4 * torch.finfo(self.dtype).eps
        near = [torch.allclose(got.double(), t.double(), rtol=close, atol=1e-3) for t in (other, want)]
        return near == [True, False]

    def _sum(
        self,
        order: str = "",
        power: int | None = None,
        short: bool = False,
        bias: float = 1.0,
        late_bias: bool = False,
        once: bool = False,
        own: bool = True,
        nodes: str = "",
        biases: int = 2,
        normal: bool = False,
    ) -> Tensor:
        power = int(self.weighted) if power is None else power
        out = torch.zeros(len(self.terms), self._hidden())
        for token, terms in enumerate(self.terms):
            chosen = self._ordered(terms, order)
            if once:
                chosen = [t for i, t in enumerate(chosen) if t.expert not in [u.expert for u in chosen[:i]]]
            total = torch.zeros(self._hidden())
            shift = [one[token].float() * bias for one in self.bias[:biases]]
            for one in () if late_bias else shift:
                total = self._round(total + one, short)
            groups: list[list[Term]] = [chosen]
            if nodes:
                seen = dict.fromkeys(t.rank // self.per_node for t in chosen)
                found = sorted(seen) if nodes == "rank" else [*reversed(seen)] if nodes == "reverse" else list(seen)
                groups = [[t for t in chosen if t.rank // self.per_node == node] for node in found]
            scale = (sum(t.weight for t in terms) or 1.0) if normal else 1.0
            for group in groups:
                part = torch.zeros(self._hidden()) if nodes else total
                for term in group:
                    if own or term.rank != self.rank:
                        weighted = term.row.float() * (term.weight**power / scale)
                        part = self._round(part + weighted, short)
                total = total + part if nodes else part
            for one in shift if late_bias else ():
                total = self._round(total + one, short)
            out[token] = total
        return out.to(self.dtype)

    def _hidden(self) -> int:
        return next((len(t.row) for terms in self.terms for t in terms), self.bias[0].shape[1] if self.bias else 1)

    def _round(self, value: Tensor, short: bool) -> Tensor:
        return value.to(self.dtype).float() if short else value

    def _ordered(self, terms: list[Term], order: str) -> list[Term]:
        keys: dict[str, Callable[[Term], Any]] = {
            "rank": lambda t: (t.rank, t.expert),
            "own": lambda t: (t.rank != self.rank, t.rank, t.expert),
            "around": lambda t: ((t.rank - self.rank) % self.ranks, t.expert),
        }
        if order == "reverse":
            return terms[::-1]
        return sorted(terms, key=keys[order]) if order else terms


_SUMS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("rows are summed flat although pre_reduce is True", {}),
    ("weights are applied twice", {"power": 2}),
    ("weights are applied, in a sum that has none", {"power": 1}),
    ("weights are missing", {"power": 0}),
    ("weights are normalised to 1", {"normal": True}),
    ("bias is missing", {"bias": 0.0}),
    ("only the first bias is added", {"biases": 1}),
    ("bias is added once more", {"bias": 2.0}),
    ("bias is added once per rank (3)", {"bias": 3.0}),
    ("bias is added once per rank (4)", {"bias": 4.0}),
    ("bias is added after the rows, not before", {"late_bias": True}),
    ("an expert chosen twice counts once", {"once": True}),
    ("a rank's own rows are lost", {"own": False}),
    ("nodes are summed by number, not in top-k order", {"nodes": "rank"}),
    ("nodes are summed in the reverse of top-k order", {"nodes": "reverse"}),
    ("nodes are summed apart although pre_reduce is False", {"nodes": "top-k"}),
    *(
        (
            f"order of summation is {name}, not top-k" + (", in the element type" if short else ""),
            {"order": o, "short": short},
        )
        for short, (name, o) in itertools.product(
            (False, True),
            (
                ("by rank (as rows arrive)", "rank"),
                ("this rank's own first", "own"),
                ("from this rank on, around (as rows arrive)", "around"),
                ("the reverse", "reverse"),
            ),
        )
    ),
    ("sums are kept in the element type, not in float32", {"short": True}),
)
_ONLY_WITH_BIAS: Final = tuple(name for name, _ in _SUMS if "bias" in name)


def of_normal(
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    received: Sequence[RankReceived],
    outputs: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
) -> Sums:
    """The terms of a normal combine; an expert's or a rank's row for every choice of it, as weights would have it."""
    where = [
        {(*s, int(g.topk_idx[row]) if case.expand else 0): row for row, s in enumerate(g.source)} for g in received
    ]
    given, terms = inputs[rank], []
    for token, chosen in enumerate(given.topk_idx):
        weights = [1.0] * len(chosen) if given.topk_weights is None else given.topk_weights[token].tolist()
        found: dict[tuple[int, int], Term] = {}
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            home, local = divmod(expert, case.local)
            row = where[home].get((rank, token, local if case.expand else 0)) if expert >= 0 else None
            at = (home, local if case.expand else -1)
            if row is not None:
                before = found[at].weight if at in found else 0.0
                found[at] = Term(outputs[home][row], home, at[1], before + weight)
        terms.append(list(found.values()))
    return Sums(terms, bias, given.topk_idx, case.ranks, rank, case.per_node or case.ranks, case.torch_dtype, False)


def of_packed(
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    packed: Sequence[RankPacked],
    outputs: Sequence[Tensor],
) -> Sums:
    """The terms of a low-latency combine."""
    given, terms = inputs[rank], []
    for token, chosen in enumerate(given.topk_idx):
        found = []
        for slot, expert in enumerate(chosen.tolist()):
            home, local = divmod(expert, case.local)
            if expert < 0:
                continue
            begin, count = divmod(int(packed[home].layout_range[local, rank]), 1 << 32)
            tokens = packed[home].src_info[local, begin : begin + count].tolist()
            if token in tokens:
                weight = 1.0 if given.topk_weights is None else float(given.topk_weights[token, slot])
                found.append(Term(outputs[home][local, begin + tokens.index(token)], home, expert, weight))
        terms.append(found)
    return Sums(terms, (), given.topk_idx, case.ranks, rank, case.ranks, case.torch_dtype, True)
