"""E1, E2 and E3: calls while a setting of the process is another."""

from __future__ import annotations

import dataclasses

from hal_conformance.around import SETTINGS
from hal_conformance.checks import holds
from hal_conformance.checks.ep_low_latency import base, few
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.cover_ep import endings
from hal_conformance.ep import Step
from hal_conformance.ep_play import Played, play
from hal_conformance.ep_round import ENDS, PackedRound, Round, scripts


def _count(context: Context) -> int:
    return 1 if context.settings.mode == "quick" else len(SETTINGS)


def _whatever_is_set(context: Context, made: Round | PackedRound, mode: str) -> None:
    """A buffer opened, and calls ended in every way, here or on another thread, while something is set; one after."""
    setting = list(SETTINGS)[(context.settings.seed + context.index) % len(SETTINGS)]
    elsewhere = context.rng.random() < 0.5
    whens = {f"{end} with {setting}": end for end in endings(context.ep)} | {f"call after {setting}": "call"}

    def calls(rank: int, when: str) -> list[Step]:
        end = whens[when]
        done = Step("look" if end == "call" else "finish", args={"elsewhere": elsewhere})
        dispatch, combine = f"dispatch: {when}", f"combine: {when}"
        found = [
            made.dispatch(rank, dispatch, **ENDS[end]),
            dataclasses.replace(done, name=f"received: {when}", args={**done.args, "of": dispatch}),
            made.combine(rank, combine, of=dispatch, **ENDS[end]),
            dataclasses.replace(done, name=f"summed: {when}", args={**done.args, "of": combine}),
        ]
        return found if "after" in when else [dataclasses.replace(step, around=setting) for step in found]

    def steps(rank: int) -> list[Step]:
        return [step for when in whens for step in calls(rank, when)]

    def arrived(played: Played) -> None:
        for when in whens:
            made.judge_dispatch(played, f"dispatch: {when}", step=f"received: {when}")

    opened = [[dataclasses.replace(one[0], around=setting), *one[1:]] for one in scripts(made.case, steps, mode)]
    played = play(context, made.case, opened, first=arrived)
    arrived(played)
    for when in whens:
        made.judge_combine(played, f"combine: {when}", step=f"summed: {when}")


@holds("EPN-19", _count)
def whatever_is_set(context: Context) -> None:
    """The normal mode, in any layout."""
    expand = context.rng.choice([name == "expand" for name in context.ep.layouts])
    _whatever_is_set(context, Round(context, draw(context).base((2, 3), bias=1, expand=expand)), "normal")


@holds("EPL-24", _count)
def whatever_is_set_packed(context: Context) -> None:
    """The low-latency mode, with any cast."""
    cast = context.rng.choice(draw(context).casts() or context.ep.casts)
    _whatever_is_set(context, PackedRound(context, few(base(context, (2, 3), cast=cast))), "low_latency")


@holds("EPX-06", _count)
def whatever_is_set_across_nodes(context: Context) -> None:
    """The low-latency mode over several nodes, where what is put off may be done on a thread of the engine's own."""
    cast = context.rng.choice(draw(context).casts() or context.ep.casts)
    _whatever_is_set(context, PackedRound(context, draw(context).across(cast=cast)), "low_latency")
