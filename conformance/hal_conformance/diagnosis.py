"""What is wrong with a result: where, how far, and the likely cause where one can be tested mechanically."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.limits import DENSE_LSE, Limits
from hal_conformance.decode import Expected, Outcome, Verdict, judge
from hal_conformance.fits import fitted
from hal_conformance.hypotheses import attend, causes
from hal_conformance.inputs import Inputs
from hal_conformance.limits import number
from hal_conformance.memory import unwritten

_WORK: Final = 3e9
"""Floating-point operations of a case above which hypotheses, each a run of the reference, are not tried."""

_SHOWN: Final = 12


def diagnose(
    inputs: Inputs, outcome: Outcome, expected: Expected, verdict: Verdict, out_limits: Limits, lse_limits: Limits
) -> dict[str, Any]:
    """Everything the report tells of one wrong result."""
    cause = _by_looking(outcome, expected, verdict)
    likely = ""
    if not cause and inputs.case.flops() <= _WORK:
        cause, likely = _by_hypothesis(inputs, outcome, expected, verdict, out_limits, lse_limits)
    # A number that fits says less than a bug that does, and more than one that explains only some rows.
    cause = cause or fitted(inputs.case, outcome, expected, verdict, out_limits, lse_limits) or likely
    return {
        "cause": cause,
        "where": where(inputs, outcome, expected, verdict),
        "out": verdict.out.to_dict(),
        "lse": verdict.lse.to_dict(),
    }


def rows_of(inputs: Inputs, bad: Tensor) -> list[tuple[int, int, int]]:
    """Bad rows of out ([.., h_q]) as (sequence, query of it, head)."""
    case = inputs.case
    if case.q_lens is None:
        return [(j, i, h) for j, i, h in bad.nonzero().tolist()]
    owners = [(j, i) for j, count in enumerate(case.q_lens) for i in range(count)]
    return [(*owners[row], h) for row, h in bad.nonzero().tolist()]


def heads_last(lse: Tensor) -> Tensor:
    """Lse in the layout of out's rows."""
    return lse.transpose(-1, -2)


def where(inputs: Inputs, outcome: Outcome, expected: Expected, verdict: Verdict) -> dict[str, Any]:
    """Sequences, queries and heads concerned, the element range, and the first wrong value."""
    case = inputs.case
    bad = verdict.out.bad | heads_last(verdict.lse.bad)
    rows = rows_of(inputs, bad)
    found: dict[str, Any] = {
        "rows": f"{len(rows)} of {bad.numel()}",
        "out": not verdict.out.ok,
        "lse": not verdict.lse.ok,
        "sequences": _range(sorted({j for j, _, _ in rows}), case.batch),
        "queries": _range(sorted({i for _, i, _ in rows}), max(case.queries, default=0)),
        "heads": _range(sorted({h for _, _, h in rows}), case.h_q),
        "lengths": sorted({case.lengths[j] for j, _, _ in rows})[:_SHOWN],
    }
    if not verdict.out.ok:
        at = verdict.out.worst_row
        have, want = outcome.out[at].double(), expected.out[at]
        off = ~((have - want).abs() <= 1e-3 * (1 + want.abs()))
        columns = off.nonzero().flatten().tolist()
        first = columns[0] if columns else int((have - want).abs().argmax())
        found["worst_row"] = {
            "at": list(at),
            "columns": _range(columns, case.d_v),
            "first": f"out[{', '.join(map(str, (*at, first)))}] is {number(float(have[first]))}, "
            f"the reference {number(float(want[first]))}",
        }
    elif not verdict.lse.ok:
        at = verdict.lse.worst_row
        found["worst_row"] = {
            "at": list(at),
            "first": f"lse[{', '.join(map(str, at))}] is {number(float(outcome.lse[at]))}, "
            f"the reference {number(float(expected.lse[at]))}",
        }
    return found


def _range(values: list[int], size: int) -> str:
    if not values:
        return "none"
    if len(values) == size:
        return f"all {size}"
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}…{values[-1]} of {size}"
    more = f" … ({len(values)} of {size})" if len(values) > _SHOWN else f" of {size}"
    return ", ".join(map(str, values[:_SHOWN])) + more


def _by_looking(outcome: Outcome, expected: Expected, verdict: Verdict) -> str:
    """Causes that show without recomputing: unwritten memory, wrong empty values, swapped layouts."""
    empty = expected.lse.isinf()
    wrong_lse = verdict.lse.bad
    bad_rows = verdict.out.bad
    if bool((bad_rows | heads_last(wrong_lse)).any()) and not bool(
        ((bad_rows | heads_last(wrong_lse)) & ~heads_last(empty)).any()
    ):
        return _empty_cause(outcome.out[heads_last(empty)], outcome.lse[empty])
    fresh = unwritten(outcome.out).any(-1)
    if bool((fresh & bad_rows).any()):
        where = "" if bool((fresh == bad_rows).all()) else " (other rows are wrong in another way)"
        return f"rows of out are never written{where}"
    if bool(unwritten(outcome.lse).any()):
        return "values of lse are never written"
    if verdict.out.ok and not verdict.lse.ok:
        again = judge(outcome.out, _unswap(outcome.lse), expected, _NO_LIMITS, _LSE)
        if again.lse.ok:
            return "lse is stored transposed: queries before heads"
    return ""


_NO_LIMITS = Limits(float("inf"), float("inf"), float("inf"), float("inf"))
_LSE = Limits(DENSE_LSE.absolute, DENSE_LSE.relative, float("inf"), float("inf"))


def _unswap(lse: Tensor) -> Tensor:
    """Read lse as if heads came last in memory."""
    *lead, heads, queries = lse.shape
    return lse.reshape(*lead, queries, heads).transpose(-1, -2)


def _empty_cause(out: Tensor, lse: Tensor) -> str:
    parts = []
    if bool((lse != torch.inf).any()):
        value = lse[lse != torch.inf][0]
        fresh = bool(unwritten(lse)[lse != torch.inf].all())
        parts.append("lse is never written" if fresh else f"lse is {number(float(value))} instead of +inf")
    if bool((out != 0).any()):
        fresh = bool(unwritten(out)[out != 0].all())
        parts.append("out is never written" if fresh else f"out is {number(float(out[out != 0][0]))} instead of 0")
    return f"rows with nothing to attend (empty): {' and '.join(parts)}"


def _by_hypothesis(
    inputs: Inputs, outcome: Outcome, expected: Expected, verdict: Verdict, out_limits: Limits, lse_limits: Limits
) -> tuple[str, str]:
    """The first changed reference that gives this result; and one that gives only the wrong rows of it."""
    bad = verdict.out.bad | heads_last(verdict.lse.bad)
    partly = ""
    for name, variant in causes(inputs):
        changed = attend(inputs, variant)
        # One that reads poison gives NaN, and NaN explains nothing.
        if changed is None or bool(changed[0].isnan().any()):
            continue
        twin = Expected(*changed, expected.out_magnitude, expected.lse_magnitude)
        then = judge(outcome.out, outcome.lse, twin, out_limits, lse_limits)
        if then.ok:
            return name, ""
        if not partly and not bool(((then.out.bad | heads_last(then.lse.bad)) & bad).any()):
            partly = f"{name} (in the wrong rows; the others are right)"
    zero = not verdict.out.ok and bool((outcome.out[verdict.out.bad] == 0).all())
    return "", partly or ("wrong rows are 0: they are never computed, or lost" if zero else "")
