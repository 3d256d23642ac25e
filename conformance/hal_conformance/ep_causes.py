"""Likely causes of wrong expert-parallel results, each tried mechanically: what would have given just this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hal.reference import ep as oracle
from hal.reference.ep import RankInput, RankPacked, RankReceived
from hal_conformance.ep_case import EpCase
from hal_conformance.memory import bits

Source = tuple[int, int]

LAST_COLUMN: Final = "the last column of topk_idx is not looked at"
"""Seen in rows that do not come, or where a token's other choices bring it all the same in the experts it comes for."""


def equal(a: Any, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if not isinstance(a, Tensor) or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((bits(a.contiguous()) == bits(b.contiguous())).all())


def _key(row: Tensor) -> bytes:
    return bits(row.contiguous()).numpy().tobytes()


def _tokens(inputs: Sequence[RankInput]) -> dict[bytes, Source]:
    return {_key(row): (rank, token) for rank, given in enumerate(inputs) for token, row in enumerate(given.x)}


def of_received(
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    got: dict[str, Any],
    wants: Sequence[RankReceived],
    earlier: Sequence[RankInput],
    weighted: bool,
) -> str:
    """Why a normal dispatch is wrong."""
    want, x = wants[rank], got["x"]
    if not isinstance(x, Tensor) or x.dtype != want.x.dtype or x.dim() != 2:
        return ""
    if x.shape[1:] == want.x.shape[1:] and not equal(x, want.x):
        known = _tokens(inputs)
        zero = _key(inputs[0].x.new_zeros(case.hidden))
        found = [known.get(_key(row), (-1, -1) if _key(row) == zero else None) for row in x]
        return _rows(case, inputs, rank, x, want, found, earlier)
    if not equal(got["idx"], want.topk_idx):
        return _routes(case, inputs, rank, got["idx"], want)
    if want.scales is not None and not equal(got["scales"], want.scales):
        return _scales(got["scales"], want.scales) or _scales_elsewhere(got["scales"], inputs)
    if weighted and want.topk_weights is not None and not equal(got["weights"], want.topk_weights):
        if isinstance(got["weights"], Tensor) and not bool(got["weights"].any()):
            return "the weights do not travel along: they arrive as 0"
        return ""
    return _counts(case, got["counts"], want, wants)


def _rows(
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    x: Tensor,
    want: RankReceived,
    found: list[Source | None],
    earlier: Sequence[RankInput],
) -> str:
    expected = list(want.source)
    if earlier and None in found:
        before = _tokens(earlier)
        if all(source is not None or _key(row) in before for source, row in zip(found, x, strict=True)):
            return "a stale result: these are the rows of an earlier dispatch"
    if len(x) == len(want.x):
        changed = _recomputed(x, want.x)
        if changed:
            return changed
        width = (bits(x.contiguous()) != bits(want.x)).any(0).nonzero().flatten()
        tail = case.hidden - 16 // x.element_size()
        if len(width) and int(width[0]) >= tail:
            return "the last 16 bytes of a row are lost"
    if sorted(map(str, found)) == sorted(map(str, expected)):
        for name, key in _orders(rank, case.ranks):
            if not case.expand and [s for s in found if s is not None] == sorted(expected, key=key):
                return f"source order is wrong: rows lie {name}"
        return "the right rows in a wrong order"
    have = [s for s in found if s is not None and s[0] >= 0]
    missing = [s for s in expected if s not in have and s[0] >= 0]
    if missing and want.num_dropped and len(have) == len(expected):
        return "overflow drops other rows than the last ones"
    if missing:
        return _missing(case, inputs, rank, missing)
    extra = [s for s in have if s not in expected]
    if extra:
        if all(bool((inputs[s].topk_idx[t] < 0).any()) for s, t in extra):
            return "a hole (-1) is sent to an expert"
        return "tokens come to ranks none of their experts lives on"
    if any(have.count(s) > expected.count(s) for s in have):
        return "a token comes more than once: a row for every expert, or for every choice"
    return ""


def _recomputed(x: Tensor, want: Tensor) -> str:
    """Which numbers arithmetic changed that should only have been moved; empty if it was something else."""
    if x.element_size() == 1:
        return ""
    tiny = want.abs() < torch.finfo(torch.float32).tiny
    positive = want.where(want != 0, torch.zeros_like(want))
    for name, other in (
        ("-0 arrives as 0: rows are added, not moved", positive),
        ("denormal numbers arrive as 0: rows are computed with, not moved", want.where(~tiny, torch.zeros_like(want))),
        ("denormal numbers arrive as 0: rows are computed with, not moved", want.where(~tiny, want * 0)),
    ):
        # What arithmetic makes of a NaN is another NaN.
        if equal(x.masked_fill(x.isnan(), 0), other.masked_fill(other.isnan(), 0)):
            return name
    wrong = bits(x.contiguous()) != bits(want)
    if bool((wrong.sum(1) <= want.shape[1] // 8).all()):
        return f"rows come where they belong, and {int(wrong.sum())} of their elements are changed"
    return ""


def _orders(rank: int, ranks: int) -> Iterable[tuple[str, Callable[[Source], Any]]]:
    yield "by position, then source rank", lambda s: (s[1], s[0])
    yield "with this rank's own first", lambda s: (s[0] != rank, s)
    yield "from this rank on, around", lambda s: ((s[0] - rank) % ranks, s[1])
    yield "from the last rank to the first", lambda s: (-s[0], s[1])
    yield "from the last position of each source to the first", lambda s: (s[0], -s[1])


def _missing(case: EpCase, inputs: Sequence[RankInput], rank: int, missing: list[Source]) -> str:
    def duplicate(source: Source) -> bool:
        experts = [e for e in inputs[source[0]].topk_idx[source[1]].tolist() if e >= 0]
        return len(set(experts)) < len(experts)

    if all(s == rank for s, _ in missing):
        return "what a rank sends to itself is lost"
    if all(t == len(inputs[s].x) - 1 for s, t in missing):
        return "the last token of a rank is lost"
    if all(map(duplicate, missing)):
        return "tokens with duplicate experts are dropped"
    if all(bool((inputs[s].topk_idx[t] < 0).any()) for s, t in missing):
        return "tokens with a hole (-1) are dropped"
    local = case.local
    if all(rank * local <= int(inputs[s].topk_idx[t][-1]) < (rank + 1) * local for s, t in missing):
        return LAST_COLUMN
    return "rows are lost"


def _routes(case: EpCase, inputs: Sequence[RankInput], rank: int, idx: Any, want: RankReceived) -> str:
    right = want.topk_idx
    if not isinstance(idx, Tensor) or idx.shape != right.shape:
        return ""
    whole = right.where(right < 0, right + rank * case.local)
    if equal(idx, whole):
        return "expert ids are global: recv_topk_idx is not localised"
    if not case.expand:
        unseen = right.clone()
        unseen[:, -1] = -1
        if equal(idx, unseen):
            return LAST_COLUMN
        given = torch.stack([inputs[s].topk_idx[t] for s, t in want.source]) if want.source else right
        if equal(idx, given):
            return "topk_idx is passed on as it is: ids are global and experts elsewhere are not -1"
        if equal(idx, given.where(given < 0, given % case.local)):
            return "experts that live elsewhere are not -1"
        if equal(idx, right.clamp(min=0)):
            return "holes (-1) become expert 0"
    return ""


def _scales(got: Any, want: Tensor) -> str:
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return ""
    for shift, name in ((1, "the next"), (-1, "the previous")):
        if want.shape[1] > 1 and equal(got, want.roll(-shift, 1)):
            return f"scales of the neighbour: those of {name} group of columns"
        if len(want) > 1 and equal(got, want.roll(-shift, 0)):
            return f"scales of the neighbour: those of {name} row"
    if len(want) and not bool(got.any()):
        return "the scales do not travel along: they arrive as 0"
    if got.dtype == torch.float32 and want.dtype == torch.float32 and bool((got > 0).all()):
        if equal(got, 1 / want):
            return "the scales are reciprocals"
        power = torch.exp2(torch.ceil(torch.log2(want)))
        if equal(got, power) and not equal(want, power):
            return "scales are rounded to powers of two although round_scale is False"
        if equal(power, want) and bool((torch.frexp(got).mantissa != 0.5).any()):
            return "scales are no powers of two although round_scale is True"
        if equal(got, want / 2) or bool((got * 2 == want).any()):
            return "scales are rounded down to a power of two, not up"
    return ""


def _scales_elsewhere(got: Any, inputs: Sequence[RankInput]) -> str:
    rows = {_key(row) for given in inputs if given.scales is not None for row in given.scales}
    moved = isinstance(got, Tensor) and {_key(row) for row in got} <= rows
    return "scales of another row" if moved else ""


def _counts(case: EpCase, counts: list[int], want: RankReceived, wants: Sequence[RankReceived]) -> str:
    right = want.num_tokens_per_expert
    if counts == right:
        return ""
    padding = case.alignment
    known = dict.fromkeys(_swapped(counts, right, [w.num_tokens_per_expert for w in wants]), counts)
    if padding > 1:
        if len(counts) == len(right) and [-(-c // padding) * padding for c in counts] == right:
            known["counts are not rounded up to expert_alignment"] = counts
        known["alignment padding is counted twice"] = [r + padding for r in right]
        known["experts without tokens get a group of padding"] = [r or padding for r in right]
    # Of few tokens, several may explain the same.
    return ", or ".join(name for name, found in known.items() if found == counts)


def _swapped(counts: list[int], right: list[int], wants: Sequence[list[int]]) -> Iterable[str]:
    """Whose counts these are, if they are one rank's alone: zeros, as masked ranks have them, come from anywhere."""
    whose = [rank for rank, want in enumerate(wants) if want == counts]
    if len(whose) == 1 and counts != right and any(counts):
        yield f"counts are swapped between ranks: these are those of rank {whose[0]}"


def of_packed(
    case: EpCase, inputs: Sequence[RankInput], rank: int, got: dict[str, Any], wants: Sequence[RankPacked]
) -> str:
    """Why a low-latency dispatch is wrong."""
    want = wants[rank]
    count = got.get("recv_count")
    if not equal(count, want.count):
        if not isinstance(count, Tensor) or count.shape != want.count.shape:
            return ""
        for name in _swapped(count.tolist(), want.count.tolist(), [w.count.tolist() for w in wants]):
            return name
        if not bool(count.any()):
            return "recv_count is 0 for every expert"
        for name, changed in _changed(inputs):
            twin = oracle.low_latency_dispatch(changed, case.experts, case.most, cast=case.cast)[rank]
            if equal(count, twin.count):
                return name
        if equal(count, want.count - 1) or equal(count, want.count.clamp(max=case.ranks * case.most - 1)):
            return "capacity is off by one: the last slot is never used"
        return "recv_count is not the number of received rows"
    got_x, got_scales = got.get("recv_x"), got.get("recv_scales")
    where = [(e, n) for e, n in enumerate(want.count.tolist()) if n]
    if isinstance(got_scales, Tensor) and want.scales is not None and got_scales.shape == want.scales.shape:
        have = torch.cat([got_scales[e, :n] for e, n in where]) if where else got_scales[0, :0]
        right = torch.cat([want.scales[e, :n] for e, n in where]) if where else want.scales[0, :0]
        if not equal(have, right):
            return _scales(have, right)
    if isinstance(got_x, Tensor) and got_x.shape == want.x.shape and got_x.dtype == want.x.dtype:
        have, right = (torch.cat([t[e, :n] for e, n in where]) if where else t[0, :0] for t in (got_x, want.x))
        if not equal(have, right):
            wrong = (bits(have) != bits(right)).any(0).nonzero().flatten()
            if int(wrong[0]) >= case.hidden - 16 // have.element_size():
                return "the last 16 bytes of a row are lost"
            if sorted(map(_key, have)) == sorted(map(_key, right)):
                return "source order is wrong: the rows of an expert do not lie by source rank and position"
            if case.cast != "none":
                return "values are not multiplied by 448 / amax of their group of 128 columns, or rounded otherwise"
        if not equal(got.get("src_info"), want.src_info):
            return "src_info is not the position at the source"
    ranges = got.get("layout_range")
    if isinstance(ranges, Tensor) and ranges.shape == want.layout_range.shape and not equal(ranges, want.layout_range):
        # begin << 32 | count
        if equal(ranges & 0xFFFFFFFF, want.layout_range & 0xFFFFFFFF):
            return "source order is wrong: by layout_range a rank's rows do not begin where those of lower ranks end"
        return "layout_range does not tell how many rows come from each rank"
    return ""


def _changed(inputs: Sequence[RankInput]) -> Iterable[tuple[str, list[RankInput]]]:
    def routed(change: Callable[[Tensor], Tensor]) -> list[RankInput]:
        return [RankInput(g.x, change(g.topk_idx.clone()), g.topk_weights, g.scales) for g in inputs]

    def no_duplicates(idx: Tensor) -> Tensor:
        for row in idx:
            real = [e for e in row.tolist() if e >= 0]
            if len(set(real)) < len(real):
                row[:] = -1
        return idx

    def no_last(idx: Tensor) -> Tensor:
        idx[-1:] = -1
        return idx

    yield "tokens with duplicate experts are dropped", routed(no_duplicates)
    yield "holes (-1) are sent to expert 0", routed(lambda idx: idx.clamp(min=0))
    yield "the last token of a rank is lost", routed(no_last)
