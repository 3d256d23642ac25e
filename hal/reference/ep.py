"""The single-process oracle of expert-parallel communication.

Given what every rank passes in, it says exactly what every rank must receive and what combine must return. Bits are
meant: moved rows are copied, and sums are float32 additions in a stated order, so a port is compared with
``torch.equal``.

Symbols as in `hal.spec.ep`. Lists have one entry a rank; a rank in ``absent`` sends nothing, receives nothing and
gives nothing back, as a masked one does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hal.spec.ep import FP8, SCALE_GROUP, EpLayout

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

AMAX_FLOOR = 1e-4
"""A group of columns whose largest magnitude is smaller is scaled as if it were this."""


@dataclass(frozen=True, slots=True, eq=False)
class RankInput:
    """What one rank passes to dispatch.

    Attributes
    ----------
    x : Tensor
        [n, H]
    topk_idx : Tensor
        [n, K] int64, -1 is no expert.
    topk_weights : Tensor or None
        [n, K] float32.
    scales : Tensor or None
        [n, scales a row], travels with x.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RankReceived:
    """What one rank must receive from a normal dispatch.

    Attributes
    ----------
    x, scales : Tensor, Tensor or None
        [rows, H] and [rows, scales a row]; zero in padding rows.
    topk_idx : Tensor
        [rows, K] local ids or -1; in the expand layout [rows] the row's local expert, -1 for padding.
    topk_weights : Tensor or None
        float32 like topk_idx, 0 where that is -1.
    num_tokens_per_expert : list of int
        L counts, rounded up to the alignment.
    source : list of (int, int)
        Source rank and source position of each row, (-1, -1) for padding.
    num_dropped : int
        Rows left out because the rank had no room.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None
    num_tokens_per_expert: list[int]
    source: list[tuple[int, int]]
    num_dropped: int


@dataclass(frozen=True, slots=True, eq=False)
class RankPacked:
    """What one rank must receive from a low-latency dispatch.

    Rows past the count, and src_info there, are undefined; the oracle leaves zeros and -1.

    Attributes
    ----------
    x, scales : Tensor, Tensor or None
        [L, R · M, H] and [L, R · M, scales a row].
    count : Tensor
        [L] int32.
    src_info : Tensor
        [L, R · M] int32, source position of each row.
    layout_range : Tensor
        [L, R] int64, ``begin << 32 | count``.
    """

    x: Tensor
    scales: Tensor | None
    count: Tensor
    src_info: Tensor
    layout_range: Tensor


def local_experts(num_experts: int, num_ranks: int) -> int:
    """L: experts a rank; the last ranks may have experts that do not exist."""
    return -(-num_experts // num_ranks)


def experts_of(row: Tensor) -> list[int]:
    """The distinct experts of one token in top-k order, holes left out."""
    return list(dict.fromkeys(e for e in row.tolist() if e >= 0))


def ranks_of(row: Tensor, num_local: int) -> list[int]:
    """The distinct ranks of one token in top-k order."""
    return list(dict.fromkeys(e // num_local for e in experts_of(row)))


def layout(topk_idx: Tensor, num_experts: int, num_ranks: int, ranks_per_node: int | None = None) -> EpLayout:
    """Count where the tokens of one rank go.

    Parameters
    ----------
    topk_idx : Tensor
        [n, K] int64.
    num_experts, num_ranks : int
    ranks_per_node : int or None
        None: one node.

    Returns
    -------
    EpLayout
        Tokens per rank [R], per node [nodes] (None for one node), per expert [E], and membership [n, R].
    """
    num_local = local_experts(num_experts, num_ranks)
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    nodes = -(-num_ranks // per_node)
    in_rank = torch.zeros(len(topk_idx), num_ranks, dtype=torch.bool)
    in_node = torch.zeros(len(topk_idx), nodes, dtype=torch.bool)
    per_expert = torch.zeros(num_experts, dtype=torch.int32)
    for token, row in enumerate(topk_idx):
        for expert in experts_of(row):
            rank = expert // num_local
            in_rank[token, rank] = True
            in_node[token, rank // per_node] = True
            per_expert[expert] += 1
    return EpLayout(
        in_rank.sum(0, dtype=torch.int32),
        in_node.sum(0, dtype=torch.int32) if nodes > 1 else None,
        per_expert,
        in_rank,
    )


def dispatch(
    inputs: Sequence[RankInput],
    num_experts: int,
    *,
    expand: bool = False,
    expert_alignment: int = 1,
    max_recv_tokens: int | None = None,
    absent: Collection[int] = (),
) -> list[RankReceived]:
    """Send every token to the ranks of its experts.

    A token goes to a rank once however many of its experts live there. Rows arrive by source rank, then by source
    position. With ``expand`` there is a row for every distinct (token, local expert), grouped by expert, each group
    padded with zero rows to the alignment; its weight is the sum of the token's weights for that expert.

    Parameters
    ----------
    inputs : sequence of RankInput
        One a rank.
    num_experts : int
    expand : bool
    expert_alignment : int
    max_recv_tokens : int or None
        Room of a rank in rows; those that come last, in the order of source rank and position, are dropped.
    absent : collection of int
        Masked ranks.
    """
    return [
        _receive(inputs, rank, num_experts, expand, expert_alignment, max_recv_tokens, absent)
        for rank in range(len(inputs))
    ]


def _receive(
    inputs: Sequence[RankInput],
    rank: int,
    num_experts: int,
    expand: bool,
    alignment: int,
    room: int | None,
    absent: Collection[int],
) -> RankReceived:
    num_local = local_experts(num_experts, len(inputs))
    arrived = [
        (source, token)
        for source, given in enumerate(inputs)
        for token, row in enumerate(given.topk_idx)
        if rank in ranks_of(row, num_local) and source not in absent and rank not in absent
    ]
    kept = arrived if room is None else arrived[:room]
    members: list[list[tuple[int, int]]] = [[] for _ in range(num_local)]
    for source, token in kept:
        for expert in experts_of(inputs[source].topk_idx[token]):
            if expert // num_local == rank:
                members[expert % num_local].append((source, token))
    counts = [-(-len(group) // alignment) * alignment for group in members]
    padding = (-1, -1)
    if expand:
        rows = [at for g, n in zip(members, counts, strict=True) for at in g + [padding] * (n - len(g))]
        expert_of_row = [e for e, n in enumerate(counts) for _ in range(n)]
    else:
        rows, expert_of_row = kept, []

    first = inputs[0]
    topk = first.topk_idx.shape[1]
    weighted = first.topk_weights is not None
    x = first.x.new_zeros(len(rows), first.x.shape[1])
    scales = None if first.scales is None else first.scales.new_zeros(len(rows), first.scales.shape[1])
    shape = (len(rows),) if expand else (len(rows), topk)
    idx = torch.full(shape, -1, dtype=torch.int64)
    weights = torch.zeros(shape, dtype=torch.float32)
    for at, (source, token) in enumerate(rows):
        if (source, token) == padding:
            continue
        given = inputs[source]
        x[at] = given.x[token]
        if scales is not None and given.scales is not None:
            scales[at] = given.scales[token]
        for slot, expert in enumerate(given.topk_idx[token].tolist()):
            if expert < 0 or expert // num_local != rank:
                continue
            local = expert % num_local
            if not expand:
                idx[at, slot] = local
                if given.topk_weights is not None:
                    weights[at, slot] = given.topk_weights[token, slot]
            elif local == expert_of_row[at]:
                idx[at] = local
                if given.topk_weights is not None:
                    weights[at] += given.topk_weights[token, slot]
    return RankReceived(x, scales, idx, weights if weighted else None, counts, rows, len(arrived) - len(kept))


def combine(
    outputs: Sequence[Tensor],
    received: Sequence[RankReceived],
    inputs: Sequence[RankInput],
    num_experts: int,
    *,
    expand: bool = False,
    topk_weights: Sequence[Tensor] | None = None,
    bias: Sequence[Sequence[Tensor]] | None = None,
    ranks_per_node: int | None = None,
    absent: Collection[int] = (),
) -> list[tuple[Tensor, Tensor | None]]:
    """Sum the rows sent back, unweighted, in float32 and in a fixed order.

    For each token the sum starts from the bias (the second added to the first; 0 without), and takes the rows in the
    order in which their ranks, or in the expand layout their experts, first appear in the token's top-k. Where nodes
    pre-reduce, each node's rows are summed in that order from 0, and the node sums are added in the order in which the
    nodes first appear in the token's top-k, whether or not that row came. The result is rounded once to the element
    type.

    Parameters
    ----------
    outputs : sequence of Tensor
        For each rank [rows, H]: what its experts made of the received rows.
    received : sequence of RankReceived
        What `dispatch` returned.
    inputs : sequence of RankInput
        What it was given.
    num_experts : int
    expand : bool
        As in the dispatch.
    topk_weights : sequence of Tensor or None
        For each rank float32 [rows, K], or [rows] in the expand layout: sent back beside the rows.
    bias : sequence of sequences of Tensor or None
        For each rank none, one or two [n, H].
    ranks_per_node : int or None
        Node size where nodes pre-reduce; None sums flat.
    absent : collection of int
        Masked ranks: their rows are left out.

    Returns
    -------
    list of (Tensor, Tensor or None)
        For each rank [n, H] and the summed weights [n, K].
    """
    num_local = local_experts(num_experts, len(inputs))
    where: list[dict[tuple[int, int, int], int]] = []
    for got in received:
        place = {}
        for row, (source, token) in enumerate(got.source):
            local = int(got.topk_idx[row]) if expand else 0
            place[source, token, local] = row
        where.append(place)

    def rows_of(source: int, token: int) -> list[tuple[int, int, int]]:
        """(rank, row at that rank, local expert) in order of summation."""
        found = []
        chosen = inputs[source].topk_idx[token]
        if expand:
            wanted = [(e // num_local, e % num_local) for e in experts_of(chosen)]
        else:
            wanted = [(rank, 0) for rank in ranks_of(chosen, num_local)]
        for rank, local in wanted:
            row = where[rank].get((source, token, local))
            if row is not None and rank not in absent:
                found.append((rank, row, local))
        return found

    results: list[tuple[Tensor, Tensor | None]] = []
    for source, given in enumerate(inputs):
        n, topk = given.topk_idx.shape
        out = outputs[source].new_zeros(n, outputs[source].shape[1])
        weights = None if topk_weights is None else torch.zeros(n, topk, dtype=torch.float32)
        for token in range(n if source not in absent else 0):
            total = torch.zeros(out.shape[1], dtype=torch.float32)
            for one in bias[source] if bias is not None else ():
                total = total + one[token].float()
            rows = rows_of(source, token)
            if ranks_per_node is None:
                for rank, row, _ in rows:
                    total = total + outputs[rank][row].float()
            else:
                chosen = ranks_of(given.topk_idx[token], num_local)
                for node in dict.fromkeys(rank // ranks_per_node for rank in chosen):
                    part = torch.zeros_like(total)
                    for rank, row, _ in rows:
                        if rank // ranks_per_node == node:
                            part = part + outputs[rank][row].float()
                    total = total + part
            out[token] = total.to(out.dtype)
            if weights is None or topk_weights is None:
                continue
            for rank, row, local in rows:
                if not expand:
                    weights[token] += topk_weights[rank][row]
                    continue
                for slot, expert in enumerate(given.topk_idx[token].tolist()):
                    if expert == rank * num_local + local:
                        weights[token, slot] = topk_weights[rank][row]
        results.append((out, weights))
    return results


def fp8_cast(x: Tensor, cast: str) -> tuple[Tensor, Tensor]:
    """Quantise rows to float8_e4m3fn, one scale for every 128 columns.

    The scale is amax / 448 with amax at least 1e-4, computed as amax times the float32 reciprocal of 448; values are
    multiplied by 448 / amax. With ``fp8_pow2`` the scale is rounded up to a power of two, and ``fp8_ue8m0`` also
    packs the exponents, four a little-endian int32.

    Parameters
    ----------
    x : Tensor
        [n, H].
    cast : str
        ``fp8``, ``fp8_pow2`` or ``fp8_ue8m0``.

    Returns
    -------
    rows : Tensor
        [n, H] float8_e4m3fn.
    scales : Tensor
        [n, G] float32 with G = ceil(H / 128), or [n, ceil(G / 4)] int32.
    """
    n, hidden = x.shape
    groups = -(-hidden // SCALE_GROUP)
    padded = torch.zeros(n, groups * SCALE_GROUP, dtype=torch.float32)
    padded[:, :hidden] = x.float()
    tiles = padded.view(n, groups, SCALE_GROUP)
    amax = tiles.abs().amax(2).clamp(min=AMAX_FLOOR)
    scale = amax * (torch.tensor(1.0, dtype=torch.float32) / FP8_MAX)
    inverse = torch.full_like(amax, FP8_MAX) / amax  # a scalar numerator would be rounded twice
    if cast != "fp8":
        mantissa, exponent = torch.frexp(scale)
        exponent = exponent - (mantissa == 0.5).int()
        scale = torch.ldexp(torch.ones_like(scale), exponent)
        inverse = torch.ldexp(torch.ones_like(scale), -exponent)
    rows = (tiles * inverse[:, :, None]).view(n, groups * SCALE_GROUP)[:, :hidden].to(FP8)
    if cast != "fp8_ue8m0":
        return rows, scale
    packed = torch.zeros(n, -(-groups // 4), 4, dtype=torch.uint8)
    packed.view(n, packed.shape[1] * 4)[:, :groups] = (exponent + 127).to(torch.uint8)
    return rows, packed.view(torch.int32).squeeze(2)


def low_latency_dispatch(
    inputs: Sequence[RankInput],
    num_experts: int,
    max_tokens_per_rank: int,
    *,
    cast: str = "none",
    absent: Collection[int] = (),
) -> list[RankPacked]:
    """Send every token to its experts' packed slots.

    A row for every distinct (token, expert). The rows of a local expert are contiguous from 0, by source rank, then by
    source position.

    Parameters
    ----------
    inputs : sequence of RankInput
        One a rank; only x and topk_idx are used.
    num_experts, max_tokens_per_rank : int
        E and M.
    cast : str
        Member of `hal.spec.ep.CASTS`.
    absent : collection of int
        Masked ranks.
    """
    num_ranks = len(inputs)
    num_local = local_experts(num_experts, num_ranks)
    slots = num_ranks * max_tokens_per_rank
    cast_rows = [(given.x, None) if cast == "none" else fp8_cast(given.x, cast) for given in inputs]
    results = []
    for rank in range(num_ranks):
        sample, sample_scales = cast_rows[rank]
        x = sample.new_zeros(num_local, slots, sample.shape[1])
        scales = None if sample_scales is None else sample_scales.new_zeros(num_local, slots, sample_scales.shape[1])
        count = torch.zeros(num_local, dtype=torch.int32)
        src_info = torch.full((num_local, slots), -1, dtype=torch.int32)
        ranges = torch.zeros(num_local, num_ranks, dtype=torch.int64)
        for local in range(num_local):
            at = 0
            for source, given in enumerate(inputs):
                begin = at
                for token, row in enumerate(given.topk_idx):
                    if source in absent or rank in absent or rank * num_local + local not in experts_of(row):
                        continue
                    rows, row_scales = cast_rows[source]
                    x[local, at] = rows[token]
                    if scales is not None and row_scales is not None:
                        scales[local, at] = row_scales[token]
                    src_info[local, at] = token
                    at += 1
                ranges[local, source] = begin << 32 | (at - begin)
            count[local] = at
        results.append(RankPacked(x, scales, count, src_info, ranges))
    return results


def low_latency_combine(
    outputs: Sequence[Tensor],
    packed: Sequence[RankPacked],
    inputs: Sequence[RankInput],
    *,
    absent: Collection[int] = (),
) -> list[Tensor]:
    """Sum the rows sent back, each times its weight, in float32 and in top-k order.

    Product and sum are rounded separately. An expert chosen twice gives its one row twice, each time with the weight of
    that choice.

    Parameters
    ----------
    outputs : sequence of Tensor
        For each rank [L, R · M, H].
    packed : sequence of RankPacked
        What `low_latency_dispatch` returned.
    inputs : sequence of RankInput
        With topk_weights.
    absent : collection of int
        Masked ranks: their rows are left out.

    Returns
    -------
    list of Tensor
        For each rank [n, H].
    """
    results = []
    for source, given in enumerate(inputs):
        assert given.topk_weights is not None
        out = outputs[source].new_zeros(len(given.topk_idx), outputs[source].shape[2])
        for token, row in enumerate(given.topk_idx if source not in absent else ()):
            total = torch.zeros(out.shape[1], dtype=torch.float32)
            for slot, expert in enumerate(row.tolist()):
                num_local = len(packed[0].count)
                rank, local = divmod(expert, num_local)
                if expert < 0 or rank in absent:
                    continue
                value = int(packed[rank].layout_range[local, source])
                begin, count = value >> 32, value & 0xFFFFFFFF
                at = begin + packed[rank].src_info[local, begin : begin + count].tolist().index(token)
                total = total + given.topk_weights[token, slot] * outputs[rank][local, at].float()
            out[token] = total.to(out.dtype)
        results.append(out)
    return results
