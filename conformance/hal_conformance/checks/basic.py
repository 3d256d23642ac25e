"""L1: dense decode."""

from __future__ import annotations

from typing import Any

from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.decode import plan_for
from hal_conformance.draw import (
    HUGE_BATCHES,
    LENGTHS,
    MOST_DIM,
    MOST_HEADS,
    MOST_KV_HEADS,
    MOST_PAGE,
    MOST_QUERIES,
    Draw,
    head_dims,
    head_pairs,
    within,
)

_ALIVE = 9
"""Plans that are there at once: more than a small ring has room for."""

_LAYERS = 64
"""Calls with one plan: the layers of a large model."""


@holds("MLA-01")
def plain_decode(context: Context) -> None:
    """One query a sequence, ordinary sizes, every declared dtype in turn."""
    draw = context.draw()
    case = draw.base(small=context.index % 3 != 0).but(pages="ordered", data=draw.data())
    if context.index % 2 == 0:
        case = case.but(lengths=(draw.rng.choice((64, 128, 192)),) * draw.rng.randint(1, 3))
    context.check(case)


@holds("MLA-02")
def softmax_scale(context: Context) -> None:
    """The default scale and chosen ones, on data where the scale matters."""
    draw = context.draw()
    scale = (None, 0.1, 1.0, 0.02)[context.index % 4]
    case = draw.base().but(scale=scale, data="hot" if scale is None else "normal", **_dims(draw))
    context.check(case)


@holds("MLA-03")
def natural_logarithm(context: Context) -> None:
    """Few keys up to many, so that ln(n) itself varies."""
    draw = context.draw()
    lengths = tuple(draw.rng.choice((1, 2, 3, 50, 500)) for _ in range(4))
    context.check(draw.base().but(lengths=lengths, lse_base="e", data=draw.rng.choice(("normal", "hot"))))


@holds("MLA-04")
def value_columns(context: Context) -> None:
    """Each usual pair of d and head_dim_v in turn, and every declared d with some head_dim_v."""
    draw = context.draw()
    pairs = head_dims(context.dense)
    d, d_v = pairs[context.index % len(pairs)]
    context.check(draw.base().but(d=d, d_v=d_v, data=draw.data()))
    tiny = draw.base().but(lengths=draw.lengths(most=60, batch=(1, 2)))
    every = [draw.with_values(d) for d in draw.hand("head_dim", within(context.dense.head_dim, MOST_DIM))]
    _each(context, [tiny.but(d=d, d_v=v) for d, v in every])


@holds("MLA-05")
def grouped_heads(context: Context) -> None:
    """Several KV heads, as many as any model has and any other number."""
    draw = context.draw()
    context.check(draw.base().but(**draw.heads((2, 3, 8, 4)), data=draw.data()))
    heads = within(context.dense.h_q, MOST_HEADS)
    every = [n for n in within(context.dense.h_kv, MOST_KV_HEADS) if n > 1 and any(h_q % n == 0 for h_q in heads)]
    tiny = draw.base().but(lengths=draw.lengths(most=60, batch=(1, 2)), data="hot")
    _each(context, [tiny.but(h_kv=n, h_q=draw.heads_for(n, 4 * n)) for n in draw.hand("h_kv", every)])


@holds("MLA-06")
def paged_cache(context: Context) -> None:
    """Shuffled pages of usual sizes, and of every declared size."""
    draw = context.draw()
    page = draw.page(usual=context.index % 2 == 0)
    lengths = draw.lengths(most=max(100, 4 * page), page=page)
    context.check(draw.base().but(page=page, lengths=lengths, data=draw.data()))
    every = draw.hand("page", within(context.dense.page_size, MOST_PAGE))
    tiny = _few_heads(draw, 4)
    spans = [(n, draw.ordinary([draw.rng.randint(n + 1, 3 * n), draw.rng.randint(1, n)], n)) for n in every]
    _each(context, [tiny.but(page=n, lengths=lengths) for n, lengths in spans])


