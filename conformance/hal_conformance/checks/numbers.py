"""L2: numbers softmax breaks on, and lengths schedules break on."""

from __future__ import annotations

from hal_conformance.checks import holds
from hal_conformance.context import Context


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
    context.check(draw.base().but(scale=scale, data="hot" if scale in (0.0, -0.05) else "normal"))


@holds("MLA-33")
def one_long(context: Context) -> None:
    """One sequence of thousands of tokens among a dozen of a few; weight on the long one's edges."""
    draw = context.draw()
    long = draw.rng.choice((4096, 5000, 8191)) + draw.rng.randint(0, 70)
    lengths = [draw.rng.randint(1, 40) for _ in range(11)]
    lengths.insert(draw.rng.randint(0, 11), long)
    context.check(draw.base().but(lengths=tuple(lengths), data=("needle", "normal")[context.index % 2]))
