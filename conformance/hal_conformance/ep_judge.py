"""Compares what ranks received with the oracle, bit for bit, and says where they part: rank, row, token, columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hal.reference import ep as oracle
from hal.reference.ep import RankInput, RankPacked, RankReceived
from hal_conformance import ep_causes
from hal_conformance.context import Context
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_sums import Sums
from hal_conformance.limits import number
from hal_conformance.memory import bits

Where = Callable[[int], str]


def plain(tensor: Tensor) -> Tensor:
    """Contiguous integers with the same bits."""
    return bits(tensor.contiguous())


def differ(name: str, got: Any, want: Tensor | None, where: Where) -> str:
    """How a tensor differs from what it must be; empty if it does not. The first dimension is rows."""
    if want is None or not isinstance(got, Tensor):
        return "" if want is None and got is None else f"{name} is {_kind(got)} instead of {_kind(want)}"
    if got.dtype != want.dtype:
        return f"{name} has dtype {got.dtype} instead of {want.dtype}"
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)} instead of {list(want.shape)}{_first(got, want, where)}"
    wrong = plain(got) != plain(want)
    if not bool(wrong.any()):
        return ""
    flat = wrong.reshape(len(wrong), -1)
    rows = flat.any(1).nonzero().flatten().tolist()
    row = rows[0]
    columns = flat[row].nonzero().flatten().tolist()
    at = f"{columns[0]}…{columns[-1]}" if len(columns) > 1 else str(columns[0])
    have, right = (t.reshape(len(wrong), -1)[row].double() for t in (got, want))
    off = (have - right).abs()
    first = columns[0]
    return (
        f"{name} differs in {len(rows)} of {len(wrong)} rows, first in row {row} ({where(row)}), "
        f"columns {at} of {flat.shape[1]}: {number(float(have[first]))} instead of {number(float(right[first]))}"
        + (f", off by at most {number(float(off.max()))}" if bool(off.isfinite().all()) else "")
    )


def _first(got: Tensor, want: Tensor, where: Where) -> str:
    """Where rows part, if there are only more or fewer of them."""
    if got.shape[1:] != want.shape[1:]:
        return ""
    common = min(len(got), len(want))
    unequal = plain(got[:common]) != plain(want[:common])
    rows = unequal.flatten(1).any(1) if unequal.dim() > 1 else unequal
    wrong = rows.nonzero().flatten().tolist()
    row = wrong[0] if wrong else common
    return f", first different in row {row} ({where(row)})" if row < len(want) else f", more rows from row {row} on"


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a tensor" if isinstance(value, Tensor) else repr(value)


def token_of(source: Sequence[tuple[int, int]]) -> Where:
    """Names the token that a received row is."""

    def where(row: int) -> str:
        rank, token = source[row]
        return "padding" if rank < 0 else f"token {token} of rank {rank}"

    return where


def note(context: Context, rank: int, what: str, problems: list[str], cause: Callable[[], str]) -> bool:
    """Note problems of one rank, the cause only of the first; whether there were none."""
    found = [text for text in problems if text]
    for text in found:
        context.problem(f"rank {rank}, {what}: {text}")
    if found and context.record.diagnosis is None and context.wants_diagnosis:
        context.record.diagnosis = {"cause": cause()}
    return not found


def received(
    context: Context,
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    got: dict[str, Any],
    wants: Sequence[RankReceived],
    what: str = "dispatch",
    *,
    weights: bool = True,
    earlier: Sequence[RankInput] = (),
) -> bool:
    """One rank's normal dispatch."""
    want = wants[rank]
    rows = len(want.x)
    where = token_of(want.source)
    x, idx, scales, heavy = (got.get(k) for k in ("recv_x", "recv_topk_idx", "recv_scales", "recv_topk_weights"))
    problems = []
    if case.worst:
        if not isinstance(x, Tensor) or len(x) != case.worst or not isinstance(idx, Tensor) or len(idx) != case.worst:
            problems.append(f"recv_x has not num_worst_tokens = {case.worst} rows")
        else:
            chosen = idx[rows:] != -1
            past = (chosen.flatten(1).any(1) if chosen.dim() > 1 else chosen).nonzero().flatten().tolist()
            if past:
                problems.append(f"recv_topk_idx is not -1 in row {rows + past[0]}, past the last received one")
        for name, beside in (("the scales", scales), ("recv_topk_weights", heavy)):
            if isinstance(beside, Tensor) and len(beside) != case.worst:
                problems.append(f"{name} have {len(beside)} rows, not num_worst_tokens = {case.worst}")
        x, idx, scales, heavy = (t[:rows] if isinstance(t, Tensor) else t for t in (x, idx, scales, heavy))
    problems.append(differ("recv_x", x, want.x, where))
    if want.scales is not None:
        problems.append(differ("the scales", scales, want.scales, where))
    problems.append(differ("recv_topk_idx", idx, want.topk_idx, where))
    if weights:
        problems.append(differ("recv_topk_weights", heavy, want.topk_weights, where))
    counts = list(got.get("num_recv_tokens_per_expert") or ())
    right = [] if case.worst else want.num_tokens_per_expert
    if counts != right:
        problems.append(_counted(counts, right))
    if got.get("num_dropped") != want.num_dropped:
        problems.append(f"num_dropped is {got.get('num_dropped')} instead of {want.num_dropped}")
    seen = {"x": x, "idx": idx, "scales": scales, "weights": heavy, "counts": counts}
    return note(
        context, rank, what, problems, lambda: ep_causes.of_received(case, inputs, rank, seen, wants, earlier, weights)
    )