@holds("MLA-07")
def causal_alignment(context: Context) -> None:
    """Causal, with tokens of great weight just at the edge of what each query may see."""
    draw = context.draw()
    s_q = draw.several_queries() if context.index % 4 else draw.queries()[0]
    lengths = draw.ordinary(n + s_q for n in draw.lengths())
    if context.index % 3 == 0:
        lengths = draw.ordinary(draw.rng.randint(s_q, s_q + 6) for _ in lengths)
    context.check(draw.base().but(causal=True, s_q=s_q, lengths=lengths, data=draw.rng.choice(("needle", "hot"))))
    # Longer rows of queries than one tile holds.
    tiny = _few_heads(draw, 8).but(causal=True)
    every = [
        (n, draw.lengths(most=50, batch=(1, 2))) for n in draw.hand("s_q", within(context.dense.s_q, MOST_QUERIES))
    ]
    _each(context, [tiny.but(s_q=n, lengths=draw.ordinary(n + m for m in more)) for n, more in every])


@holds("MLA-08")
def several_queries(context: Context) -> None:
    """Not causal, s_q above 1, up to a few dozens."""
    draw = context.draw()
    context.check(draw.base().but(s_q=draw.several_queries(), data=draw.data()))
    tiny = _few_heads(draw, 8).but(lengths=draw.lengths(most=60, batch=(1, 2)))
    _each(context, [tiny.but(s_q=n) for n in draw.hand("s_q", within(context.dense.s_q, MOST_QUERIES)) if n > 1])


@holds("MLA-09")
def lengths_differ(context: Context) -> None:
    """Lengths of different magnitudes in one batch, whole tiles and splits among them; or very many sequences."""
    draw = context.draw()
    if context.index % 4 == 3:
        context.check(_few_heads(draw, 8).but(lengths=draw.large_batch()))
        d, d_v = draw.smallest_dims()
        context.check(_few_heads(draw, 1).but(d=d, d_v=d_v, lengths=draw.large_batch(HUGE_BATCHES, 5)))
        if context.index % 24 == 7:
            # As many rows as they have who serve: all usual sizes at once, and hardly a token.
            pairs = head_pairs(context.dense)
            h_q, h_kv = max([pair for pair in pairs if pair[0] <= 128] or [min(pairs)])
            context.check(draw.base().but(h_q=h_q, h_kv=h_kv, lengths=draw.large_batch((65, 80), 3)))
        return
    lengths = [draw.rng.choice((1, 2, 17, 63, 100, 250, 600)) + draw.rng.randint(0, 9) for _ in range(4)]
    lengths += [*draw.hand("length", LENGTHS)[:1], 512 * draw.rng.randint(1, 5)]
    draw.rng.shuffle(lengths)
    context.check(draw.base().but(lengths=draw.ordinary(lengths), data=draw.data()))


@holds("MLA-10")
def plans(context: Context) -> None:
    """One plan, layers of different contents, another plan in between; in turn as many layers as models have."""
    draw = context.draw()
    case = draw.base().but(lengths=draw.lengths(most=900))
    if context.dense.causal and context.index % 2:
        s_q = draw.several_queries()
        case = case.but(causal=True, s_q=s_q, lengths=draw.ordinary(n + s_q for n in case.lengths))
    other = case.but(lengths=draw.ordinary(n + case.s_q for n in draw.lengths(most=400)))
    first, second = context.make(case), context.make(other)
    plan, other_plan = plan_for(first, context.backend), plan_for(second, context.backend)
    # A plan is for sizes and lengths: layers may differ in everything else.
    unlike = case.but(scale=0.3, out_layout="contiguous")
    layers = [(first, plan), (context.make(case), plan), (second, other_plan), (context.make(unlike), plan)]
    layers += [(context.make(case.but(scale=0.05)), plan), (context.make(case), plan)]
    for number, (inputs, made) in enumerate(layers):
        if made is plan:
            # The layers of a step share one tensor of lengths: on a device a plan is bound to it, not to its values.
            inputs.cache_seqlens = first.cache_seqlens
        context.compare(inputs, context.run(inputs, plan=made), what=f"layer {number}: ")
    if context.index % 4 == 0:
        _many_layers(context, draw, case)
    _many_plans(context, draw, case)


def _many_layers(context: Context, draw: Draw, case: MlaCase) -> None:
    """One plan for all layers: what it counts, or clears by itself, it counts and clears every time."""
    d, d_v = draw.smallest_dims()
    thin = case.but(d=d, d_v=d_v, h_q=draw.heads_for(case.h_kv, 4), data="hot")
    # Long enough for several splits, which the schedule of a plan is about.
    inputs = context.make(thin.but(lengths=draw.ordinary((draw.rng.randint(600, 1500), case.s_q + 40))))
    plan, expected = plan_for(inputs, context.backend), context.expect(inputs)
    for layer in range(_LAYERS):
        context.compare(inputs, context.run(inputs, plan=plan), expected, what=f"layer {layer} of {_LAYERS}: ")
        if context.record.problems:
            return


