"""L2: checks that need no oracle beside the oracle: permutations, splits, and any legal call at all."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

import hal
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import BackendRaised, Context
from hal_conformance.decode import call
from hal_conformance.draw import KV_HEADS, PAGES, QUERIES, head_dims, head_pairs, members
from hal_conformance.inputs import Inputs, build
from hal_conformance.memory import Guarded

_EXAMPLES = {"quick": 25, "default": 60, "full": 200}
_SEED = 20240229
"""Of the tensors of hypothesis' calls: the sizes are what it searches and shrinks."""


def _refill(guarded: Guarded, values: torch.Tensor) -> None:
    guarded.view.copy_(values)
    guarded.seal()


@holds("MLA-41")
def order_of_heads_and_sequences(context: Context) -> None:
    """Permute query heads within their groups, or sequences; permute the result back."""
    draw = context.draw()
    case = draw.base().but(**draw.heads(), lengths=draw.lengths(batch=(3, 6)), data=draw.data())
    inputs, whole, verdict = context.check(case)
    if not verdict.ok:
        return
    expected = context.expect(inputs)
    group = case.h_q // case.h_kv
    heads = [h * group + i for h in range(case.h_kv) for i in draw.rng.sample(range(group), group)]
    q = inputs.q.view.clone()
    _refill(inputs.q, q[:, :, heads])
    permuted = context.run(inputs)
    back = torch.tensor(heads).argsort()
    context.same((permuted.out[:, :, back], permuted.lse[:, back]), whole, expected, "heads permuted and back")
    order = torch.tensor(draw.rng.sample(range(case.batch), case.batch))
    _refill(inputs.q, q[order.to(q.device)])
    _refill(inputs.block_table, inputs.block_table.view.clone()[order.to(q.device)])
    _refill(inputs.cache_seqlens, inputs.cache_seqlens.view.clone()[order.to(q.device)])
    moved = Inputs(
        case.but(lengths=tuple(case.lengths[j] for j in order.tolist())),
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        None,
        inputs.table[order],
    )
    permuted = context.run(moved)
    back = order.argsort()
    context.same((permuted.out[back], permuted.lse[back]), whole, expected, "sequences permuted and back")


@holds("MLA-42")
def order_of_pages(context: Context) -> None:
    """Move all pages of the cache, used and unused."""
    draw = context.draw()
    case = draw.base().but(page=draw.page(usual=False), data=draw.data())
    inputs, whole, verdict = context.check(case)
    if not verdict.ok:
        return
    expected = context.expect(inputs)
    blocks = inputs.kv_cache.view.shape[0]
    to = torch.tensor(draw.rng.sample(range(blocks), blocks))
    cache, table = inputs.kv_cache.view.clone(), inputs.table
    moved = torch.empty_like(cache)
    moved[to.to(cache.device)] = cache
    used = (table >= 0) & (table < blocks)
    renamed = torch.where(used, to[table.clamp(0, blocks - 1).long()].to(torch.int32), table)
    _refill(inputs.kv_cache, moved)
    _refill(inputs.block_table, renamed)
    again = context.run(
        Inputs(case, inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, None, renamed)
    )
    context.same((again.out, again.lse), whole, expected, "pages moved in memory")


@holds("MLA-43")
def split_context(context: Context) -> None:
    """Decode parts of each sequence (whole pages) and merge them; some parts are empty."""
    draw = context.draw()
    page = draw.page()
    base = draw.base()
    bases = context.dense.lse_bases
    case = base.but(lengths=draw.lengths(most=8 * page, batch=(2, 4)), lse_base=bases[context.index % len(bases)])
    case = case.but(data=draw.data())
    inputs, whole, verdict = context.check(case)
    if not verdict.ok:
        return
    expected = context.expect(inputs)
    most = inputs.table.shape[1]
    cuts = [0, *sorted(draw.rng.randint(0, min(6, most)) for _ in range(draw.rng.randint(1, 3))), most]
    positional, keywords = inputs.arguments()
    q, cache, table, lens = positional
    outs, lses = [], []
    for start, stop in itertools.pairwise(cuts):
        part = (lens - start * page).clamp(0, (stop - start) * page)
        # A part of no pages has no tokens either; its table is not looked at.
        columns = table[:, start:stop].contiguous() if stop > start else table[:, :1].contiguous()
        context.record.calls += 1
        try:
            out, lse = hal.mla_decode(q, cache, columns, part, **keywords, backend=context.backend)
        except Exception as error:
            raise BackendRaised(case, error) from error
        outs.append(out)
        lses.append(lse)
    merged = hal.mla_merge(outs, lses, lse_base=case.lse_base)
    context.same((merged[0].cpu(), merged[1].cpu()), whole, expected, f"context split at pages {cuts[1:-1]} and merged")


