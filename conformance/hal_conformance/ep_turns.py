"""Rounds of all declared modes in turn, over the same inputs: what ranks do while some of them fail or are masked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hal.reference.ep import RankInput
from hal_conformance.context import Context
from hal_conformance.ep import CALLS, Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_play import Played
from hal_conformance.ep_round import PackedRound, Round


@dataclass(frozen=True, slots=True)
class Turns:
    """A round of each mode that is declared.

    Attributes
    ----------
    normal : Round or None
    packed : PackedRound or None
    hooks : bool
        Whether the low-latency calls of every other turn are completed by their hooks.
    """

    normal: Round | None
    packed: PackedRound | None
    hooks: bool

    @property
    def modes(self) -> tuple[str, ...]:
        """Of the buffer for these calls."""
        return ("normal",) * (self.normal is not None) + ("low_latency",) * (self.packed is not None)

    @property
    def inputs(self) -> list[RankInput]:
        """What every rank sends."""
        found = self.normal or self.packed
        assert found is not None
        return found.inputs

    def steps(self, rank: int, turns: int, name: str = "{}") -> list[Step]:
        """So many rounds of all declared calls; ``name`` is what their names are put into."""
        found = []
        for turn in range(turns):
            if self.normal is not None:
                found.append(self.normal.dispatch(rank, f"dispatch {turn}"))
                found.append(self.normal.combine(rank, f"combine {turn}", of=f"dispatch {turn}"))
            if self.packed is not None:
                calls = [self.packed.dispatch(rank, f"packed {turn}")]
                calls.append(self.packed.combine(rank, f"summed {turn}", of=f"packed {turn}"))
                found += [hooked(call) for call in calls] if self.hooks and turn % 2 else calls
                found.append(Step("drop", args={"of": f"packed {turn}"}))
        return [named_as(name, step) for step in found]

    def judge(self, played: Played, turns: int, name: str = "{}", ranks: Collection[int] | None = None) -> None:
        """Compare what came of `steps`."""
        for turn in range(turns):
            if self.normal is not None:
                self.normal.judge_dispatch(played, name.format(f"dispatch {turn}"), ranks=ranks)
                self.normal.judge_combine(played, name.format(f"combine {turn}"), ranks=ranks)
            if self.packed is not None:
                self.packed.judge_dispatch(played, name.format(f"packed {turn}"), ranks=ranks)
                self.packed.judge_combine(played, name.format(f"summed {turn}"), ranks=ranks)


def in_turn(
    context: Context, case: EpCase, inputs: Sequence[RankInput] | None = None, absent: Collection[int] = ()
) -> Turns:
    """Rounds of the modes that are declared for one node, or for several where the case has some."""
    modes = [m for m in context.ep.modes if case.per_node is None or m in context.ep.across_nodes]
    made = packed = None
    if "normal" in modes:
        made = Round(context, case.but(cast="none"), inputs, absent)
        inputs = made.inputs
    if "low_latency" in modes:
        packed = PackedRound(context, case, inputs, absent)
    return Turns(made, packed, context.ep.recv_hook)


def calls(steps: Sequence[Step], mode: str = "") -> list[str]:
    """The names of the calls among steps, of one mode if one is given."""
    return [step.name for step in steps if step.op in CALLS and mode in ("", mode_of(step))]


def mode_of(step: Step) -> str:
    """The mode a call belongs to."""
    made = step.args["call"].op if step.op == "hooked" else step.op
    return "low_latency" if made.startswith("low_latency") else "normal"


def hooked(call: Step) -> Step:
    """A call and its hook in one step."""
    made = Step(call.op, call.name, {**call.args, "return_recv_hook": True}, call.on)
    return Step("hooked", call.name, {"call": made}, call.on)


def named_as(name: str, step: Step, on: str = "") -> Step:
    """A step whose result, and those it refers to, have other names: ``name`` with the old one put in.

    ``on`` is the buffer it is made on, where that is another one.
    """

    def renamed(key: str, value: object) -> object:
        if isinstance(value, Ref):
            return Ref(name.format(value.name), value.field)
        if isinstance(value, Step):
            return named_as(name, value, on)
        return name.format(value) if key in ("of", "into") else value

    args = {key: renamed(key, value) for key, value in step.args.items()}
    return Step(step.op, name.format(step.name) if step.name else "", args, on or step.on, step.elsewhere)
