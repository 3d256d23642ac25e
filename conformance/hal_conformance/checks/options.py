"""L2: ragged queries, base 2, batch invariance, repetition, stale plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import hal
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.decode import Outcome, plan_for
from hal_conformance.draw import Draw, head_pairs
from hal_conformance.inputs import Inputs
from hal_conformance.memory import same_bits
from hal_conformance.requirements import REQUIREMENTS

_REPEATS = {"quick": 420, "default": 700, "full": 4000}
"""A race that shows on one run in fifty survives 420 repeats with probability 2e-4, and 700 with 7e-7."""


_LONG_REPEATS = {"quick": 60, "default": 100, "full": 1000}
"""Of a sequence in many pieces: two cases of a quick run see a race of one run in twenty but with probability 2e-3."""


@holds("MLA-34")
def ragged_queries(context: Context) -> None:
    """Every sequence its own number of queries, none and many included; causal in turn, also with fewer keys."""
    draw = context.draw()
    most = max(draw.queries()) if context.index % 2 else draw.several_queries()
    q_lens = [draw.rng.randint(0, most) for _ in range(draw.rng.randint(2, 6))]
    q_lens[draw.rng.randrange(len(q_lens))] = most
    if context.index % 2:
        q_lens.insert(draw.rng.randrange(len(q_lens)), 0)
    causal = context.dense.causal and context.index % 3 != 0
    lengths = [draw.rng.randint(0, 200) + (n if causal else 0) for n in q_lens]
    if causal:
        # The first queries of a sequence with fewer keys than queries see nothing: of the longest, always.
        short = {q_lens.index(most), *(j for j in range(len(q_lens)) if draw.rng.random() < 0.25)}
        lengths = [draw.rng.randint(0, max(0, q_lens[j] - 1)) if j in short else n for j, n in enumerate(lengths)]
    data = draw.rng.choice(("needle", "hot"))
    case = draw.base().but(q_lens=tuple(q_lens), lengths=tuple(lengths), causal=causal, data=data)
    context.check(case.but(plan=context.index % 2 == 1, out_layout=draw.rng.choice(("none", "contiguous"))))


@holds("MLA-35")
def base_two(context: Context) -> None:
    """Base 2, with empty sequences among the others."""
    draw = context.draw()
    lengths = draw.lengths(most=600) + ((0,) if context.index % 2 else ())
    case = draw.base().but(lse_base="2", lengths=lengths, data=draw.rng.choice(("hot", "normal", "equal")))
    context.check(case)
    # A plan is for sizes and lengths, whatever the base.
    first = context.make(case)
    plan = plan_for(first, context.backend)
    for base in context.dense.lse_bases:
        inputs = context.make(case.but(lse_base=base))
        inputs.cache_seqlens = first.cache_seqlens
        context.compare(inputs, context.run(inputs, plan=plan), what=f"base {base} with one plan: ")


def _part(inputs: Inputs, order: list[int], *, plan: bool, backend: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call of some sequences of a batch, in some order, on the same cache."""
    whole = inputs.case
    q_lens = None if whole.q_lens is None else tuple(whole.q_lens[j] for j in order)
    case = whole.but(lengths=tuple(whole.lengths[j] for j in order), q_lens=q_lens)
    rows = torch.tensor(order, device=case.device)
    q = inputs.q.view[rows if q_lens is None else _query_rows(whole, order).to(case.device)]
    part = dataclasses.replace(
        inputs,
        case=case,
        q=dataclasses.replace(inputs.q, view=q),
        block_table=dataclasses.replace(inputs.block_table, view=inputs.block_table.view[rows]),
        cache_seqlens=dataclasses.replace(inputs.cache_seqlens, view=inputs.cache_seqlens.view[rows]),
    )
    if inputs.cu_seqlens_q is not None:
        starts = torch.tensor([0, *case.queries]).cumsum(0).to(inputs.cu_seqlens_q.view)
        part.cu_seqlens_q = dataclasses.replace(inputs.cu_seqlens_q, view=starts)

    def run() -> tuple[torch.Tensor, ...]:
        positional, keywords = part.arguments()
        made = plan_for(part, backend) if plan else None
        return hal.mla_decode(*positional, **keywords, batch_invariant=True, plan=made, backend=backend)

    return run


