"""L2: what a process does around a call: changes memory, has settings of its own, and has threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from torch import Tensor

import hal
from hal_conformance.around import SETTINGS
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import BackendRaised, Context
from hal_conformance.decode import Outcome, plan_for
from hal_conformance.draw import Draw
from hal_conformance.inputs import Inputs
from hal_conformance.memory import Guarded, same_bits

_TURNS: Final = {"quick": 12, "default": 25, "full": 200}
"""Calls of each thread."""


@holds("MLA-49")
def memory_as_it_is(context: Context) -> None:
    """The same tensors with other contents, written where torch does not count it; then other views of that memory."""
    draw = context.draw()
    case = draw.base().but(lengths=draw.lengths(most=200, batch=(2, 3)), pages="ordered", data="hot")
    inputs, _, verdict = context.check(case)
    if not verdict.ok:
        return
    plan = plan_for(inputs, context.backend) if context.index % 2 else None
    layer = _overwritten(inputs, context.make(case), ("kv_cache",))
    context.compare(layer, context.run(layer, plan=plan), what="other contents in the same cache: ")
    moved = _overwritten(layer, context.make(case.but(pages="shuffled")), ("q", "kv_cache", "block_table"))
    context.compare(moved, context.run(moved, plan=plan), what="other contents in the same tensors: ")
    shorter = case.but(lengths=tuple(max(1, n - draw.rng.randint(0, 3)) for n in case.lengths), pages="ordered")
    if _pages(shorter) != _pages(case):
        shorter = case
    viewed = _viewed_again(_overwritten(moved, context.make(shorter)))
    context.compare(viewed, context.run(viewed), what="other contents in the same memory: ")


def _pages(case: MlaCase) -> list[int]:
    return [-(-n // case.page) for n in case.lengths]


def _overwritten(inputs: Inputs, others: Inputs, names: tuple[str, ...] = ()) -> Inputs:
    """Put the contents of other tensors of these sizes into the memory of these; all of them if no names are given."""
    for mine, theirs in zip(inputs.guarded(), others.guarded(), strict=True):
        if not names or mine.name in names:
            # What is written through .data, torch's version counter does not count.
            mine.storage.data.copy_(theirs.storage)
    inputs.seal()
    case = others.case if not names else inputs.case.but(pages=others.case.pages)
    table = others.table if not names or "block_table" in names else inputs.table
    return dataclasses.replace(inputs, case=case, table=table, seed=others.seed, _host={})


def _viewed_again(inputs: Inputs) -> Inputs:
    """New tensors of the same memory."""

    def again(guarded: Guarded) -> Guarded:
        old = guarded.view
        view = guarded.storage.as_strided(old.shape, old.stride(), old.storage_offset())
        return dataclasses.replace(guarded, view=view)

    return dataclasses.replace(
        inputs,
        q=again(inputs.q),
        kv_cache=again(inputs.kv_cache),
        block_table=again(inputs.block_table),
        cache_seqlens=again(inputs.cache_seqlens),
    )


@holds("MLA-50", lambda context: len(SETTINGS))
def whatever_is_set(context: Context) -> None:
    """A call and one with a plan while a setting of the process is another."""
    draw = context.draw()
    name, setting = list(SETTINGS.items())[context.index]
    case = draw.base().but(lengths=draw.lengths(most=200, batch=(1, 3)), out_layout="none", data="hot")
    if context.dense.causal:
        s_q = draw.rng.choice(draw.queries())
        case = case.but(causal=True, s_q=s_q, lengths=tuple(n + s_q for n in case.lengths))
    for one in (case, case.but(plan=True, lse_base=context.dense.lse_bases[-1])):
        inputs = context.make(one)
        context.compare(inputs, context.run(inputs, around=setting), what=f"with {name}: ")
    context.check(case, what=f"after a call with {name}: ")


@holds("MLA-51")
def two_threads(context: Context) -> None:
    """Two threads make calls of different sizes and scales, each many times with tensors of its own.

    A plan is made by the thread that uses it, or in turn by another.
    """
    draw = context.draw()
    cases = [_of_a_thread(draw, scale) for scale in (0.3, 0.02)]
    if context.index % 2:
        # Longer than one split, which the schedule of a plan is about.
        cases[0] = cases[0].but(plan=True, lengths=(draw.rng.randint(600, 1500), *cases[0].lengths))
    every = [context.make(case) for case in cases]
    before = [plan_for(inputs, context.backend) if context.index % 2 and inputs.case.plan else None for inputs in every]
    turns = _TURNS[context.settings.mode]
    found = context.together([_turns(context, inputs, turns, plan) for inputs, plan in zip(every, before, strict=True)])
    for case, inputs, given in zip(cases, every, found, strict=True):
        _right_every_time(context, case, inputs, given)


def _of_a_thread(draw: Draw, scale: float) -> MlaCase:
    most = 300 if draw.rng.random() < 0.5 else 1500
    case = draw.base().but(lengths=draw.lengths(most=most, batch=(1, 3)), scale=scale, data="hot")
    return case.but(lse_base=draw.rng.choice(draw.declared.lse_bases), plan=draw.rng.random() < 0.5)


Results = list[tuple[Tensor, Tensor]]


def _turns(context: Context, inputs: Inputs, turns: int, before: hal.MlaPlan | None) -> Callable[[], Results]:
    positional, keywords = inputs.arguments()

    def run() -> Results:
        plan = plan_for(inputs, context.backend) if inputs.case.plan and before is None else before
        found = (hal.mla_decode(*positional, **keywords, plan=plan, backend=context.backend) for _ in range(turns))
        return [(out.cpu(), lse.cpu()) for out, lse in found]

    return run


def _right_every_time(context: Context, case: MlaCase, inputs: Inputs, given: Results | BaseException) -> None:
    if isinstance(given, BaseException):
        raise BackendRaised(case, given) from given
    context.record.calls += len(given)
    expected, unlike = context.expect(inputs), given[:1]
    unlike += [one for one in given[1:] if not (same_bits(one[0], given[0][0]) and same_bits(one[1], given[0][1]))]
    wrong = sum(not context.right(*one, expected) for one in unlike)
    if wrong:
        out, lse = next(one for one in unlike if not context.right(*one, expected))
        context.compare(inputs, Outcome(out, lse, [], {}, 0.0), expected, what="beside a call of another thread: ")
