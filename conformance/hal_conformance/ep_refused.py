"""Wrong calls: the same SpecError on every rank, nobody waiting, and the next call as if nothing had been."""

from __future__ import annotations

from collections.abc import Collection

from hal_conformance.context import Context
from hal_conformance.ep_play import Played

SOON = 6.0
"""Seconds after which a rank that learns of a wrong call has waited for a timeout instead."""


def refused_alike(
    context: Context, played: Played, name: str, argument: str = "", ranks: Collection[int] = (), what: str = ""
) -> bool:
    """Whether a step raised the same SpecError, naming this argument where one is given, on all ranks, at once."""
    title = what or name
    before = len(context.record.problems)
    texts: dict[str, list[int]] = {}
    for rank in ranks or range(len(played.steps)):
        done = played[rank, name]
        kind = done.raised["type"] if done.raised else ""
        text = str(done.raised["text"]) if done.raised else ""
        if kind != "SpecError":
            how = f"raised {kind}: {text}" if kind else "returned a result"
            context.problem(f"{title}: rank {rank} {how}, where every rank must raise the same SpecError")
        else:
            texts.setdefault(text, []).append(rank)
            if argument and done.raised and done.raised.get("argument") not in argument.split("|"):
                context.problem(f"{title}: rank {rank} names {done.raised.get('argument')!r}, not {argument!r}: {text}")
        if done.end - done.begin > SOON:
            context.problem(f"{title}: rank {rank} heard of it only after {done.end - done.begin:.1f} s")
    if len(texts) > 1:
        context.problem(f"{title}: different errors on different ranks: {texts}")
    good = len(context.record.problems) == before
    if not good and context.record.diagnosis is None:
        refused = [
            rank for rank, steps in enumerate(played.steps) if (steps[name].raised or {}).get("type") == "SpecError"
        ]
        if 0 < len(refused) < len(played.steps):
            context.record.diagnosis = {
                "cause": f"the error is raised on rank {refused[0]} only; the others are not told"
            }
        elif not refused:
            context.record.diagnosis = {"cause": "the misuse is not noticed"}
    return good