def _query_rows(case: MlaCase, order: list[int]) -> torch.Tensor:
    """Which rows of ragged queries belong to these sequences."""
    starts = torch.tensor([0, *case.queries]).cumsum(0).tolist()
    return torch.cat([torch.arange(starts[j], starts[j + 1]) for j in order])


@holds("MLA-36")
def batch_invariance(context: Context) -> None:
    """Each sequence alone, all reversed, with a plan, with other thread counts: the same bits. Then unlike calls."""
    draw = context.draw()
    lengths = (*draw.lengths(most=300, batch=(3, 5)), draw.rng.randint(700, 2500))
    s_q = draw.rng.choice(draw.queries())
    case = draw.base(small=context.index % 2 == 0).but(lengths=lengths, s_q=s_q, batch_invariant=True, data="hot")
    if context.dense.causal and context.index % 2:
        case = case.but(causal=True, lengths=tuple(n + s_q for n in lengths))
    _invariant(context, case)
    tiny = case.but(h_q=draw.heads_for(case.h_kv, 8), lengths=(*lengths[:2], lengths[-1]))
    if context.settings.mode != "quick" and context.index % 2:
        # So long as many a kernel splits otherwise.
        _invariant(context, tiny.but(lengths=(*lengths[:2], draw.rng.randint(4200, 9000))))
    if REQUIREMENTS["several_kv_heads"].declared(context.capabilities):
        _invariant(context, tiny.but(**_several_heads(draw)))
    if context.dense.ragged_q:
        q_lens = (draw.rng.randint(1, 3), 0, draw.several_queries(8))
        _invariant(context, tiny.but(q_lens=q_lens, lengths=tuple(n + 8 for n in tiny.lengths)))


def _several_heads(draw: Draw) -> dict[str, int]:
    """The fewest query heads of several KV heads."""
    h_q, h_kv = min(head_pairs(draw.declared, (2, 3, 4, 8)))
    return {"h_q": h_q, "h_kv": h_kv}


def _invariant(context: Context, case: MlaCase) -> None:
    inputs, whole, verdict = context.check(case)
    if not verdict.ok:
        return
    everyone = list(range(case.batch))
    last = everyone[-1]
    variants = [([j], False) for j in everyone] + [(everyone[::-1], False), (everyone, True), ([last, 0], True)]
    for order, plan in variants:
        _same_rows(context, inputs, whole, order, plan, f"sequences {order}{' with a plan' if plan else ''}")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _same_rows(context, inputs, whole, everyone, False, "with 1 host thread")
    finally:
        torch.set_num_threads(threads)


def _same_rows(context: Context, inputs: Inputs, whole: Outcome, order: list[int], plan: bool, what: str) -> None:
    context.record.calls += 1
    out, lse = _part(inputs, order, plan=plan, backend=context.backend)()
    if inputs.case.q_lens is None:
        want_out, want_lse = whole.out[order], whole.lse[order]
    else:
        at = _query_rows(inputs.case, order)
        want_out, want_lse = whole.out[at], whole.lse[:, at]
    for name, have, want in (("out", out.cpu(), want_out), ("lse", lse.cpu(), want_lse)):
        if not same_bits(have, want.contiguous()):
            rows = int((have != want).any(-1).sum())
            context.problem(f"{what}: the bits of {name} differ in {rows} rows from those of the whole batch")