def laid_out(context: Context, case: EpCase, given: RankInput, rank: int, got: dict[str, Any]) -> bool:
    """What `EpBuffer.layout` told one rank."""
    want = oracle.layout(given.topk_idx, case.experts, case.ranks, case.per_node)
    names = ("num_tokens_per_rank", "num_tokens_per_node", "num_tokens_per_expert", "is_token_in_rank")
    texts = [differ(name, got.get(name), getattr(want, name), lambda row: f"entry {row}") for name in names]
    return note(context, rank, "layout", texts, lambda: "")


def _told(case: EpCase, inputs: Sequence[RankInput], want: RankReceived, rank: int) -> dict[str, Tensor]:
    """What the handle of one rank's normal dispatch tells, by `hal_conformance.ep.TOLD`."""
    source = list(want.source)
    source += [(-1, -1)] * ((case.worst or len(source)) - len(source))
    local, first = case.local, rank * case.local
    experts = want.topk_idx.tolist() if case.expand else []
    choices = []
    for row, (sender, token) in enumerate(source):
        chosen = inputs[sender].topk_idx[token].tolist() if sender >= 0 else []
        mine = [e == first + experts[row] if case.expand else first <= e < first + local for e in chosen]
        choices.append(mine.index(True) if any(mine) else -1)
    counts = torch.zeros(case.ranks, local, dtype=torch.int32)
    for sender, token in {at for at in source if at[0] >= 0}:
        for expert in oracle.experts_of(inputs[sender].topk_idx[token]):
            if expert // local == rank:
                counts[sender, expert % local] += 1
    sent = torch.zeros(case.ranks, case.ranks, dtype=torch.int32)
    for sender, given in enumerate(inputs):
        for row_of_experts in given.topk_idx:
            sent[sender, oracle.ranks_of(row_of_experts, local)] += 1
    return {
        "recv_src_rank": torch.tensor([s for s, _ in source], dtype=torch.int32),
        "recv_src_position": torch.tensor([t for _, t in source], dtype=torch.int32),
        "recv_src_choice": torch.tensor(choices, dtype=torch.int32),
        "recv_counts": counts,
        "sent_counts": sent,
    }


def handle_told(
    context: Context,
    case: EpCase,
    inputs: Sequence[RankInput],
    wants: Sequence[RankReceived],
    rank: int,
    got: dict[str, Any],
    what: str,
    absent: Collection[int] = (),
) -> None:
    """What the handle of one rank's normal dispatch told; of tokens sent to masked ranks nobody says how many."""
    want = _told(case, inputs, wants[rank], rank)
    sent = got.get("sent_counts")
    if absent and isinstance(sent, Tensor) and sent.shape == want["sent_counts"].shape:
        there = torch.tensor([r not in absent for r in range(case.ranks)])
        want["sent_counts"][~there], got = 0, {**got, "sent_counts": sent * there}
        want["sent_counts"][:, ~there] = 0
    texts = [differ(name, got.get(name), right, lambda row: f"entry {row}") for name, right in want.items()]
    note(context, rank, f"what the handle of {what} tells", texts, lambda: "")


