"""One round of an expert-parallel mode on all ranks: inputs, what the oracle makes of them, steps, judgement."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hal.reference import ep as oracle
from hal.reference.ep import RankInput
from hal_conformance import ep_judge, ep_sums
from hal_conformance.context import Context
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_play import Played, play
from hal_conformance.memory import Placed

CASTS: Final[dict[str, dict[str, bool]]] = {
    "none": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8_pow2": {"use_fp8": True, "round_scale": True},
    "fp8_ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}

ENDS: Final[dict[str, dict[str, Any]]] = {
    "call": {},
    "event": {"async_finish": True},
    "hook": {"return_recv_hook": True},
}
"""How a call ends, by `hal_conformance.cover_ep.FINISH`."""


def placed(case: EpCase, tensor: Tensor) -> Tensor | Placed:
    """A tensor as it lies in its caller's memory, whose rows may be apart and which may begin anywhere."""
    return Placed(tensor, case.pad, case.start) if case.pad or case.start else tensor


def _tokens(case: EpCase, x: Tensor) -> Tensor | Placed:
    """The same of tokens, which may also be one row of memory."""
    return Placed(x, 0, case.start, once=True) if case.once else placed(case, x)


class Round:
    """A normal dispatch and its combine.

    Parameters
    ----------
    context : Context
    case : EpCase
    inputs : sequence of RankInput, optional
        Of every rank; made from the case where none are given.
    absent : collection of int
        Masked ranks.
    """

    def __init__(
        self,
        context: Context,
        case: EpCase,
        inputs: Sequence[RankInput] | None = None,
        absent: Collection[int] = (),
    ) -> None:
        self.context, self.case, self.absent = context, case, absent
        self.inputs = list(inputs) if inputs is not None else case.inputs(context.tensor_seed())
        room = case.room if case.overflow == "drop" else None
        self.wants = oracle.dispatch(
            self.inputs,
            case.experts,
            expand=case.expand,
            expert_alignment=case.alignment,
            max_recv_tokens=room,
            absent=absent,
        )
        self.outputs = case.outputs([len(want.x) for want in self.wants], context.tensor_seed())
        self.bias = case.biases(context.tensor_seed())
        self.weights = [want.topk_weights for want in self.wants] if case.weights and case.back else None
        self._sums: list[tuple[Tensor, Tensor | None]] | None = None

    @property
    def sums(self) -> list[tuple[Tensor, Tensor | None]]:
        """What combine must give on every rank."""
        if self._sums is None:
            weights = None if self.weights is None else [w for w in self.weights if w is not None]
            self._sums = oracle.combine(
                self.outputs,
                self.wants,
                self.inputs,
                self.case.experts,
                expand=self.case.expand,
                topk_weights=weights,
                bias=self.bias,
                ranks_per_node=self.case.per_node if self.case.pre_reduce else None,
                absent=self.absent,
            )
        return self._sums

    def again(self, *, weights: bool = True, absent: Collection[int] = ()) -> Round:
        """Other rows and outputs, and weights if any, over the same routes, as a cached dispatch has them."""
        case = self.case if weights else self.case.but(weights="")
        others = zip(case.inputs(self.context.tensor_seed()), self.inputs, strict=True)
        rows = [RankInput(o.x, mine.topk_idx, o.topk_weights, o.scales) for o, mine in others]
        return Round(self.context, case, rows, absent)

    def without(self, absent: Collection[int]) -> Round:
        """What was dispatched with all ranks, and is combined when these are masked."""
        found = copy.copy(self)
        found.absent, found._sums = absent, None
        return found

    def dispatch(self, rank: int, name: str = "dispatch", *, handle: Ref | None = None, **flags: Any) -> Step:
        """The step of a rank; with a handle a cached one."""
        case, given = self.case, self.inputs[rank]
        x: Any = _tokens(case, given.x)
        if given.scales is not None:
            x = (x, placed(case, given.scales))
        arguments: dict[str, Any] = {"x": x, **flags}
        if given.topk_weights is not None:
            arguments["topk_weights"] = placed(case, given.topk_weights)
        if handle is not None:
            return Step("dispatch", name, arguments | {"handle": handle})
        arguments["topk_idx"] = placed(case, given.topk_idx)
        if case.expand:
            arguments["expand"] = True
        if case.alignment > 1:
            arguments["expert_alignment"] = case.alignment
        if case.worst:
            arguments["num_worst_tokens"] = case.worst
        return Step("dispatch", name, arguments)

    def combine(self, rank: int, name: str = "combine", *, of: str = "dispatch", **flags: Any) -> Step:
        """The step of a rank."""
        case = self.case
        rows = case.worst or len(self.outputs[rank])
        x = placed(case, ep_judge.padded(self.outputs[rank], rows))
        arguments: dict[str, Any] = {"x": x, "handle": Ref(of), **flags}
        weights = self.weights[rank] if self.weights is not None else None
        if weights is not None:
            arguments["topk_weights"] = placed(case, ep_judge.padded(weights, rows))
        if self.bias[rank]:
            biases = tuple(placed(case, one) for one in self.bias[rank])
            arguments["bias"] = biases if len(biases) > 1 else biases[0]
        return Step("combine", name, arguments)

    def judge_dispatch(
        self,
        played: Played,
        name: str = "dispatch",
        *,
        ranks: Collection[int] | None = None,
        step: str = "",
        earlier: Sequence[RankInput] = (),
    ) -> None:
        """Compare every rank's dispatch; ``step`` is where its result was taken, if not there."""
        for rank in range(self.case.ranks) if ranks is None else ranks:
            got = played.result(rank, step or name)
            if not got:
                continue  # It raised, which is noted already.
            self.context.record.sizes.add(self.case)
            ep_judge.received(
                self.context, self.case, self.inputs, rank, got, self.wants, name, earlier=earlier, weights=True
            )

    def judge_combine(
        self, played: Played, name: str = "combine", *, ranks: Collection[int] | None = None, step: str = ""
    ) -> None:
        """Compare every rank's combine."""
        for rank in range(self.case.ranks) if ranks is None else ranks:
            terms = ep_sums.of_normal(self.case, self.inputs, rank, self.wants, self.outputs, self.bias[rank])
            got = played.result(rank, step or name)
            ep_judge.combined(self.context, rank, got, self.sums[rank], terms, name)


