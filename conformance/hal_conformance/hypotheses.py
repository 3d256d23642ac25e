"""Wrong references: decode in float64 with one thing changed, each a bug ports really have.

A hypothesis explains a wrong result if the reference, changed in that way, gives it. `diagnosis` tries them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hal_conformance.inputs import Inputs

INF = torch.inf


@dataclass(frozen=True, slots=True)
class Variant:
    """The knobs of the changed reference. Every default is the specification.

    Attributes
    ----------
    scale : callable or None
        From the right scale to the wrong one.
    seen : callable or None
        From (length, s_q, query, right count) to the wrong number of keys seen.
    keep : callable or None
        From length to the positions kept; for keys that are lost.
    table : str
        ``memory``: pages in the order they lie in memory. ``entry0``: pages follow the first one.
    length_of : callable or None
        From all lengths and a sequence to the length it uses.
    kv_head : callable or None
        From (head, group, h_kv) to the KV head.
    values_from : int
        First column of V.
    score_columns : callable or None
        From (d, d_v) to the slice of columns that enter the scores.
    lse : callable or None
        From (maximum, sum, lse) to the wrong lse.
    combine : str
        ``average``: parts of 128 keys are averaged instead of merged.
    """

    scale: Callable[[float, int, int], float] | None = None
    seen: Callable[[int, int, int, int], int] | None = None
    keep: Callable[[int], Tensor] | None = None
    table: str = ""
    length_of: Callable[[tuple[int, ...], int], int] | None = None
    kv_head: Callable[[int, int, int], int] | None = None
    values_from: int = 0
    score_columns: Callable[[int, int], slice] | None = None
    lse: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    unnormalised: bool = False
    lowered: bool = False


def attend(inputs: Inputs, variant: Variant) -> tuple[Tensor, Tensor] | None:
    """The changed reference: out and lse in the layouts of `hal.mla_decode`, or None where it makes no sense."""
    case = inputs.case
    right_scale = case.d**-0.5 if case.scale is None else case.scale
    scale = variant.scale(right_scale, case.d, case.d_v) if variant.scale else right_scale
    outs, lses = [], []
    for j, count in enumerate(case.queries):
        length = variant.length_of(case.lengths, j) if variant.length_of else case.lengths[j]
        table = _table(inputs, variant.table)
        if length > table.shape[1] * case.page or length > case.lengths[j]:
            return None
        keys = inputs.keys(j, length, table)
        positions = torch.arange(length) if variant.keep is None else variant.keep(length)
        out, lse = _sequence(inputs, variant, j, count, keys, positions, scale)
        outs.append(out)
        lses.append(lse)
    if case.lse_base == "2":
        lses = [lse / math.log(2) for lse in lses]
    if not outs:
        return None
    if case.q_lens is None:
        return torch.stack(outs), torch.stack(lses).transpose(-1, -2)
    return torch.cat(outs), torch.cat(lses).transpose(0, 1)


def _table(inputs: Inputs, how: str) -> Tensor:
    table = inputs.table
    blocks = inputs.kv_cache.view.shape[0]
    if how == "entry0":
        return (table[:, :1].clamp(0, blocks - 1) + torch.arange(table.shape[1])) % blocks
    if how == "memory":
        counts = [-(-n // inputs.case.page) for n in inputs.case.lengths]
        starts = [sum(counts[:j]) for j in range(len(counts))]
        return (torch.tensor(starts).view(-1, 1) + torch.arange(table.shape[1])) % blocks
    return table


def _sequence(
    inputs: Inputs, variant: Variant, j: int, count: int, keys: Tensor, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    case = inputs.case
    group = case.h_q // case.h_kv
    q = inputs.queries(j)
    out = torch.zeros(count, case.h_q, case.d_v, dtype=torch.float64)
    lse = torch.full((count, case.h_q), INF, dtype=torch.float64)
    columns = variant.score_columns(case.d, case.d_v) if variant.score_columns else slice(None)
    first = variant.values_from if variant.values_from >= 0 else case.d - case.d_v
    heads_of: dict[int, list[int]] = {}
    for h in range(case.h_q):
        heads_of.setdefault(variant.kv_head(h, group, case.h_kv) if variant.kv_head else h // group, []).append(h)
    for i in range(count):
        seen = len(keys) - count + i + 1 if case.causal else len(keys)
        seen = max(0, variant.seen(len(keys), count, i, seen) if variant.seen else seen)
        kept = positions[positions < seen]
        if not len(kept):
            continue
        for kv, heads in heads_of.items():
            chosen = keys[kept, kv]
            scores = scale * (q[i, heads][:, columns] @ chosen[:, columns].T)
            top = scores.amax(-1)
            weights = torch.exp(scores - top[:, None])
            total = weights.sum(-1)
            values = chosen[:, first : first + case.d_v]
            mixed = weights @ values
            out[i, heads, : values.shape[1]] = mixed if variant.unnormalised else mixed / total[:, None]
            right = top + torch.log(total)
            lse[i, heads] = variant.lse(top, total, right) if variant.lse else right
    return out, lse


def causes(inputs: Inputs) -> Iterator[tuple[str, Variant]]:
    """Hypotheses for this call, the most telling first; those that change nothing here explain nothing."""
    case = inputs.case
    page = case.page
    ln2 = math.log(2)
    if case.lse_base == "e":
        yield "lse is in base 2 where base e was asked for", Variant(lse=lambda m, t, lse: lse / ln2)
    else:
        yield "lse is in base e where base 2 was asked for", Variant(lse=lambda m, t, lse: lse * ln2)
        yield "lse was multiplied by ln 2 instead of divided", Variant(lse=lambda m, t, lse: lse * ln2 * ln2)
        yield "base 2 reached only the sum, not the maximum", Variant(lse=lambda m, t, lse: m * ln2 + (lse - m))
    yield "lse lacks the row maximum", Variant(lse=lambda m, t, lse: torch.log(t))
    yield "lse is the row maximum alone", Variant(lse=lambda m, t, lse: m)
    yield "lse is the sum itself, not its logarithm", Variant(lse=lambda m, t, lse: torch.exp(lse))
    scale = case.d**-0.5 if case.scale is None else case.scale
    yield (
        "lse has an unscaled row maximum",
        Variant(
            lse=lambda m, t, lse: m / scale + torch.log(t) if scale else lse,
        ),
    )
    yield "lse has the opposite sign", Variant(lse=lambda m, t, lse: -lse)
    yield "the softmax scale is missing", Variant(scale=lambda s, d, v: 1.0)
    if case.scale is not None:
        yield "the default scale d ** -0.5 is used instead of softmax_scale", Variant(scale=lambda s, d, v: d**-0.5)
    yield "the scale is head_dim_v ** -0.5, not d ** -0.5", Variant(scale=lambda s, d, v: v**-0.5)
    yield "the scale is applied twice", Variant(scale=lambda s, d, v: s * s)
    yield "the scale is off by log2(e): base 2 and base e are mixed", Variant(scale=lambda s, d, v: s / ln2)
    yield "the scale is off by ln(2): base 2 and base e are mixed", Variant(scale=lambda s, d, v: s * ln2)
    if case.causal:
        yield (
            "causal is off by one: a query sees one key too many",
            Variant(seen=lambda n, s, i, right: min(n, right + 1)),
        )
        yield "causal is off by one: a query sees one key too few", Variant(seen=lambda n, s, i, right: right - 1)
        yield "the causal mask is aligned at the top left", Variant(seen=lambda n, s, i, right: min(n, i + 1))
        yield "causal is ignored", Variant(seen=lambda n, s, i, right: n)
        if case.q_lens is not None:
            longest = max(case.q_lens)
            yield (
                "the causal mask uses the longest s_q of the batch",
                Variant(seen=lambda n, s, i, right: min(n, n - longest + i + 1)),
            )
    else:
        yield "causal is applied where it was not asked for", Variant(seen=lambda n, s, i, right: n - s + i + 1)
    if case.d != case.d_v:
        yield "the V columns are shifted: they start after the RoPE columns", Variant(values_from=-1)
        yield "the RoPE columns are left out of the scores", Variant(score_columns=lambda d, v: slice(0, v))
        yield "only the RoPE columns enter the scores", Variant(score_columns=lambda d, v: slice(v, d))
    if case.h_kv > 1:
        yield (
            "the KV head of query head h is h % h_kv, not h // group",
            Variant(kv_head=lambda h, group, kv: h % kv),
        )
        yield "every query head uses KV head 0", Variant(kv_head=lambda h, group, kv: 0)
    yield "the page order of block_table is ignored: pages as they lie in memory", Variant(table="memory")
    yield "the page order of block_table is ignored: pages follow the first one", Variant(table="entry0")
    yield (
        "the last token is dropped where it is the first of its page",
        Variant(keep=lambda n: torch.arange(n - 1 if n > page and n % page == 1 else n)),
    )
    yield (
        "the last page is dropped where it is partly filled",
        Variant(keep=lambda n: torch.arange(n // page * page or n)),
    )
    yield "the last page is dropped", Variant(keep=lambda n: torch.arange(max(0, -(-n // page) - 1) * page))
    yield "the last token is dropped", Variant(keep=lambda n: torch.arange(max(0, n - 1)))
    yield "the first token is dropped", Variant(keep=lambda n: torch.arange(min(n, 1), n))
    for unit in (2, 4, 8, 16, 32, 64, 128):
        yield (
            f"keys past the last multiple of {unit} are dropped",
            Variant(keep=lambda n, unit=unit: torch.arange(n // unit * unit or n)),  # type: ignore[misc]
        )
    for unit in (64, 128, 256, 512, 1024, 2048, 4096, 5120, 8192):
        if max(case.lengths, default=0) > unit:
            yield (
                f"only the first {unit} keys are attended",
                Variant(keep=lambda n, unit=unit: torch.arange(min(n, unit))),  # type: ignore[misc]
            )
    for unit in (32, 64, 128, 256):
        yield (
            f"the last split of {unit} keys is never merged, only the first ones",
            Variant(keep=lambda n, unit=unit: torch.arange(max((n - 1) // unit * unit, 0) or n)),  # type: ignore[misc]
        )
    if case.batch > 1:
        for name, length_of in (
            ("the shortest", lambda all_, j: min(n for n in all_ if n) if all_[j] else 0),
            ("the next sequence's, where shorter,", lambda all_, j: min(all_[j], all_[(j + 1) % len(all_)])),
            ("the previous sequence's, where shorter,", lambda all_, j: min(all_[j], all_[j - 1])),
        ):
            yield f"a sequence uses the length of another sequence: {name}", Variant(length_of=length_of)
    yield "out is not divided by the sum of the weights", Variant(unnormalised=True)
