"""L2: numbers softmax breaks on, and lengths schedules break on."""

from __future__ import annotations

from typing import Final

from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.draw import Draw, head_dims, head_pairs

_LONG: Final = 16384
_TOKENS: Final = 131072
"""From where to where a very long sequence is."""

_COLUMNS: Final = 1050
"""Of a table, more than the 1024 for which staged ones have room; every run has such a row."""

_GATHERED: Final = 40_000_000
"""Elements that the oracle has at once of such a sequence, 8 bytes each."""


@holds("MLA-29")
def underflow(context: Context) -> None:
    """Scores far apart, or all far below zero."""
    draw = context.draw()
    data = ("underflow", "negative")[context.index % 2]
    causal = context.dense.causal and context.index % 3 == 2
    s_q = draw.several_queries() if causal else 1 if 1 in draw.queries() else draw.queries()[0]
    lengths = tuple(n + s_q for n in draw.lengths(most=500))
    context.check(draw.base().but(data=data, causal=causal, s_q=s_q, lengths=lengths))


@holds("MLA-30")
def equal_logits(context: Context) -> None:
    """Q 0 everywhere."""
    draw = context.draw()
    context.check(draw.base().but(data="equal", lengths=draw.lengths(most=700)))


@holds("MLA-31")
def large_numbers(context: Context) -> None:
    """Huge V; or sharp scores."""
    draw = context.draw()
    context.check(draw.base().but(data=("large", "hot", "underflow")[context.index % 3]))


@holds("MLA-32")
def any_finite_scale(context: Context) -> None:
    """Zero, negative, tiny, large."""
    draw = context.draw()
    scale = (0.0, -0.05, 1e-6, 4.0, -2.0)[context.index % 5]
    # Scores as far apart as the scale allows without leaving what float32 can tell apart.
    data = "hot" if scale in (0.0, -0.05) else "normal"
    context.check(draw.base().but(scale=scale, data=data))
    if context.dense.causal:
        # What a query does not see is hidden whatever a factor makes of it.
        s_q = draw.several_queries()
        lengths = draw.ordinary(n + s_q for n in draw.lengths(most=100, batch=(1, 2)))
        context.check(draw.base().but(scale=scale, causal=True, s_q=s_q, lengths=lengths, data=data))


@holds("MLA-33")
def one_long(context: Context) -> None:
    """One sequence of thousands of tokens among a dozen of a few; weight on the long one's edges."""
    draw = context.draw()
    long = draw.rng.choice((4096, 5000, 8191)) + draw.rng.randint(0, 70)
    lengths = [draw.rng.randint(1, 40) for _ in range(11)]
    lengths.insert(draw.rng.randint(0, 11), long)
    context.check(draw.base().but(lengths=tuple(lengths), data=("needle", "normal")[context.index % 2]))
    context.check(very_long(draw))


def very_long(draw: Draw) -> MlaCase:
    """A sequence of up to 131072 tokens and a short one, of few heads; its table has thousands of entries."""
    d, d_v = draw.smallest_dims() if draw.index % 2 else head_dims(draw.declared)[0]
    h_q, h_kv = min(head_pairs(draw.declared))
    tokens = min(_TOKENS, _GATHERED // (d * h_kv))
    # As many short ones as long ones: by magnitude, and not by number.
    length = int(_LONG * (tokens / _LONG) ** draw.rng.uniform(0.2, 1))
    page = draw.page(usual=draw.index % 2 == 0)
    if draw.index % 2 == 0 and _COLUMNS * page <= tokens:
        length = max(length, _COLUMNS * page)
    lengths = (length, draw.rng.randint(1, 40)) if draw.rng.random() < 0.5 else (length,)
    data = ("needle", "normal")[draw.rng.randrange(2)]
    flags = {"causal": draw.declared.causal and draw.rng.random() < 0.5, "plan": draw.rng.random() < 0.5}
    flags["batch_invariant"] = draw.declared.batch_invariant and draw.rng.random() < 0.5
    case = draw.base().but(h_q=h_q, h_kv=h_kv, d=d, d_v=d_v, page=page, lengths=lengths)
    return case.but(pages="pool", data=data, **flags)
