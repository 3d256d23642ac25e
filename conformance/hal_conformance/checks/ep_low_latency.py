"""E2: the low-latency mode: packing, casts, weighted sums, hooks, and how many results may live."""

from __future__ import annotations

from typing import Any

import torch

from hal.reference.ep import RankInput
from hal_conformance.checks import holds
from hal_conformance.checks.ep_calls import MANY, MANY_LIMIT, PAUSE
from hal_conformance.checks.ep_normal import LARGE, draw
from hal_conformance.context import Context
from hal_conformance.cover_ep import plain
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_draw import ROWS
from hal_conformance.ep_judge import differ, note, recv_stats, same, written
from hal_conformance.ep_play import Played, patiently, play
from hal_conformance.ep_refused import refused_alike
from hal_conformance.ep_round import PackedRound, low_latency, placed, scripts
from hal_conformance.memory import Placed


def base(context: Context, ranks: tuple[int, ...] = (2, 3, 4), **changes: object) -> EpCase:
    """A case of usual sizes with a declared cast, none where there is a choice."""
    return draw(context).base(ranks, **{"cast": draw(context).cast(), **changes})


def few(case: EpCase) -> EpCase:
    """Of few tokens, where there are many results: each has room for all that may come."""
    return case.but(tokens=tuple(min(n, 5) for n in case.tokens))


