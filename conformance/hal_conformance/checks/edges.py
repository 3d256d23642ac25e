"""L2: empty sequences, unused memory, page boundaries, tables, strides."""

from __future__ import annotations

import hal
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.decode import call
from hal_conformance.draw import Draw

_GARBAGE = (2147480000, -1, -2147483648, 2147483647, 0)
_POISON = ("nan", "inf", "huge")


def _queries(draw: Draw) -> int:
    return draw.rng.choice(draw.queries())


@holds("MLA-20")
def empty_sequences(context: Context) -> None:
    """Zeros at the ends and in the middle, or nothing but zeros."""
    draw = context.draw()
    lengths = list(draw.lengths(batch=(3, 6)))
    for j in draw.rng.sample(range(len(lengths)), draw.rng.randint(1, 2)):
        lengths[j] = 0
    if context.index % 4 == 3:
        lengths = [0] * len(lengths)
    causal = context.dense.causal and context.index % 2 == 1
    s_q = _queries(draw)
    if causal:
        lengths = [n if n == 0 else n + s_q for n in lengths]
    out_layout = ("contiguous", "none")[context.index % 2]
    context.check(draw.base().but(lengths=tuple(lengths), s_q=s_q, causal=causal, out_layout=out_layout))


@holds("MLA-21")
def queries_before_the_first_key(context: Context) -> None:
    """Fewer keys than queries, causal."""
    draw = context.draw()
    s_q = max(draw.queries()) if context.index % 2 else draw.several_queries()
    lengths = [draw.rng.randint(0, max(0, s_q - 1)) for _ in range(draw.rng.randint(1, 4))]
    lengths[0] = max(0, s_q - 1)
    lengths.append(draw.rng.randint(1, 100) + s_q)
    context.check(draw.base().but(lengths=tuple(lengths), s_q=s_q, causal=True))


@holds("MLA-22")
def tail_of_the_last_page(context: Context) -> None:
    """Every kind of poison behind every kind of length."""
    draw = context.draw()
    page = draw.page(usual=context.index % 2 == 0)
    lengths = tuple(max(1, page * draw.rng.randint(0, 3) + draw.rng.randint(1, page)) for _ in range(4))
    poison = _POISON[context.index % len(_POISON)]
    context.check(draw.base().but(page=page, lengths=lengths, poison=poison, s_q=_queries(draw), data=draw.data()))


@holds("MLA-23")
def page_boundaries(context: Context) -> None:
    """Lengths around whole pages, with weight on the tokens at the edges."""
    draw = context.draw()
    page = draw.page(usual=context.index % 2 == 0)
    around = [n for n in (1, page - 1, page, page + 1, 2 * page, 2 * page + 1, 4 * page) if n > 0]
    draw.rng.shuffle(around)
    causal = context.dense.causal and context.index % 3 == 2
    context.check(draw.base().but(page=page, lengths=tuple(around), causal=causal, data="needle"))


