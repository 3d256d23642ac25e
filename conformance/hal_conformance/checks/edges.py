"""L2: empty sequences, unused memory, page boundaries, tables, strides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import hal
from hal.spec.validation import set_validation, validation_level
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.decode import call
from hal_conformance.draw import Draw
from hal_conformance.inputs import Inputs
from hal_conformance.memory import Guarded, place

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
    """A bad entry in use in one sequence, then a bad length; the others, and the next call, must be right."""
    draw = context.draw()
    page = draw.page()
    good = draw.base().but(lengths=(2 * page, page + 3, 3 * page), data="normal")
    layout = ("contiguous", "strided")[context.index % 2]
    _spoiled(context, good.but(table_layout=layout), _bad_entry)
    _spoiled(context, good.but(table_layout=layout), _bad_length)
    context.check(good, what="the call after it: ")


def _bad_entry(context: Context, inputs: Inputs, blocks: int) -> str:
    """An entry of the last sequence that is no page; the first that is none after the others."""
    bad = (blocks, -1, 2147480000, blocks, 10**6, -2147483648)[context.index % 6]
    entry = context.rng.randint(0, 2)
    inputs.block_table.view[-1, entry] = bad
    return f"block_table[2, {entry}] = {bad} of {blocks} blocks"


def _bad_length(context: Context, inputs: Inputs, blocks: int) -> str:
    """A length beyond the table, whose next entries in memory are a page that holds NaN; or one below 0."""
    table, page = inputs.block_table, inputs.case.page
    table.view[-1] = table.view[-1, 0].clone()
    nobodys = min(set(range(blocks)) - set(inputs.table.flatten().tolist()))
    table.storage[~table.inside] = nobodys
    most = table.view.shape[1] * page
    bad = (most + page, most + 1, -1, most + 1)[context.index % 4]
    inputs.cache_seqlens.view[-1] = bad
    return f"cache_seqlens[2] = {bad}, where the table has room for {most}"


def _spoiled(context: Context, good: MlaCase, spoil: Callable[[Context, Inputs, int], str]) -> None:
    inputs = context.make(good)
    expected = context.expect(_without_the_last(inputs))
    inputs = dataclasses.replace(inputs, kv_cache=_between_blocks(inputs.kv_cache))
    what = spoil(context, inputs, inputs.kv_cache.view.shape[0])
    inputs.seal()
    context.record.case = good.to_dict()
    context.record.calls += 1
    try:
        outcome = call(inputs, context.backend)
    except (hal.SpecError, hal.DeviceError):
        pass
    except Exception as error:
        context.problem(f"{what}: raised {type(error).__name__} ({error}), not SpecError or DeviceError")
    else:
        for text in outcome.problems:
            context.problem(text)
        # Around the cache and in its unused pages there is NaN: a result that read there shows it.
        if not bool(outcome.out.isfinite().all()):
            context.problem(f"{what} was read through: the result holds NaN from outside")
        elif not context.right(outcome.out[:-1], outcome.lse[:-1], expected):
            context.problem(f"{what}: other sequences than this are wrong")
    _refused_in_full(context, inputs, what)


def _without_the_last(inputs: Inputs) -> Inputs:
    """All sequences but the last, with tables and lengths of their own."""

    def fewer(guarded: Guarded) -> Guarded:
        return dataclasses.replace(guarded, view=guarded.view[:-1].clone())

    case = inputs.case.but(lengths=inputs.case.lengths[:-1])
    table, lengths = fewer(inputs.block_table), fewer(inputs.cache_seqlens)
    return dataclasses.replace(inputs, case=case, q=fewer(inputs.q), block_table=table, cache_seqlens=lengths, _host={})


def _refused_in_full(context: Context, inputs: Inputs, what: str) -> None:
    """Where the HAL itself is told to read indices, nothing of this kind comes as far as a backend."""
    level = validation_level()
    set_validation("full")
    try:
        call(inputs, context.backend)
    except hal.SpecError:
        return
    except Exception as error:
        context.problem(f"{what}: raised {type(error).__name__} ({error}) under full validation, not SpecError")
    else:
        context.problem(f"{what} was not refused under full validation")
    finally:
        set_validation(level)


def _between_blocks(cache: Guarded) -> Guarded:
    """The same cache with a block of NaN before its first and after its last."""
    blocks, *block = cache.view.shape
    shape, device = (blocks + 2, *block), str(cache.view.device)
    larger = place("kv_cache", shape, cache.view.dtype, device, fill=float("nan"))
    larger.view[1:-1] = cache.view
    return dataclasses.replace(larger, view=larger.view[1:-1])


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


_SPOILS = (float("nan"), float("inf"), -float("inf"))


@holds("MLA-52")
def rows_apart(context: Context) -> None:
    """Keys of some sequences, or queries of some heads, are NaN or inf, as after an overflow: the others are right."""
    draw = context.draw()
    several = draw.several_queries(4) if context.index % 3 == 2 else draw.queries()[0]
    lengths = tuple(n + several for n in draw.lengths(most=300, batch=(3, 6)))
    case = draw.base().but(lengths=lengths, data="hot", out_layout=draw.rng.choice(("none", "contiguous")), s_q=several)
    case = case.but(plan=context.index % 2 == 1)
    several_kv = [n for n in (2, 3, 4, 8) if n in context.dense.h_kv]
    if context.index % 4 == 1 and several_kv:
        case = case.but(**draw.heads(tuple(several_kv)))
    inputs = context.make(case)
    spoiled = torch.zeros(case.batch, case.s_q, case.h_q, dtype=torch.bool)
    if context.index % 4 < 2:
        # Of all KV heads, or where there are several of one.
        head = draw.rng.randrange(case.h_kv)
        kv = slice(None) if case.h_kv == 1 else slice(head, head + 1)
        group = case.h_q // case.h_kv
        mine = slice(None) if case.h_kv == 1 else slice(head * group, (head + 1) * group)
        for j in range(context.index // 2 % 2, case.batch, 2):
            pages = inputs.table[j, : -(-lengths[j] // case.page)].long().to(case.device)
            inputs.kv_cache.view[pages, :, kv] = draw.rng.choice(_SPOILS)
            spoiled[j, :, mine] = True
    else:
        for at in draw.rng.sample(range(spoiled.numel()), -(-spoiled.numel() // 3)):
            spoiled.view(-1)[at] = True
        inputs.q.view[spoiled.to(case.device)] = draw.rng.choice(_SPOILS)
    inputs.seal()
    outcome = context.run(inputs)
    if context.blind:
        return
    expected = context.expect(inputs)
    # What the spoiled rows give nobody says: NaN, or inf, or what a maximum leaves of it.
    flat = spoiled.transpose(1, 2)
    for rows, where in ((outcome.out, spoiled), (outcome.lse, flat), (expected.out, spoiled), (expected.lse, flat)):
        rows[where] = 0
    expected.out_magnitude[spoiled] = 1
    expected.lse_magnitude[flat] = 1
    rounding = expected.rounding
    expected.rounding = None if rounding is None else lambda: rounding().nan_to_num(0.0, 0.0, 0.0)
    context.wants_diagnosis = False
    if not context.compare(inputs, outcome, expected, what="rows beside those of NaN or inf: ").ok:
        context.record.diagnosis = {"cause": "a row is reached by what belongs to others, if only with weights of 0"}
