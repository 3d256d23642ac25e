"""E1 and E2: wrong and differing calls are refused alike on all ranks, and the next call is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hal.spec.ep import MODES, OVERFLOW
from hal_conformance.checks import holds
from hal_conformance.checks.ep_low_latency import base
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.draw import members
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_draw import EpDraw
from hal_conformance.ep_play import Played, play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import CASTS, PackedRound, Round, scripts
from hal_conformance.memory import Placed

Wrong = tuple[str, str, Callable[[int], Step]]
"""What is wrong, the argument that must be named (or several, with |), and the call of each rank."""


def _but(step: Step, **changes: Any) -> Step:
    arguments = {k: v for k, v in {**step.args, **changes}.items() if v is not _GONE}
    return Step(step.op, step.name, arguments, step.on)


_GONE = object()


def _play_wrong(
    context: Context, made: Round | PackedRound, before: Callable[[int], list[Step]], wrong: Sequence[Wrong], mode: Any
) -> None:
    """Make each wrong call, then a right one."""
    case = made.case

    def steps(rank: int) -> list[Step]:
        found = before(rank)
        for number, (_, _, call) in enumerate(wrong):
            step = call(rank)
            found.append(Step(step.op, f"wrong {number}", step.args, step.on))
            found.append(made.dispatch(rank, f"right {number}"))
            if isinstance(made, PackedRound):
                found.append(Step("drop", args={"of": f"right {number}"}))
        return found

    names = [f"wrong {number}" for number in range(len(wrong))]

    def judge(played: Played) -> None:
        for number, (title, argument, _) in enumerate(wrong):
            if not refused_alike(context, played, f"wrong {number}", argument, what=title):
                return
            made.judge_dispatch(played, f"right {number}")

    judge(play(context, case, scripts(case, steps, mode), raising=names, first=judge))


@holds("EPN-30")
def wrong_calls(context: Context) -> None:
    """One rank's wrong dtype, shape, expert; calls that differ between ranks; a handle of another dispatch."""
    case = draw(context).base((3, 2), topk=members(context.ep.topk, (3, 2))[0])
    case = case.but(tokens=tuple(max(n, 3) for n in case.tokens))
    made = Round(context, case)
    odd = context.rng.randrange(case.ranks)
    right, sums = made.dispatch, made.combine

    def one(change: Callable[[Step], Step], of: Callable[[int], Step] = right) -> Callable[[int], Step]:
        return lambda rank: change(of(rank)) if rank == odd else of(rank)

    other = torch.float32 if case.dtype != "float32" else torch.bfloat16
    wrong: list[Wrong] = [
        ("x of another dtype on one rank", "x", one(lambda s: _but(s, x=s.args["x"].to(other)))),
        ("x of another width on one rank", "x", one(lambda s: _but(s, x=s.args["x"][:, :-1].contiguous()))),
        ("an expert out of range on one rank", "topk_idx", one(lambda s: _beyond(s, case))),
        ("an expert below -1 on one rank", "topk_idx", one(lambda s: _but(s, topk_idx=s.args["topk_idx"] * 0 - 2))),
        ("topk_idx of int32 on one rank", "topk_idx", one(lambda s: _but(s, topk_idx=s.args["topk_idx"].int()))),
        ("a row too few in combine on one rank", "x", one(lambda s: _short(s), sums)),
    ]
    # Wrong beside what the others call, and by itself right.
    unlike: list[Wrong] = [
        ("weights on all ranks but one", "topk_weights", one(lambda s: _but(s, topk_weights=_GONE))),
        ("expert_alignment differs", "expert_alignment", one(lambda s: _but(s, expert_alignment=4))),
        (
            "combine on one rank, dispatch on the others",
            "",
            lambda rank: sums(rank) if rank == odd else right(rank),
        ),
        ("handles of different dispatches", "handle", one(lambda s: _but(s, handle=Ref("second")), sums)),
    ]
    if case.topk > 1:
        unlike.append(
            (
                "fewer choices on one rank",
                "topk_idx|topk_weights",
                one(lambda s: _but(s, topk_idx=s.args["topk_idx"][:, :1], topk_weights=s.args["topk_weights"][:, :1])),
            )
        )
    if "expand" in context.ep.layouts:
        unlike.append(("the expand layout on one rank", "expand", one(lambda s: _but(s, expand=True))))
    if context.ep.cached_handle:
        unlike.append(
            (
                "a cached dispatch on one rank",
                "handle|topk_idx",
                one(lambda s: _but(s, topk_idx=_GONE, handle=Ref("first"))),
            )
        )
    wrong += unlike if case.ranks > 1 else []
    chosen = wrong if context.settings.mode == "full" else context.rng.sample(wrong, 5)

    def before(rank: int) -> list[Step]:
        # Both dispatches are alike, so that only what a handle is told apart by differs.
        return [made.dispatch(rank, "dispatch"), made.dispatch(rank, "first"), made.dispatch(rank, "second")]

    _play_wrong(context, made, before, chosen, "normal")