@holds("MLA-37")
def same_call_again(context: Context) -> None:
    """A small call hundreds of times, and a long sequence dozens of times: looks for what is wrong now and then."""
    draw = context.draw()
    invariant = context.dense.batch_invariant and context.index % 2 == 0
    _again(context, _shortest(draw).but(batch_invariant=invariant), _REPEATS[context.settings.mode])
    if not context.record.problems:
        _again(context, _longest(draw).but(batch_invariant=invariant), _LONG_REPEATS[context.settings.mode])


def _again(context: Context, case: MlaCase, repeats: int) -> None:
    inputs, first, verdict = context.check(case)
    if not verdict.ok:
        return
    expected = context.expect(inputs)
    positional, keywords = inputs.arguments()
    keywords |= {"batch_invariant": case.batch_invariant, "backend": context.backend}
    wrong = changed = 0
    for _ in range(repeats):
        out, lse = (t.cpu() for t in hal.mla_decode(*positional, **keywords))
        if same_bits(out, first.out) and same_bits(lse, first.lse):
            continue
        changed += 1
        wrong += not context.right(out, lse, expected)
    context.record.calls += repeats
    if wrong:
        context.problem(f"{wrong} of {repeats} repetitions of one call were wrong, the others right: a race")
    elif changed and case.batch_invariant:
        context.problem(f"{changed} of {repeats} repetitions of one batch_invariant call had other bits")


def _longest(draw: Draw) -> MlaCase:
    """One sequence in many pieces, of few heads: all processors of a device have a share of it."""
    h_q, h_kv = min(head_pairs(draw.declared))
    d, d_v = draw.smallest_dims()
    case = draw.base().but(h_q=h_q, h_kv=h_kv, d=d, d_v=d_v, data="hot", pages="pool")
    return case.but(lengths=(draw.rng.randint(4000, 9000),))


def _shortest(draw: Draw) -> MlaCase:
    case = draw.base().but(data="hot")
    return case.but(lengths=(draw.rng.randint(1, 20), draw.rng.randint(65, 140)))


def _stale_calls(context: Context, case: MlaCase) -> list[tuple[str, dict[str, Any]]]:
    """Changes to a case that make its plan stale; how many there are depends only on what is declared."""
    found: list[tuple[str, dict[str, Any]]] = [
        ("another length", {"lengths": (case.lengths[0] + 1, *case.lengths[1:])}),
        ("more sequences", {"lengths": (*case.lengths, 7)}),
        ("longer sequences", {"lengths": tuple(2 * n for n in case.lengths)}),
    ]
    found += [("another dtype", {"dtype": name}) for name in context.dense.dtypes[1:2]]
    others = [pair for pair in head_pairs(context.dense) if pair[0] != case.h_q]
    found += [("another h_q", {"h_q": h_q, "h_kv": h_kv}) for h_q, h_kv in others[:1]]
    found += [("another s_q", {"s_q": n}) for n in context.draw().queries() if n != case.s_q][:1]
    if context.dense.causal:
        found.append(("causal", {"causal": True}))
    return found


@holds("MLA-39", lambda context: len(_stale_calls(context, context.draw().base())))
def stale_plans(context: Context) -> None:
    """Use a plan for a call it was not made for, then for the one it was."""
    case = context.draw().base().but(dtype=context.dense.dtypes[0])
    name, changes = _stale_calls(context, case)[context.index]
    inputs, other = context.make(case), context.make(case.but(**changes))
    plan = plan_for(inputs, context.backend)
    positional, keywords = other.arguments()
    context.record.case = case.to_dict()
    context.record.calls += 1
    try:
        hal.mla_decode(*positional, **keywords, plan=plan, backend=context.backend)
    except hal.SpecError:
        pass
    except Exception as error:
        context.problem(f"a plan used for {name} raised {type(error).__name__}, not SpecError: {error}")
    else:
        context.problem(f"a plan used for {name} was not refused")
    context.compare(inputs, context.run(inputs, plan=plan), what="the call the plan was made for: ")