def combined(
    context: Context,
    rank: int,
    got: dict[str, Any],
    want: tuple[Tensor, Tensor | None],
    sums: Sums,
    what: str = "combine",
) -> bool:
    """One rank's combine of either mode."""

    def where(row: int) -> str:
        return f"token {row} of rank {rank}, experts {sums.experts(row)}"

    # Which NaN a sum is, nobody says.
    have, right = (_one_nan(one) for one in (got.get("combined_x"), want[0]))
    problems = [differ("combined_x", have, right, where)]
    if want[1] is not None:
        problems.append(differ("combined_topk_weights", got.get("combined_topk_weights"), want[1], where))
    return note(context, rank, what, problems, lambda: sums.cause(got.get("combined_x"), want[0]))


def _one_nan(tensor: Any) -> Any:
    return tensor.masked_fill(tensor.isnan(), torch.nan) if isinstance(tensor, Tensor) else tensor


def packed(
    context: Context,
    case: EpCase,
    inputs: Sequence[RankInput],
    rank: int,
    got: dict[str, Any],
    wants: Sequence[RankPacked],
    what: str = "low_latency_dispatch",
) -> bool:
    """One rank's low-latency dispatch: counts, ranges, and of every expert the rows that count."""
    want = wants[rank]

    def expert(row: int) -> str:
        return f"expert {rank * case.local + row}"

    problems = [
        differ("recv_count", got.get("recv_count"), want.count, expert),
        differ("layout_range", got.get("layout_range"), want.layout_range, expert),
    ]
    pairs = [("recv_x", want.x), ("src_info", want.src_info)]
    if want.scales is not None:
        pairs.insert(1, ("recv_scales", want.scales))
    for name, right in pairs:
        have = got.get(name)
        if not isinstance(have, Tensor) or have.shape != right.shape or have.dtype != right.dtype:
            problems.append(differ(name, have, right, expert))
            continue
        for local, count in enumerate(want.count.tolist()):
            source = _sources(want, local)
            text = differ(name, have[local, :count], right[local, :count], token_of(source))
            if text:
                problems.append(f"expert {rank * case.local + local} (local {local}): {text}")
                break
    strides = got.get("scales_strides")
    if (
        want.scales is not None
        and strides
        and want.scales.shape[1] > 1
        and want.scales.shape[2] > 1
        and strides[1] != 1
    ):
        problems.append(f"the scales have strides {strides}; rows are to be contiguous (stride 1)")
    return note(context, rank, what, problems, lambda: ep_causes.of_packed(case, inputs, rank, got, wants))


def _sources(want: RankPacked, local: int) -> list[tuple[int, int]]:
    """Source rank and token of the rows of a local expert."""
    found = []
    for source, packed_range in enumerate(want.layout_range[local].tolist()):
        begin, count = packed_range >> 32, packed_range & 0xFFFFFFFF
        found += [(source, int(token)) for token in want.src_info[local, begin : begin + count]]
    return found


def _counted(counts: list[int], want: list[int]) -> str:
    """What is wrong with counts; where they are too many to compare by eye, the first that differ."""
    name = "num_recv_tokens_per_expert"
    if len(want) <= 16 or len(counts) != len(want):
        return f"{name} is {counts} instead of {want}"
    wrong = [local for local in range(len(want)) if counts[local] != want[local]]
    shown = ", ".join(f"{counts[local]} instead of {want[local]} for local expert {local}" for local in wrong[:3])
    return f"{name} differs for {len(wrong)} of {len(want)} experts: {shown}"


def recv_stats(context: Context, rank: int, got: dict[str, Any], want: Tensor) -> None:
    """Note where the statistics of received counts are not what was there and the counts."""
    name = "cumulative_local_expert_recv_stats"
    text = differ(name, got.get(name), want, lambda e: f"local expert {e}")
    note(context, rank, "statistics", [text], lambda: "counts are stored, not added, or added more than once")


def written(context: Context, rank: int, got: dict[str, Any]) -> None:
    """Note where the sums of a low-latency combine are not in the ``out`` it was given."""
    if got["combined_x"].shape == got["out"].shape:
        text = differ("out", got["out"], got["combined_x"], lambda t: f"token {t}")
        note(context, rank, "out", [text], lambda: "the result is not written to the given out")


def same(context: Context, rank: int, what: str, got: Any, first: Any) -> bool:
    """Two results of the backend that must have the same bits."""
    text = differ(what, got, first, lambda row: f"row {row}")
    if text:
        context.problem(f"rank {rank}: {text} (first run)")
    return not text


def padded(rows: Tensor, count: int) -> Tensor:
    """Rows with zeros after them, so many in all."""
    whole = rows.new_zeros(count, *rows.shape[1:])
    whole[: len(rows)] = rows
    return whole
