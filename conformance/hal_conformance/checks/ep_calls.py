"""E1: handles, events, hooks, repetition and overflow: what lies between one call of the normal mode and the next."""

from __future__ import annotations

from typing import Any

import torch

from hal.reference.ep import RankInput
from hal_conformance.checks import holds
from hal_conformance.checks.ep_normal import draw
from hal_conformance.context import Context
from hal_conformance.ep import Late, Ref, Step
from hal_conformance.ep_judge import same
from hal_conformance.ep_play import play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import Round, scripts

PAUSE = 0.5
"""Seconds a late rank is late: much longer than a call, much shorter than any timeout."""

MANY = 270
"""Rounds on one buffer: more than eight bits count."""

MANY_LIMIT = 100.0
"""Seconds for so many rounds, where a call takes a tenth of one."""


MODEL = 60
"""Dispatches of one forward pass, whose handles all live: the backward pass uses them."""

MODEL_AT = 2
"""The case that has so many; a quick run has none."""


@holds("EPN-20")
def cached_handles(context: Context) -> None:
    """Other rows over the routes of a dispatch, before and after a dispatch with other routes."""
    case = draw(context).base((3, 2, 4), bias=1)
    if "expand" in context.ep.layouts:
        case = case.but(expand=context.index % 2 == 1, alignment=1 + 3 * (context.index // 2 % 2))
    first = Round(context, case)
    other = Round(context, case)
    again, more = first.again(), first.again()
    played = play(
        context,
        case,
        scripts(
            case,
            lambda r: [
                first.dispatch(r, "first"),
                other.dispatch(r, "other"),
                again.dispatch(r, "cached", handle=Ref("first")),
                first.combine(r, "combine first", of="first"),
                again.combine(r, "combine cached", of="cached"),
                other.combine(r, "combine other", of="other"),
                more.dispatch(r, "cached of cached", handle=Ref("cached")),
                more.combine(r, "combine by the first handle", of="first"),
            ],
        ),
    )
    first.judge_dispatch(played, "first")
    other.judge_dispatch(played, "other")
    again.judge_dispatch(played, "cached", earlier=first.inputs)
    first.judge_combine(played, "combine first")
    again.judge_combine(played, "combine cached")
    other.judge_combine(played, "combine other")
    more.judge_dispatch(played, "cached of cached")
    more.judge_combine(played, "combine by the first handle")


@holds("EPN-21")
def backward(context: Context) -> None:
    """Gradients by mirrored calls, against autograd over the same sums."""
    case = draw(context).base((2, 3), weights="", dtype=_widest(context))
    case = draw(context).sized(case)
    made = Round(context, case)
    # Small whole numbers: sums are exact, so autograd and the backend agree bit for bit.
    inputs = [RankInput((g.x.float() * 2).round().clamp(-8, 8).to(g.x.dtype), g.topk_idx) for g in made.inputs]
    grads = [RankInput((g.x.float() * 3).round().clamp(-8, 8).to(g.x.dtype), g.topk_idx) for g in made.inputs]
    leaves = [g.x.double().requires_grad_() for g in inputs]
    total = torch.zeros((), dtype=torch.float64)
    for received in made.wants:
        for source, token in received.source:
            total = total + (leaves[source][token] * grads[source].x[token].double()).sum()
    if total.requires_grad:
        torch.autograd.backward(total)
    forward, mirrored = Round(context, case, inputs), Round(context, case, grads)
    played = play(
        context,
        case,
        scripts(
            case,
            lambda r: [
                forward.dispatch(r, "dispatch"),
                # The gradient of combine is a dispatch with the handle; that of dispatch a combine.
                mirrored.dispatch(r, "gradient of combine", handle=Ref("dispatch")),
                Step(
                    "combine",
                    "gradient of dispatch",
                    {"x": Ref("gradient of combine", "recv_x"), "handle": Ref("dispatch")},
                ),
            ],
        ),
    )
    mirrored.judge_dispatch(played, "gradient of combine")
    for rank, leaf in enumerate(leaves):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        want = (gradient + 0.0).to(case.torch_dtype)  # a sum begins with 0, which makes a negative zero positive
        same(context, rank, "gradient of dispatch", played.result(rank, "gradient of dispatch")["combined_x"], want)


def _widest(context: Context) -> str:
    return "float32" if "float32" in context.ep.dtypes else context.ep.dtypes[0]


@holds("EPN-22")
def same_bits(context: Context) -> None:
    """The same calls again and again, ranks arriving in every order; and very often on one buffer."""
    many = context.index % 4 == 3
    case = draw(context).base((2,) if many else (3, 4, 2), routing="mixed", bias=1)
    case = case.but(tokens=(2,) * case.ranks) if many else case
    made = Round(context, case)
    repeats = MANY if many else 6 if context.settings.mode == "quick" else 15
    late = 0.0 if many else 0.004
    pauses = [[context.rng.random() * late for _ in range(2 * repeats)] for _ in range(case.ranks)]

    def steps(rank: int) -> list[Step]:
        found = []
        for turn in range(repeats):
            found.append(Step("sleep", args={"seconds": pauses[rank][2 * turn]}))
            found.append(made.dispatch(rank, f"dispatch {turn}"))
            found.append(Step("sleep", args={"seconds": pauses[rank][2 * turn + 1]}))
            found.append(made.combine(rank, f"combine {turn}", of=f"dispatch {turn}"))
        return found

    played = play(context, case, scripts(case, steps), timeout=MANY_LIMIT)
    made.judge_dispatch(played, "dispatch 0")
    made.judge_combine(played, "combine 0")
    for turn in range(1, repeats):
        for rank in range(case.ranks):
            for call, key in ((f"dispatch {turn}", "recv_x"), (f"combine {turn}", "combined_x")):
                first = played.result(rank, call.split()[0] + " 0")[key]
                if not same(context, rank, f"{key} of {call}", played.result(rank, call)[key], first):
                    return


@holds("EPN-23")
def previous_event(context: Context) -> None:
    """Rows that are there only once the event was waited for."""
    case = draw(context).base((2, 3, 4))
    made = Round(context, case)

    def late(step: Step) -> Step:
        rows = step.args["x"]
        poison = torch.full_like(rows, float("nan"))
        return Step(step.op, step.name, {**step.args, "x": poison, "previous_event": Late(rows)})

    asynchronous: dict[str, Any] = {"async_finish": True} if context.index % 2 and context.ep.async_finish else {}

    def steps(rank: int) -> list[Step]:
        found = [late(made.dispatch(rank, **asynchronous))]
        if asynchronous:
            found.append(Step("finish", "received", {"of": "dispatch"}))
        found.append(late(made.combine(rank, **asynchronous)))
        if asynchronous:
            found.append(Step("finish", "summed", {"of": "combine"}))
        return found

    played = play(context, case, scripts(case, steps))
    made.judge_dispatch(played, step="received" if asynchronous else "")
    made.judge_combine(played, step="summed" if asynchronous else "")


def _under_way(context: Context, **flags: Any) -> None:
    """Several calls under way, finished in another order than they were made; in turn on another thread."""
    elsewhere = context.index % 2 == 1
    case = draw(context).base((2, 3, 4), bias=1)
    rounds = [Round(context, case) for _ in range(4)]
    order = context.rng.sample(range(3), 3)

    def steps(rank: int) -> list[Step]:
        *first, last = rounds
        found = [made.dispatch(rank, f"dispatch {i}", **flags) for i, made in enumerate(first)]
        found += [Step("finish", f"received {i}", {"of": f"dispatch {i}", "elsewhere": elsewhere}) for i in order]
        found += [made.combine(rank, f"combine {i}", of=f"dispatch {i}", **flags) for i, made in enumerate(first)]
        # A whole round while sums are under way.
        found += [last.dispatch(rank, "dispatch 3", **flags), Step("finish", "received 3", {"of": "dispatch 3"})]
        found += [last.combine(rank, "combine 3", of="dispatch 3", **flags)]
        late = [Step("finish", f"summed {i}", {"of": f"combine {i}", "elsewhere": elsewhere}) for i in reversed(order)]
        return [*found, *late, Step("finish", "summed 3", {"of": "combine 3"})]

    played = play(context, case, scripts(case, steps))
    for i, made in enumerate(rounds):
        made.judge_dispatch(played, f"dispatch {i}", step=f"received {i}")
        made.judge_combine(played, f"combine {i}", step=f"summed {i}")


@holds("EPN-24")
def asynchronous(context: Context) -> None:
    """Several calls under way, finished in another order than they were made."""
    _under_way(context, async_finish=True)


@holds("EPN-25")
def results_stay(context: Context) -> None:
    """Results of earlier calls after later calls, and after the buffer is closed; the handles of a whole model."""
    case = draw(context).base((2, 3), bias=1)
    many = context.index == MODEL_AT
    if many:
        case = case.but(tokens=tuple(context.rng.randint(1, 3) for _ in range(case.ranks)))
    count = MODEL if many else 4 if context.settings.mode == "quick" else 12
    rounds = [Round(context, case) for _ in range(count)]
    order = list(range(count)) if many else context.rng.sample(range(count), count)

    def steps(rank: int) -> list[Step]:
        found = [made.dispatch(rank, f"dispatch {i}") for i, made in enumerate(rounds)]
        return found + [rounds[i].combine(rank, f"combine {i}", of=f"dispatch {i}") for i in order]

    def later(step: str) -> Step:
        return Step("look", f"later {step}", {"of": step})

    every = [f"{kind} {i}" for i in range(count) for kind in ("dispatch", "combine")]
    looked = [script + [later(name) for name in every] for script in scripts(case, steps)]
    played = play(context, case, looked)
    for i, made in enumerate(rounds):
        made.judge_dispatch(played, f"dispatch {i}", step=f"later dispatch {i}")
        made.judge_combine(played, f"combine {i}", step=f"later combine {i}")


@holds("EPN-26")
def receive_hook(context: Context) -> None:
    """A call with a hook does not wait for a late rank, and does not keep the others waiting."""
    case = draw(context).base((2, 3), bias=1)
    made = Round(context, case)
    flags: dict[str, Any] = {"return_recv_hook": True}
    late = context.rng.randrange(case.ranks)

    def steps(rank: int) -> list[Step]:
        pause = [Step("sleep", args={"seconds": PAUSE})] if rank == late else []
        return [
            made.dispatch(rank, "warm"),
            *pause,
            made.dispatch(rank, **flags),
            Step("finish", "received", {"of": "dispatch"}),
            made.combine(rank, **flags),
            Step("finish", "summed", {"of": "combine"}),
        ]

    played = play(context, case, scripts(case, steps))
    made.judge_dispatch(played, step="received")
    made.judge_combine(played, step="summed")
    _under_way(context, **flags)


@holds("EPN-27")
def overflow_is_an_error(context: Context) -> None:
    """More rows than there is room for: the same SpecError everywhere, and the next call works."""
    case = draw(context).base((2, 3, 4), routing="one")
    tokens = tuple(6 for _ in range(case.ranks))
    case = case.but(tokens=tokens, room=6 * case.ranks - 1)
    full, fitting = Round(context, case), Round(context, case.but(tokens=(2,) * case.ranks))
    played = play(
        context,
        case,
        scripts(case, lambda r: [full.dispatch(r, "too many"), fitting.dispatch(r)]),
        raising=("too many",),
    )
    refused_alike(context, played, "too many")
    fitting.judge_dispatch(played)


@holds("EPN-28")
def overflow_drops(context: Context) -> None:
    """The rows that come last are dropped, counted, and absent from every sum."""
    case = draw(context).base((2, 3, 4), routing=("one", "mixed")[context.index % 2], bias=1)
    case = case.but(tokens=tuple(7 for _ in range(case.ranks)), overflow="drop", room=context.rng.randint(1, 12))
    if "expand" in context.ep.layouts and context.index % 4 >= 2:
        case = case.but(expand=True)
    made = Round(context, case)
    again = made.again() if context.ep.cached_handle else None

    def steps(rank: int) -> list[Step]:
        found = [made.dispatch(rank), made.combine(rank)]
        if again is not None:
            found.append(again.dispatch(rank, "cached", handle=Ref("dispatch")))
            found.append(again.combine(rank, "combine cached", of="cached"))
        return found

    played = play(context, case, scripts(case, steps))
    made.judge_dispatch(played)
    made.judge_combine(played)
    if again is not None:
        again.judge_dispatch(played, "cached", earlier=made.inputs)
        again.judge_combine(played, "combine cached")


@holds("EPN-29")
def overflow_grows(context: Context) -> None:
    """A window too small at first holds everything all the same, results of before too."""
    case = draw(context).base((2, 3), routing="one", bias=1).but(overflow="grow", room=2)
    small = Round(context, case.but(tokens=(1,) * case.ranks, capacity=case.most))
    large = Round(context, case)
    # Of fewer tokens than a call then has, too.
    few = {"max_tokens_per_rank": 1} if context.index % 2 else {}
    played = play(
        context,
        case,
        scripts(
            case,
            lambda r: [
                small.dispatch(r, "small"),
                large.dispatch(r, "large"),
                Step("look", "small again", {"of": "small"}),
                large.combine(r, "combine large", of="large"),
                small.combine(r, "combine small", of="small"),
            ],
            **few,
        ),
    )
    small.judge_dispatch(played, "small", step="small again")
    large.judge_dispatch(played, "large")
    large.judge_combine(played, "combine large")
    small.judge_combine(played, "combine small")
