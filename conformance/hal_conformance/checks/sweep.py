"""L2: the published sweep of shapes."""

from __future__ import annotations

import itertools

from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context

_WORK = {"quick": 1e9, "default": 8e9}
"""Floating-point operations a sweep case may have outside ``--full``."""

_BYTES = {"quick": 4e7, "default": 4e8}
"""Bytes its cache may have."""


@holds("MLA-45")
def published_sweep(context: Context) -> None:
    """A case of the published sweep; outside ``--full`` a random one of bounded work."""
    mode = context.settings.mode
    if mode == "full":
        case = _published(context, context.index)
        if case is None:
            # This shape is not declared: CAP-06 holds that it is refused.
            return
    else:
        draws = (_published(context, context.rng.randrange(2336)) for _ in itertools.count())
        tries = itertools.islice(draws, 2000)
        case = next(
            (c for c in tries if c is not None and c.flops() <= _WORK[mode] and c.bytes() <= _BYTES[mode]), None
        )
        case = context.draw().base() if case is None else case
    context.check(case)


_SHAPES = tuple(
    itertools.product(
        (1, 2, 6, 64),
        (1, 2, 4),
        (20, 140, 4096),
        [(q, k) for q in (1, 3, 9, 63, 64, 126, 128) for k in (1, 2, 3, 8) if q % k == 0],
        (False, True),
        (False, True),
        (False,),
    )
) + tuple(itertools.product((2, 6), (1, 2), (20, 4096), [(64, 1), (128, 1)], (False, True), (True,), (True,)))


def _published(context: Context, number: int) -> MlaCase | None:
    """Case ``number`` of the sweep, or None where it is not declared."""
    dense = context.dense
    b, s_q, s_k, (h_q, h_kv), causal, varlen, zeros = _SHAPES[number % len(_SHAPES)]
    if h_q not in dense.h_q or h_kv not in dense.h_kv or s_q not in dense.s_q or (causal and not dense.causal):
        return None
    rng = context.rng
    lengths = [max(s_q, int(rng.gauss(s_k, s_k / 2))) if varlen else s_k for _ in range(b)]
    if zeros:
        for j in rng.sample(range(b), (b + 1) // 2):
            lengths[j] = 0
    base = context.draw().base()
    return base.but(lengths=tuple(lengths), s_q=s_q, h_q=h_q, h_kv=h_kv, causal=causal)