@holds("MLA-24")
def garbage_entries(context: Context) -> None:
    """Unused entries of every kind, sequences of few and of many pages."""
    draw = context.draw()
    page = draw.page()
    lengths = (1, page, draw.rng.randint(1, 6 * page), 0 if context.index % 2 else 1)
    case = draw.base().but(lengths=lengths, garbage=_GARBAGE[context.index % len(_GARBAGE)], data=draw.data())
    context.check(case.but(table_layout=("contiguous", "wide")[context.index // 2 % 2]))


@holds("MLA-25")
def shared_pages(context: Context) -> None:
    """Common prefixes, and a page a sequence uses twice."""
    draw = context.draw()
    page = draw.page()
    lengths = tuple(draw.rng.randint(1, 6 * page) for _ in range(draw.rng.randint(2, 5)))
    context.check(draw.base().but(lengths=lengths, pages="shared", data=draw.rng.choice(("normal", "hot"))))


@holds("MLA-26")
def strided_queries(context: Context) -> None:
    """Each layout of q in turn; contiguous, but not on any alignment; and both."""
    draw = context.draw()
    layout = ("padded", "heads_first", "odd", "contiguous")[context.index % 4]
    starts = draw.starts("q") if context.index % 4 == 3 or (context.index >= 4 and draw.rng.random() < 0.5) else {}
    context.check(draw.base().but(q_layout=layout, s_q=max(draw.queries()[:2]), data=draw.data(), **starts))
    context.check(draw.base().but(q_layout="expanded", lengths=draw.lengths(most=70, batch=(2, 3)), data="hot"))


@holds("MLA-27")
def strided_cache(context: Context) -> None:
    """Each layout of the cache in turn."""
    draw = context.draw()
    layouts = ("padded_block", "padded_token", "blocks_inner", "padded_row", "heads_first", "odd")
    # In steps of 5, so that even a short run sees layouts of each kind.
    layout = layouts[context.index * 5 % len(layouts)]
    kv_heads = (2, 3, 4, 8) if layout in ("heads_first", "padded_row") else (1,)
    starts = draw.starts("kv") if draw.rng.random() < 0.5 else {}
    context.check(draw.base().but(kv_layout=layout, **draw.heads(kv_heads), data=draw.data(), **starts))
    context.check(draw.base().but(lengths=draw.lengths(most=70), data=draw.data(), **draw.starts("kv")))
    once = draw.heads((2, 3, 4, 8)) if context.index % 2 else {}
    context.check(draw.base().but(lengths=draw.lengths(most=70), kv_layout="expanded", data=draw.data(), **once))


@holds("MLA-28")
def strided_out_and_tables(context: Context) -> None:
    """Padded and swapped out, padded block table; then both, and lengths, off their alignment."""
    draw = context.draw()
    out_layout = ("padded", "heads_first")[context.index % 2]
    case = draw.base().but(lengths=draw.lengths(batch=(2, 5)), s_q=max(draw.queries()[:2]), data=draw.data())
    context.check(case.but(out_layout=out_layout, table_layout="strided"))
    context.check(case.but(out_layout=("contiguous", out_layout)[context.index % 2], **draw.starts("out", "table")))
    context.check(case.but(table_layout="expanded", data="hot"))


@holds("MLA-40")
def indices_out_of_range(context: Context) -> None:
    """A bad entry in use in one sequence; the others, and the next call, must be right."""
    draw = context.draw()
    page = draw.page()
    good = draw.base().but(lengths=(2 * page, 3 * page, page + 3), data="normal")
    bad = (-1, 10**6, 2147480000, -2147483648)[context.index % 4]
    inputs = context.make(good)
    entry = draw.rng.randint(0, 2)
    inputs.block_table.view[1, entry] = bad
    inputs.seal()
    context.record.case = good.to_dict()
    context.record.calls += 1
    try:
        outcome = call(inputs, context.backend)
    except (hal.SpecError, hal.DeviceError):
        pass
    except Exception as error:
        context.problem(
            f"block_table[1, {entry}] = {bad}: raised {type(error).__name__} ({error}), not SpecError or DeviceError"
        )
    else:
        for text in outcome.problems:
            context.problem(text)
        # Around the cache and in its unused pages there is NaN: a result that read there shows it.
        if not bool(outcome.out.isfinite().all()):
            context.problem(f"block_table[1, {entry}] = {bad} was read through: the result holds NaN from outside")
    after = MlaCase.from_dict(good.to_dict())
    context.check(after, what="the call after it: ")


def _nothing_cases(context: Context) -> list[MlaCase]:
    base = context.draw().base()
    cases = [base.but(lengths=()), base.but(s_q=0), base.but(lengths=(0, 0, 0)), base.but(lengths=(0,))]
    if context.dense.ragged_q:
        cases += [base.but(lengths=(5, 9), q_lens=(0, 0)), base.but(lengths=(), q_lens=())]
    return cases


@holds("MLA-38", lambda context: len(_nothing_cases(context)))
def nothing_to_do(context: Context) -> None:
    """No sequences, no queries, no tokens."""
    context.check(_nothing_cases(context)[context.index])
