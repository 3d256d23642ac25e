"""Where inside the kernel a wrong result begins.

A backend may expose its partial results: a method ``mla_trace(args)`` beside ``mla_decode(args)``, returning
``{"stages": [...]}``, one entry for every sequence and split with ``sequence``, ``start`` and ``stop`` (key positions)
and any of ``scores`` [s_q, h_q, keys], ``row_max``, ``row_sum``, ``partial_lse`` [s_q, h_q] and ``partial_out``
[s_q, h_q, d_v]. These are compared in that order. Without it the result is bisected from outside: the same data with
ever shorter sequences.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor

import hal
from hal_conformance.case import MlaCase
from hal_conformance.checks import load
from hal_conformance.context import BackendRaised, Context, Stop
from hal_conformance.decode import call, expect, judge, watched
from hal_conformance.inputs import Inputs, build
from hal_conformance.memory import place

STAGES: Final = ("scores", "row_max", "row_sum", "partial_lse", "partial_out")
_CLOSE: Final = 2e-2
"""Of partial results: loose, because a stage may be kept in a short format; a bug is off by more."""


def bisect(context: Context) -> dict[str, Any]:
    """Run the case, then compare stage by stage, or by shorter and shorter sequences."""
    context.wants_diagnosis = False
    try:
        load()[context.obligation.id].run(context)
    except (Stop, BackendRaised) as stopped:
        context.problem(str(stopped))
    record = context.record
    if record.case is None or "ranks" in record.case:
        return {"refused": "it makes no single call that could be taken apart, or none that is wrong"}
    case = MlaCase.from_dict(record.case)
    inputs = build(case, record.tensors)
    found: dict[str, Any] = {"case": record.case, "problems": record.problems}
    try:
        with watched(context.backend) as watcher:
            outcome = call(inputs, context.backend)
            trace = getattr(watcher.inner, "mla_trace", None)
    except Exception as error:
        return found | {"rows": [], "verdict": f"the call raises {type(error).__name__}: {error}"}
    expected = expect(inputs)
    verdict = judge(outcome.out, outcome.lse, expected, *context.limits())
    merged = [
        {"stage": f"merged {name}", "where": "all", "worst": f"{c.worst:.3g} × limit", "ok": c.ok}
        for name, c in (("lse", verdict.lse), ("out", verdict.out))
    ]
    if trace is not None:
        rows = _stages(inputs, context.backend)
        first = next((row for row in [*rows, *merged] if not row["ok"]), None)
        text = (
            "all stages agree with the reference"
            if first is None
            else f"first wrong: {first['stage']}, {first['where']}"
        )
        return found | {"rows": rows + merged, "verdict": text}
    rows = [] if verdict.ok else _prefixes(context, inputs, verdict.out.bad | verdict.lse.bad.transpose(-1, -2))
    text = "the result agrees with the reference" if verdict.ok else _first_prefix(rows)
    return found | {"rows": rows + merged, "verdict": f"{text} (this backend exposes no partial results)"}


def _stages(inputs: Inputs, backend: str) -> list[dict[str, Any]]:
    positional, keywords = inputs.arguments()
    with watched(backend) as watcher:
        hal.mla_decode(*positional, **keywords, batch_invariant=inputs.case.batch_invariant, backend=backend)
        assert watcher.last is not None
        stages = watcher.inner.mla_trace(watcher.last)["stages"]  # type: ignore[attr-defined]
    rows = []
    for stage in stages:
        right = _right(inputs, stage["sequence"], stage["start"], stage["stop"])
        for name in STAGES:
            if name not in stage:
                continue
            worst, ok = _off(stage[name].detach().cpu().double(), right[name], right["row_sum"] == 0)
            where = f"sequence {stage['sequence']}, keys {stage['start']}…{stage['stop'] - 1}"
            rows.append({"stage": name, "where": where, "worst": worst, "ok": ok})
    return rows


def _right(inputs: Inputs, sequence: int, start: int, stop: int) -> dict[str, Tensor]:
    """The stages of one split in float64."""
    case = inputs.case
    scale = case.d**-0.5 if case.scale is None else case.scale
    keys = inputs.keys(sequence)[start:stop].repeat_interleave(case.h_q // case.h_kv, 1)
    scores = scale * torch.einsum("shd,nhd->shn", inputs.queries(sequence), keys)
    seen = torch.tensor([case.visible(sequence, i) for i in range(case.queries[sequence])])
    hidden = torch.arange(start, stop) >= seen.view(-1, 1, 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    top = scores.amax(-1)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0)[..., None])
    total = weights.sum(-1)
    out = torch.einsum("shn,nhv->shv", weights, keys[..., : case.d_v]) / total[..., None]
    return {
        "scores": scores,
        "row_max": top,
        "row_sum": total,
        "partial_lse": top + torch.log(total),
        "partial_out": out,
    }


def _off(have: Tensor, want: Tensor, nothing: Tensor) -> tuple[str, bool]:
    """The largest error relative to 1 + |want| over rows that attend something."""
    if have.shape != want.shape:
        return f"shape {list(have.shape)}, not {list(want.shape)}", False
    rows = ~nothing
    have, want = have[rows], want[rows]
    if not bool((have.isfinite() == want.isfinite()).all()):
        return "inf or NaN differ", False
    finite = want.isfinite()
    error = ((have - want).abs() / (1 + want.abs()))[finite]
    worst = float(error.max()) if error.numel() else 0.0
    return f"{worst:.2e}", worst <= _CLOSE


def _prefixes(context: Context, inputs: Inputs, bad: Tensor) -> list[dict[str, Any]]:
    """Decode the first wrong sequence alone, ever longer; lengths around pages, then the exact first wrong one."""
    case = inputs.case
    if case.q_lens is not None:
        return []
    sequence = int(bad.flatten(1).any(1).nonzero()[0])
    length = case.lengths[sequence]
    edges = {1, length} | {n for k in range(1, length // case.page + 2) for n in (k * case.page, k * case.page + 1)}
    tried: dict[int, bool] = {}

    def wrong(n: int) -> bool:
        if n not in tried:
            tried[n] = not _alone(context, inputs, sequence, n)
        return tried[n]

    candidates = sorted(n for n in edges if case.s_q <= n <= length)[:40]
    first = next((n for n in candidates if wrong(n)), None)
    if first is not None:
        low = max((n for n in candidates if n < first), default=case.s_q - 1)
        while first - low > 1:
            middle = (first + low) // 2
            low, first = (low, middle) if wrong(middle) else (middle, first)
    return [
        {
            "stage": "decoded alone",
            "where": f"sequence {sequence}, first {n} keys",
            "worst": "wrong" if is_wrong else "right",
            "ok": not is_wrong,
        }
        for n, is_wrong in sorted(tried.items())
    ]


def _alone(context: Context, inputs: Inputs, sequence: int, length: int) -> bool:
    """Whether one sequence, cut to a length, is decoded right on the same cache."""
    case = inputs.case.but(lengths=(length,), out_layout="none", plan=False)
    one = slice(sequence, sequence + 1)
    alone = Inputs(
        case,
        dataclasses.replace(inputs.q, view=inputs.q.view[one]),
        inputs.kv_cache,
        dataclasses.replace(inputs.block_table, view=inputs.block_table.view[one]),
        place("cache_seqlens", (1,), torch.int32, case.device, fill=length),
        None,
        inputs.table[one],
    )
    outcome = call(alone, context.backend)
    return judge(outcome.out, outcome.lse, expect(alone), *context.limits()).ok


def _first_prefix(rows: list[dict[str, Any]]) -> str:
    first = next((row for row in rows if not row["ok"]), None)
    if first is None:
        return "wrong in the batch, right for each length of the first wrong sequence alone"
    return f"first wrong: {first['where']}"