def _beyond(step: Step, case: EpCase) -> Step:
    """Of every choice the first expert that there is not."""
    return _but(step, topk_idx=torch.full_like(step.args["topk_idx"], case.experts))


def _short(step: Step) -> Step:
    """A row too few or, where there is none, one too many."""
    x = step.args["x"]
    return _but(step, x=x[1:] if len(x) else x.new_zeros(1, *x.shape[1:]))


@holds("EPN-31")
def foreign_handles(context: Context) -> None:
    """A handle of another buffer, and of a closed one, is refused on every rank."""
    case = draw(context).base((2, 3))
    made = Round(context, case)

    def steps(rank: int) -> list[Step]:
        opened = Step("open", "other", case.buffer())
        first = made.dispatch(rank, "elsewhere")
        elsewhere = Step(first.op, first.name, first.args, "other")
        wrong = [made.combine(rank, f"wrong {i}", of="elsewhere") for i in range(2)]
        close = Step("close", "closed", on="other")
        return [
            opened,
            elsewhere,
            wrong[0],
            made.dispatch(rank, "right 0"),
            close,
            wrong[1],
            made.dispatch(rank, "right 1"),
        ]

    played = play(context, case, scripts(case, steps), raising=("wrong 0", "wrong 1"))
    for i in range(2):
        refused_alike(context, played, f"wrong {i}", "handle", what=("another", "a closed")[i] + " buffer's handle")
        made.judge_dispatch(played, f"right {i}")


@holds("EPN-32")
def buffers_differ(context: Context) -> None:
    """Buffers whose arguments differ between ranks, or are wrong on one; then one that works."""
    case = draw(context).base((2, 3), topk=members(context.ep.topk, (2, 1))[0])
    made = Round(context, case)
    odd = context.rng.randrange(case.ranks)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("hidden", {"hidden": case.hidden + 1}),
        ("num_experts", {"num_experts": 0}),
        ("modes", {"modes": ("fast",)}),
        ("timeout", {"timeout": -1.0}),
    ]
    # What differs must be legal by itself, and declared: else it is refused for another reason.
    if case.ranks > 1:
        changes.append(("max_tokens_per_rank", {"max_tokens_per_rank": case.most + 1}))
        changes.append(("max_recv_tokens", {"max_recv_tokens": case.ranks * case.most + 1}))
    if case.ranks > 1 and case.experts + 1 in context.ep.num_experts:
        changes.append(("num_experts", {"num_experts": case.experts + 1}))
    if case.ranks > 1 and 2 * case.hidden * case.torch_dtype.itemsize in context.ep.row_bytes:
        changes.append(("hidden", {"hidden": 2 * case.hidden}))
    chosen = changes if context.settings.mode == "full" else context.rng.sample(changes, 4)

    def script(rank: int) -> list[Step]:
        found = []
        for number, (_, change) in enumerate(chosen):
            found.append(Step("open", f"wrong {number}", case.buffer(**(change if rank == odd else {}))))
        return [*found, Step("open", "buffer", case.buffer()), made.dispatch(rank), made.combine(rank)]

    names = [f"wrong {number}" for number in range(len(chosen))]
    played = play(context, case, [script(rank) for rank in range(case.ranks)], raising=names)
    for number, (argument, change) in enumerate(chosen):
        refused_alike(context, played, f"wrong {number}", argument, what=f"a buffer with {change} on rank {odd} only")
    made.judge_dispatch(played)
    made.judge_combine(played)