def _calls(context: Context) -> st.SearchStrategy[MlaCase]:
    """Any declared call of small size; what hypothesis shrinks towards is the plainest."""
    dense, sizes = context.dense, context.draw()
    base = sizes.base()
    pairs = [p for p in head_pairs(dense, KV_HEADS) if p[0] <= 64] or head_pairs(dense)
    pairs += [(h["h_q"], h["h_kv"]) for h in (sizes.heads(KV_HEADS) for _ in range(8)) if h["h_q"] <= 64]
    dims = head_dims(dense) + [(made["d"], made["d_v"]) for made in (sizes.dims() for _ in range(8))]
    pages = members(dense.page_size, PAGES) + [sizes.page(usual=False) for _ in range(8)]
    queries = sorted({*members(dense.s_q, QUERIES), sizes.several_queries(24)})

    @st.composite
    def build_case(draw: st.DrawFn) -> MlaCase:
        lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
        h_q, h_kv = draw(st.sampled_from(sorted(pairs)))
        d, d_v = draw(st.sampled_from(dims))
        changes: dict[str, Any] = {
            "lengths": tuple(lengths),
            "dtype": draw(st.sampled_from(dense.dtypes)),
            "h_q": h_q,
            "h_kv": h_kv,
            "d": d,
            "d_v": d_v,
            "page": draw(st.sampled_from(pages)),
            "s_q": draw(st.sampled_from(queries)),
            "lse_base": draw(st.sampled_from(dense.lse_bases)),
            "causal": dense.causal and draw(st.booleans()),
            "batch_invariant": dense.batch_invariant and draw(st.booleans()),
            "scale": draw(st.sampled_from((None, 0.05, 0.3))),
            "data": draw(st.sampled_from(("normal", "needle", "hot", "equal"))),
            "pages": draw(st.sampled_from(("ordered", "shuffled", "shared"))),
            "poison": draw(st.sampled_from(("nan", "huge"))),
            "q_layout": draw(st.sampled_from(("contiguous", "padded", "heads_first"))),
            "kv_layout": draw(st.sampled_from(("contiguous", "padded_block", "padded_token", "heads_first"))),
            "out_layout": draw(st.sampled_from(("none", "contiguous", "padded"))),
            "q_start": draw(st.sampled_from((0, 0, 0, 1, 4, 7))),
            "kv_start": draw(st.sampled_from((0, 0, 0, 1, 4, 7))),
            "plan": draw(st.booleans()),
        }
        if dense.ragged_q and draw(st.booleans()):
            most = max(queries)
            changes["q_lens"] = tuple(draw(st.integers(0, most)) for _ in lengths)
        if changes["pages"] == "shared" and changes["data"] == "needle":
            changes["data"] = "hot"
        return base.but(**changes)

    return build_case()


@holds("MLA-44")
def any_legal_call(context: Context) -> None:
    """Let hypothesis look for a declared call that goes wrong, and shrink it."""
    budget = settings(
        max_examples=_EXAMPLES[context.settings.mode],
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        found = find(
            _calls(context),
            lambda case: bool(_wrong(context, case)),
            settings=budget,
            random=random.Random(context.tensor_seed()),
        )
    except NoSuchExample:
        return
    for text in _wrong(context, found):
        context.problem(f"shrunk to {found.to_dict()}: {text}")
    inputs = build(found, _SEED)
    context.compare(inputs, context.run(inputs))
    context.record.case = found.to_dict()


def _wrong(context: Context, case: MlaCase) -> list[str]:
    context.record.calls += 1
    inputs = build(case, _SEED)
    try:
        outcome = call(inputs, context.backend)
    except Exception as error:
        return [f"a declared call raised {type(error).__name__}: {error}"]
    context.record.add_launches(outcome.launches)
    if outcome.problems:
        return outcome.problems
    right = context.right(outcome.out, outcome.lse, context.expect(inputs))
    return [] if right else ["the result differs from the reference"]
