"""Wrong results that are the right ones times a number, or plus one: what is fitted over the rows, and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from hal.spec.limits import Limits
from hal_conformance.case import MlaCase
from hal_conformance.decode import Expected, Outcome, Verdict, judge

_NEAR: Final = 0.01
"""How far a fitted number may be from a known one to be taken for it, relative to it."""

_LEAST: Final = 3
"""Wrong values below which any number fits."""

_ANY: Final = Limits(math.inf, math.inf, math.inf, math.inf)


def fitted(
    case: MlaCase, outcome: Outcome, expected: Expected, verdict: Verdict, out_limits: Limits, lse_limits: Limits
) -> str:
    """What makes the wrong result of the right one, as *out is 0.5 times the reference*; empty if nothing does."""
    found = []
    if not verdict.out.ok:
        found.append(_out(case, outcome, expected, verdict, out_limits))
    if not verdict.lse.ok:
        found.append(_lse(case, outcome, expected, verdict, lse_limits))
    return " and ".join(found) if all(found) else ""


def _out(case: MlaCase, outcome: Outcome, expected: Expected, verdict: Verdict, limits: Limits) -> str:
    have, want = outcome.out[verdict.out.bad].double(), expected.out[verdict.out.bad]
    if not bool(have.isfinite().all()) or have.numel() < _LEAST or not bool(want.any()) or not bool(have.any()):
        return ""
    factor = float((have * want).sum() / (want * want).sum())

    def right(out: Tensor) -> bool:
        twin = Expected(out, expected.lse, expected.out_magnitude * max(1.0, abs(factor)), expected.lse_magnitude)
        return judge(outcome.out, outcome.lse, twin, limits, _ANY).out.ok

    return _named("out", factor, _factors(case), expected.out, verdict.out.bad, torch.mul, right)


def _lse(case: MlaCase, outcome: Outcome, expected: Expected, verdict: Verdict, limits: Limits) -> str:
    bad = verdict.lse.bad
    have, want = outcome.lse[bad].double(), expected.lse[bad]
    if not bool(have.isfinite().all() & want.isfinite().all()) or have.numel() < _LEAST or not bool(want.any()):
        return ""
    offset = float((have - want).median())
    factor = float((have * want).sum() / (want * want).sum())

    def right(lse: Tensor) -> bool:
        twin = Expected(expected.out, lse, expected.out_magnitude, expected.lse_magnitude)
        return judge(outcome.out, outcome.lse, twin, _ANY, limits).lse.ok

    return _named("lse", offset, _offsets(case), expected.lse, bad, torch.add, right) or _named(
        "lse", factor, _factors(case), expected.lse, bad, torch.mul, right
    )


def _named(
    name: str,
    fit: float,
    known: dict[str, float],
    reference: Tensor,
    bad: Tensor,
    change: Callable[[Tensor, float], Tensor],
    right: Callable[[Tensor], bool],
) -> str:
    """The sentence, with the plainest number that explains the result."""
    rows = bad.unsqueeze(-1) if reference.dim() > bad.dim() else bad
    for value, called in _plainest(fit, known):
        changed = change(reference, value)
        # A row with nothing to attend stays as it is: infinity times a number is no evidence.
        changed = torch.where(reference.isfinite(), changed, reference)
        for part, where in ((changed, ""), (torch.where(rows, changed, reference), " in the wrong rows")):
            if right(part):
                said = f"{value:.6g} times the reference" if change is torch.mul else f"the reference plus {value:.6g}"
                return f"{name} is {said}{called}{where}"
    return ""


def _plainest(fit: float, known: dict[str, float]) -> Iterator[tuple[float, str]]:
    """Numbers near a fitted one: known ones, then itself with as few digits as will do."""
    near = [(value, called) for called, value in known.items() if abs(fit - value) <= _NEAR * abs(value)]
    yield from ((value, f" ({called})") for value, called in sorted(near, key=lambda one: abs(one[0] - fit)))
    for digits in (1, 2, 3, 4, 6):
        yield float(f"{fit:.{digits}g}"), ""


def _factors(case: MlaCase) -> dict[str, float]:
    scale = case.d**-0.5 if case.scale is None else case.scale
    found = {
        "ln 2": math.log(2),
        "log2 e": 1 / math.log(2),
        "sqrt(head_dim)": case.d**0.5,
        "1/sqrt(head_dim)": case.d**-0.5,
        "sqrt(head_dim_v)": case.d_v**0.5,
        "1/sqrt(head_dim_v)": case.d_v**-0.5,
        "448, the largest float8_e4m3fn": 448.0,
        "1/448, of the largest float8_e4m3fn": 1 / 448,
        "softmax_scale": scale,
        "the heads of a group": float(case.h_q // case.h_kv),
    }
    return {called: value for called, value in found.items() if value not in (0.0, 1.0)}


def _offsets(case: MlaCase) -> dict[str, float]:
    logs = {"2": 2.0, "448": 448.0, "page_size": float(case.page), "head_dim": float(case.d)}
    found = {f"ln {called}": math.log(value) for called, value in logs.items()}
    if case.lse_base == "2":
        found |= {f"log2 {called}": math.log2(value) for called, value in logs.items() if value != 2}
    return {
        f"{sign}{called}": -value if sign else value for called, value in found.items() for sign in ("", "-") if value
    }