def undeclared_buffers(context: Context, case: EpCase) -> list[dict[str, Any]]:
    """Arguments, each legal, of buffers outside the declaration."""
    ep, size = context.ep, case.torch_dtype.itemsize
    plain = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    found: list[dict[str, Any]] = [{"dtype": dtype} for name, dtype in plain.items() if name not in ep.dtypes]
    found += [{"topk": n} for n in (1, 3, 7, 9, 33) if n not in ep.topk][:2]
    found += [{"num_experts": n} for n in (1, 3, 7, 100, 257) if n not in ep.num_experts][:2]
    found += [{"hidden": n // size} for n in (16, 48, 80, 1 << 20) if n not in ep.row_bytes][:2]
    found += [{"overflow": word} for word in OVERFLOW if word not in ep.overflow]
    found += [{"modes": (mode,)} for mode in MODES if mode not in ep.modes]
    found += [{"mask_ranks": True}] * (not ep.mask_ranks) + [{"pre_reduce": True}] * (not ep.pre_reduce)
    return found + [{"ranks_per_node": 1}] * (case.ranks not in ep.nodes)


def _undeclared_count(context: Context) -> int:
    # Where everything of the specification is declared, the one case left is that nothing was left out.
    return max(1, len(undeclared_buffers(context, draw(context).base((2, 3)))))


@holds("EPN-33", _undeclared_count)
def undeclared_is_refused(context: Context) -> None:
    """Open one buffer outside the declaration, then one inside it."""
    case = EpDraw(context.rng, context.ep, 0).base((2, 3))
    changes = undeclared_buffers(context, case)
    made = Round(context, case)
    refused = [Step("open", "undeclared", case.buffer(**change)) for change in changes[context.index :][:1]]
    right = Step("open", "buffer", case.buffer())
    scripts = [[*refused, right, made.dispatch(rank), Step("close")] for rank in range(case.ranks)]
    played = play(context, case, scripts, raising=("undeclared",))
    made.judge_dispatch(played)
    for rank, steps in enumerate(played.steps if refused else []):
        raised = steps["undeclared"].raised or {"type": "nothing"}
        if raised["type"] != "UnsupportedError":
            change = changes[context.index]
            context.problem(f"rank {rank}: a buffer with {change} is not declared, and raises {raised['type']}")


@holds("EPL-15")
def wrong_low_latency_calls(context: Context) -> None:
    """The same for the low-latency mode."""
    case = base(context, (2, 3))
    case = case.but(tokens=tuple(max(n, 3) for n in case.tokens))
    made = PackedRound(context, case)
    odd = context.rng.randrange(case.ranks)
    right, sums = made.dispatch, made.combine

    def one(change: Callable[[Step], Step], of: Callable[[int], Step] = right) -> Callable[[int], Step]:
        return lambda rank: change(of(rank)) if rank == odd else of(rank)

    other = torch.float32 if case.dtype != "float32" else torch.bfloat16
    rows = made.inputs[odd].x
    many = torch.cat([rows] * (case.most // len(rows) + 1))[: case.most + 1]
    wrong: list[Wrong] = [
        ("x of another dtype on one rank", "x", one(lambda s: _but(s, x=s.args["x"].to(other)))),
        ("an expert out of range on one rank", "topk_idx", one(lambda s: _beyond(s, case))),
        (
            "more tokens than max_tokens_per_rank on one rank",
            "x",
            one(lambda s: _but(s, x=many, topk_idx=torch.zeros(len(many), case.topk, dtype=torch.int64))),
        ),
        ("another topk_idx in combine", "topk_idx", one(lambda s: _but(s, topk_idx=s.args["topk_idx"][1:]), sums)),
        (
            "weights of another shape",
            "topk_weights",
            one(lambda s: _but(s, topk_weights=s.args["topk_weights"][1:]), sums),
        ),
    ]
    apart = Placed(made.outputs[odd], pad=8)
    wrong.append(("rows of combine that are apart", "x", one(lambda s: _but(s, x=apart), sums)))
    if context.ep.zero_copy_combine:
        wrong.append(("zero_copy of memory that nobody lent", "x", lambda rank: _but(sums(rank), zero_copy=True)))
    if not CASTS[case.cast].get("round_scale"):
        title = "use_ue8m0 without round_scale"
        wrong.append((title, "use_ue8m0", lambda rank: _but(right(rank), use_ue8m0=True)))
    if case.ranks > 1:
        title = "combine on one rank, dispatch on the others"
        wrong.append((title, "", lambda rank: sums(rank) if rank == odd else right(rank)))
    if case.ranks > 1 and case.hidden % 16 == 0 and "fp8" in context.ep.casts and "none" in context.ep.casts:
        wrong.append(("use_fp8 on one rank", "use_fp8", one(lambda s: _but(s, use_fp8=True))))
    chosen = wrong if context.settings.mode == "full" else context.rng.sample(wrong, min(4, len(wrong)))
    _play_wrong(context, made, lambda rank: [made.dispatch(rank, "dispatch")], chosen, "low_latency")