class PackedRound:
    """A low-latency dispatch and its combine."""

    def __init__(
        self,
        context: Context,
        case: EpCase,
        inputs: Sequence[RankInput] | None = None,
        absent: Collection[int] = (),
    ) -> None:
        self.context, self.case, self.absent = context, case, absent
        self.inputs = list(inputs) if inputs is not None else case.inputs(context.tensor_seed())
        self.wants = oracle.low_latency_dispatch(self.inputs, case.experts, case.most, cast=case.cast, absent=absent)
        rows = case.local * case.ranks * case.most
        flat = case.outputs([rows] * case.ranks, context.tensor_seed())
        self.outputs = [one.view(case.local, case.ranks * case.most, case.hidden) for one in flat]
        for want, output in zip(self.wants, self.outputs, strict=True):
            for local, count in enumerate(want.count.tolist()):
                output[local, count:] = torch.nan
        self._sums: list[Tensor] | None = None

    def without(self, absent: Collection[int]) -> PackedRound:
        """What was dispatched with all ranks, and is combined when these are masked."""
        found = copy.copy(self)
        found.absent, found._sums = absent, None
        return found

    @property
    def sums(self) -> list[Tensor]:
        """What combine must give on every rank."""
        if self._sums is None:
            self._sums = oracle.low_latency_combine(self.outputs, self.wants, self.inputs, absent=self.absent)
        return self._sums

    def dispatch(self, rank: int, name: str = "dispatch", **flags: Any) -> Step:
        """The step of a rank."""
        given, case = self.inputs[rank], self.case
        arguments = {"x": _tokens(case, given.x), "topk_idx": placed(case, given.topk_idx)}
        return Step("low_latency_dispatch", name, {**arguments, **CASTS[case.cast], **flags})

    def combine(self, rank: int, name: str = "combine", *, of: str = "dispatch", **flags: Any) -> Step:
        """The step of a rank."""
        given, case = self.inputs[rank], self.case
        assert given.topk_weights is not None
        arguments = {
            "x": placed(case.but(pad=0), self.outputs[rank]),
            "topk_idx": placed(case, given.topk_idx),
            "topk_weights": placed(case, given.topk_weights),
            "handle": Ref(of),
        }
        return Step("low_latency_combine", name, {**arguments, **flags})

    def judge_dispatch(
        self, played: Played, name: str = "dispatch", *, ranks: Collection[int] | None = None, step: str = ""
    ) -> None:
        """Compare every rank's dispatch."""
        for rank in range(self.case.ranks) if ranks is None else ranks:
            got = played.result(rank, step or name)
            if not got:
                continue  # It raised, which is noted already.
            self.context.record.sizes.add(self.case)
            ep_judge.packed(self.context, self.case, self.inputs, rank, got, self.wants, name)

    def judge_combine(
        self, played: Played, name: str = "combine", *, ranks: Collection[int] | None = None, step: str = ""
    ) -> None:
        """Compare every rank's combine."""
        for rank in range(self.case.ranks) if ranks is None else ranks:
            terms = ep_sums.of_packed(self.case, self.inputs, rank, self.wants, self.outputs)
            got = played.result(rank, step or name)
            ep_judge.combined(self.context, rank, got, (self.sums[rank], None), terms, name)


def scripts(case: EpCase, steps: Any, mode: Any = "normal", **buffer: Any) -> list[list[Step]]:
    """Open a buffer, do ``steps(rank)``, close it, on every rank."""
    opened = Step("open", "buffer", case.buffer(mode, **buffer))
    return [[opened, *steps(rank), Step("close", "close")] for rank in range(case.ranks)]


def normal(context: Context, case: EpCase, inputs: Sequence[RankInput] | None = None, **flags: Any) -> Round:
    """Play and judge one normal round."""
    made = Round(context, case, inputs)
    steps = scripts(case, lambda r: [made.dispatch(r, **flags), made.combine(r, **flags)])
    played = play(context, case, steps, first=made.judge_dispatch)
    made.judge_dispatch(played)
    made.judge_combine(played)
    return made


def low_latency(context: Context, case: EpCase, **flags: Any) -> PackedRound:
    """Play and judge one low-latency round."""
    made = PackedRound(context, case)
    steps = scripts(case, lambda r: [made.dispatch(r, **flags), made.combine(r, **flags)], "low_latency")
    played = play(context, case, steps, first=made.judge_dispatch)
    made.judge_dispatch(played)
    made.judge_combine(played)
    return made