def _many_plans(context: Context, draw: Draw, case: MlaCase) -> None:
    """Make plans, and only then use them, in another order than they were made in."""
    d, d_v = draw.smallest_dims()
    thin = case.but(d=d, d_v=d_v, h_q=draw.heads_for(case.h_kv, 4), data="hot")
    # From long to short: what is computed by a later plan instead of its own misses tokens.
    drawn = [draw.lengths(most=600 if n < _ALIVE // 2 else 60, batch=(1, 3)) for n in range(_ALIVE)]
    drawn.sort(key=min, reverse=True)
    every = [thin.but(lengths=draw.ordinary(n + case.s_q for n in lengths)) for lengths in drawn]
    alive = [(inputs, plan_for(inputs, context.backend)) for inputs in map(context.make, every)]
    draw.rng.shuffle(alive)
    for number, (inputs, plan) in enumerate(alive):
        context.compare(inputs, context.run(inputs, plan=plan), what=f"plan {number} of {_ALIVE} made before: ")


@holds("MLA-11")
def given_out(context: Context) -> None:
    """With ``out=``, full of NaN before the call, and without."""
    draw = context.draw()
    case = draw.base().but(**draw.heads(), s_q=draw.rng.choice(draw.queries()), data=draw.data())
    context.check(case.but(out_layout="contiguous"))
    context.check(case)


@holds("MLA-12")
def any_heads(context: Context) -> None:
    """Usual numbers of heads, and every declared one, each head with data of its own."""
    draw = context.draw()
    pairs = sorted(head_pairs(context.dense))
    # Those that fill no tile come first: a short run may see no others.
    draw.rng.shuffle(pairs)
    pairs.sort(key=lambda pair: pair[0] < 16 or pair[0] % 16 == 0)
    h_q, h_kv = pairs[(context.index + context.rng.randrange(2)) % len(pairs)]
    case = draw.base().but(data="hot")
    context.check(case.but(h_q=h_q, h_kv=h_kv, lengths=draw.lengths(most=200, batch=(1, 3))))
    tiny = case.but(lengths=draw.lengths(most=60, batch=(1, 2)))
    every = [(n, _dividing(draw, n)) for n in draw.hand("h_q", within(context.dense.h_q, MOST_HEADS))]
    _each(context, [tiny.but(h_q=n, h_kv=kv) for n, kv in every if kv])


@holds("MLA-13")
def nothing_left_behind(context: Context) -> None:
    """A row of unlike calls, big before small; each must be right."""
    draw = context.draw()
    big = draw.base(small=False).but(lengths=(700, 300, 500), data="hot")
    small = draw.base().but(lengths=(3,), data="normal")
    dtypes = context.dense.dtypes
    calls = [big, small, big.but(lengths=(5, 1, 9)), small.but(scale=0.3), small]
    calls += [big.but(dtype=dtypes[(context.index + 1) % len(dtypes)], lengths=(40, 2, 33))]
    if context.dense.causal:
        calls += [small.but(causal=True, lengths=(30,)), small.but(lengths=(30,))]
    calls += [small.but(lengths=(70,), **draw.dims()), small.but(lengths=(70,))]
    for number, case in enumerate(calls):
        context.check(case, what=f"call {number} of {len(calls)}: ")


def _dims(draw: Draw) -> dict[str, Any]:
    return draw.dims() if draw.index % 2 else {}


def _few_heads(draw: Draw, most: int) -> MlaCase:
    """A plain case of few heads, for sizes whose number costs time."""
    case = draw.base().but(data="hot")
    return case.but(h_q=draw.heads_for(case.h_kv, most))


def _dividing(draw: Draw, h_q: int) -> int:
    """The smallest declared h_kv that divides h_q, or 0."""
    return next((n for n in within(draw.declared.h_kv, MOST_KV_HEADS) if h_q % n == 0), 0)


def _each(context: Context, cases: list[MlaCase]) -> None:
    """Check small cases, up to the first that is wrong: the others are most often wrong in the same way."""
    for case in cases:
        context.check(case)
        if context.record.problems:
            return