@holds("EPL-01")
def packing(context: Context) -> None:
    """Ordinary routing: rows, counts, where each came from."""
    case = base(context, (3, 2, 4, 1), routing=("distinct", "mixed")[context.index // 4 % 2])
    low_latency(context, case.but(capacity=case.most + context.rng.randrange(4)))


@holds("EPL-02")
def skewed(context: Context) -> None:
    """Every slot of one expert in use; holes and duplicates; ranks without tokens, and all of them."""
    kind = ("one", "same", "half", "avoid", "none", "empty", "zipf", "all empty")[context.index % 8]
    case = base(context, (3, 2, 4))
    if kind == "one":
        case = case.but(routing="one", tokens=(case.most,) * case.ranks)
    elif kind == "empty":
        case = case.but(tokens=(0, *case.tokens[1:]))
    elif kind == "all empty":
        case = case.but(tokens=(0,) * case.ranks)
    else:
        case = case.but(routing=kind)
    low_latency(context, case)


def _cast(context: Context, cast: str) -> None:
    data = ("extreme", "normal")[context.index % 2]
    case = base(context, (2, 3), cast=cast, data=data, dtype=context.rng.choice(plain(context.ep)))
    low_latency(context, case)


@holds("EPL-03")
def cast_fp8(context: Context) -> None:
    """Scales amax / 448 of 128 columns."""
    _cast(context, "fp8")


@holds("EPL-04")
def cast_pow2(context: Context) -> None:
    """Scales rounded up to powers of two."""
    _cast(context, "fp8_pow2")


@holds("EPL-05")
def cast_ue8m0(context: Context) -> None:
    """The same, packed as exponents."""
    _cast(context, "fp8_ue8m0")


@holds("EPL-06")
def weighted_sums(context: Context) -> None:
    """Weights, duplicates and order; weights that are NaN where no expert is chosen; out given and not."""
    kind = ("order", "same", "mixed", "half")[context.index % 4]
    case = base(context, (3, 2, 4), routing="distinct" if kind == "order" else kind)
    case = case.but(weights="holes" if kind in ("mixed", "half") else "usual")
    if kind == "order":
        topk = [n for n in (6, 5, 4, 3, 8, 2, 1) if n in context.ep.topk and n <= case.experts]
        case = case.but(data="order", topk=topk[0] if topk else case.topk)
    made = PackedRound(context, case)

    def steps(rank: int) -> list[Step]:
        out = torch.full((case.tokens[rank], case.hidden), 7.0).to(case.torch_dtype)
        given = Placed(out, 8) if context.index % 2 else out
        return [made.dispatch(rank), made.combine(rank, out=given)]

    played = play(context, case, scripts(case, steps, "low_latency"))
    made.judge_dispatch(played)
    made.judge_combine(played)
    for rank in range(case.ranks):
        written(context, rank, played.result(rank, "combine"))


@holds("EPL-07")
def any_sizes(context: Context) -> None:
    """Odd sizes and every declared dtype, rows of any bits too; large sizes."""
    if context.index % LARGE == LARGE - 1:
        cast = context.rng.choice(draw(context).casts())
        low_latency(context, draw(context).many(base(context, cast=cast)))
        low_latency(context, draw(context).wide(base(context, (2, 3))))
        low_latency(context, draw(context).crowd(base(context, (2,), cast=context.rng.choice(draw(context).casts()))))
        low_latency(context, draw(context).long(base(context, (2, 3))))
        return
    dtypes = plain(context.ep)
    case = base(context, (3, 2, 1, 4), dtype=dtypes[context.index % len(dtypes)])
    case = draw(context).odd(case)
    case = case.but(data=("normal", "bits")[context.index % 2] if case.cast == "none" else "normal")
    low_latency(context, draw(context).sized(case, ROWS))


def _late(context: Context, played: Played, late: int, early: str, what: str) -> None:
    """Note every rank whose call ended only after the late rank had made its own."""
    begins = played[late, early].begin
    for rank, steps in enumerate(played.steps):
        if rank != late and steps[early].end > begins:
            context.problem(
                f"rank {rank}: {what} waited {steps[early].end - steps[early].begin:.2f} s for rank {late}, which "
                "came later; with a hook a call returns at once"
            )
            if context.record.diagnosis is None:
                context.record.diagnosis = {"cause": "the call does the receive: the hook has nothing left to do"}


@holds("EPL-09")
@patiently
def hook_defers(context: Context, scale: float) -> None:
    """A call with a hook returns while another rank is late; nothing the caller gave is written before the hook."""
    case = base(context, (2, 3))
    made = PackedRound(context, case)
    late = context.rng.randrange(case.ranks)

    def steps(rank: int) -> list[Step]:
        stats = torch.full((case.local,), 5, dtype=torch.int32)
        out = torch.full((case.tokens[rank], case.hidden), 7.0).to(case.torch_dtype)
        pause = [Step("sleep", args={"seconds": PAUSE * scale})] if rank == late else []
        hook: dict[str, Any] = {"return_recv_hook": True}
        return [
            made.dispatch(rank, "warm"),
            Step("drop", args={"of": "warm"}),
            *pause,
            made.dispatch(rank, cumulative_local_expert_recv_stats=stats, **hook),
            Step("finish", "received", {"of": "dispatch"}),
            *pause,
            made.combine(rank, out=out, **hook),
            Step("finish", "summed", {"of": "combine"}),
        ]

    played = play(context, case, scripts(case, steps, "low_latency"))
    _late(context, played, late, "dispatch", "low_latency_dispatch with a hook")
    _late(context, played, late, "combine", "low_latency_combine with a hook")
    for rank in range(case.ranks):
        recv_stats(context, rank, played.result(rank, "received"), made.wants[rank].count + 5)
    made.judge_dispatch(played, step="received")
    made.judge_combine(played, step="summed")


@holds("EPL-10")
@patiently
def hook_blocks_nobody(context: Context, scale: float) -> None:
    """A rank that runs its hook late, and on another thread, keeps no other from receiving."""
    case = base(context, (2, 3))
    made = PackedRound(context, case)
    late = context.rng.randrange(case.ranks)

    def steps(rank: int) -> list[Step]:
        pause = [Step("sleep", args={"seconds": PAUSE * scale})] if rank == late else []
        return [
            made.dispatch(rank, return_recv_hook=True),
            *pause,
            Step("finish", "received", {"of": "dispatch", "elsewhere": True}),
            made.combine(rank),
        ]

    played = play(context, case, scripts(case, steps, "low_latency"))
    begins = played[late, "received"].begin
    for rank in range(case.ranks):
        if rank != late and played[rank, "received"].end > begins:
            context.problem(f"rank {rank}: its hook waited for the hook of rank {late}")
            context.record.diagnosis = context.record.diagnosis or {"cause": "rows are sent by the sender's hook"}
    made.judge_dispatch(played, step="received")
    made.judge_combine(played)


@holds("EPL-11")
def two_live_results(context: Context) -> None:
    """Two results live at a time, combined in either order; a third is refused; letting go counts as done."""
    case = base(context, (2, 3))
    pair = [PackedRound(context, case) for _ in range(2)]
    hooked: dict[str, Any] = {"return_recv_hook": True} if context.ep.recv_hook else {}

    def steps(rank: int) -> list[Step]:
        found = []
        for order in ((0, 1), (1, 0)):
            tag = f"{order[0]}{order[1]}"
            found += [made.dispatch(rank, f"dispatch {i}/{tag}", **hooked) for i, made in enumerate(pair)]
            found.append(pair[0].dispatch(rank, f"third/{tag}"))
            found += [
                Step("finish", f"received {i}/{tag}", {"of": f"dispatch {i}/{tag}"})
                if hooked
                else Step("look", f"received {i}/{tag}", {"of": f"dispatch {i}/{tag}"})
                for i in order
            ]
            for i in order:
                found.append(pair[i].combine(rank, f"combine {i}/{tag}", of=f"dispatch {i}/{tag}"))
                found.append(Step("drop", args={"of": f"dispatch {i}/{tag}"}))
                if i == order[0]:
                    found.append(Step("look", f"still {tag}", {"of": f"dispatch {order[1]}/{tag}"}))
        for turn in range(4):
            found += [pair[0].dispatch(rank, f"let go {turn}"), Step("drop", args={"of": f"let go {turn}"})]
        sums = [f"combine {i}/{tag}" for tag in ("01", "10") for i in range(2)]
        return found + [Step("look", f"later {name}", {"of": name}) for name in sums]

    thirds = ("third/01", "third/10")
    played = play(context, case, scripts(case, steps, "low_latency"), raising=thirds)
    for third in thirds:
        if not refused_alike(context, played, third, what="a third live result"):
            return
    for tag in ("01", "10"):
        for i, made in enumerate(pair):
            made.judge_dispatch(played, f"dispatch {i}/{tag}", step=f"received {i}/{tag}")
            made.judge_combine(played, f"combine {i}/{tag}")
            made.judge_combine(played, f"combine {i}/{tag}, looked at later", step=f"later combine {i}/{tag}")
        rest = pair[int(tag[1])]
        rest.judge_dispatch(played, "a live result after the other was combined", step=f"still {tag}")


@holds("EPL-13")
def same_bits(context: Context) -> None:
    """The same calls again and again, ranks arriving in every order; and very often on one buffer."""
    many = context.index % 4 == 3
    case = base(context, (2,) if many else (3, 4, 2), routing="mixed")
    case = case.but(tokens=(2,) * case.ranks) if many else case
    made = PackedRound(context, case)
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
            found.append(Step("drop", args={"of": f"dispatch {turn}"}))
        return found

    played = play(context, case, scripts(case, steps, "low_latency"), timeout=MANY_LIMIT)
    made.judge_dispatch(played, "dispatch 0")
    made.judge_combine(played, "combine 0")
    for turn in range(1, repeats):
        made.judge_dispatch(played, f"dispatch {turn}")
        for rank in range(case.ranks):
            first = played.result(rank, "combine 0")["combined_x"]
            got = played.result(rank, f"combine {turn}")["combined_x"]
            if not same(context, rank, f"combined_x of call {turn}", got, first):
                return
        if context.record.problems:
            return


@holds("EPL-14")
def asynchronous(context: Context) -> None:
    """Events instead of hooks; in turn on another thread."""
    case = base(context)
    made = PackedRound(context, case)
    elsewhere = context.index % 2 == 1

    def steps(rank: int) -> list[Step]:
        return [
            made.dispatch(rank, async_finish=True),
            Step("finish", "received", {"of": "dispatch", "elsewhere": elsewhere}),
            made.combine(rank, async_finish=True),
            Step("finish", "summed", {"of": "combine", "elsewhere": elsewhere}),
        ]

    played = play(context, case, scripts(case, steps, "low_latency"))
    made.judge_dispatch(played, step="received")
    made.judge_combine(played, step="summed")


@holds("EPL-17")
def conservation(context: Context) -> None:
    """Without the oracle: rows sent back as they came, with weights that sum to a power of two, are the token."""
    case = base(context, (3, 2, 4), routing="distinct", cast="none")
    powers = [n for n in (2, 4, 1) if n in context.ep.topk and n <= case.experts]
    if powers and (case.topk & (case.topk - 1) or case.topk > case.experts):
        case = case.but(topk=powers[0])
    made = PackedRound(context, case)
    inputs = [
        RankInput(g.x, g.topk_idx, torch.full_like(g.topk_weights, 0.5))
        for g in made.inputs
        if g.topk_weights is not None
    ]
    made = PackedRound(context, case, inputs)

    def steps(rank: int) -> list[Step]:
        combine = made.combine(rank)
        back = Step(combine.op, combine.name, {**combine.args, "x": Ref("dispatch", "recv_x")})
        return [made.dispatch(rank), back]

    played = play(context, case, scripts(case, steps, "low_latency"))
    total = 0
    for rank, given in enumerate(inputs):
        right = (given.x.float() * (0.5 * case.topk) + 0.0).to(given.x.dtype)
        got = played.result(rank, "combine")["combined_x"]
        if case.topk & (case.topk - 1) == 0 and case.topk <= case.experts:
            text = differ("combine of dispatch", got, right, lambda t: f"token {t}")
            note(context, rank, "rows sent back unchanged", [text], lambda: "")
        total += int(played.result(rank, "dispatch")["recv_count"].sum())
    chosen = sum(case.tokens) * min(case.topk, case.experts)
    if total != chosen:
        context.problem(f"{total} rows arrived at all experts, {chosen} choices were made")


@holds("EPL-23")
def strided_inputs(context: Context) -> None:
    """Tensors with NaN, or experts that do not exist, before, between and after their rows; one row for all tokens."""
    case = draw(context).lying(base(context, (2, 3), routing="mixed"))
    made = PackedRound(context, case)

    def steps(rank: int) -> list[Step]:
        counts = Placed(torch.full((case.local,), 5, dtype=torch.int32), start=case.start)
        out = torch.full((case.tokens[rank], case.hidden), 7.0).to(case.torch_dtype)
        dispatch = made.dispatch(rank, cumulative_local_expert_recv_stats=counts)
        return [dispatch, made.combine(rank, out=placed(case, out))]

    played = play(context, case, scripts(case, steps, "low_latency"), first=made.judge_dispatch)
    made.judge_dispatch(played)
    made.judge_combine(played)
    for rank in range(case.ranks):
        recv_stats(context, rank, played.result(rank, "dispatch"), made.wants[rank].count + 5)
        written(context, rank, played.result(rank, "combine"))
