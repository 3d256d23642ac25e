"""E1: dispatch and combine of the normal mode against the oracle, bit for bit."""

from __future__ import annotations

import torch

from hal.reference import ep as oracle
from hal_conformance.checks import holds
from hal_conformance.context import Context
from hal_conformance.cover_ep import plain
from hal_conformance.draw import members
from hal_conformance.ep import Step
from hal_conformance.ep_draw import ROWS, EpDraw
from hal_conformance.ep_judge import differ, laid_out, note
from hal_conformance.ep_play import play
from hal_conformance.ep_round import Round, normal, scripts

LARGE = 6
"""One case of so many has large sizes: the last one of a quick run."""


def draw(context: Context) -> EpDraw:
    """The source of declared sizes."""
    return EpDraw(context.rng, context.ep, context.index, context.settings.ranks)


@holds("EPN-01")
def rows_and_order(context: Context) -> None:
    """Ordinary routing on every usual number of ranks."""
    normal(context, draw(context).base(routing=("distinct", "mixed")[context.index // 4 % 2]))


@holds("EPN-02")
def skewed(context: Context) -> None:
    """All to one expert, to one rank, none to a rank, few experts with nearly all tokens."""
    kind = ("one", "avoid", "zipf", "one_rank")[context.index % 4]
    normal(context, draw(context).base((3, 2, 4), routing=kind, bias=context.index % 2))


@holds("EPN-03")
def duplicates_and_holes(context: Context) -> None:
    """The same expert again in a token's top-k, holes, and tokens without any expert."""
    kind = ("same", "half", "none", "mixed")[context.index % 4]
    normal(context, draw(context).base((2, 3, 4), routing=kind, bias=int(kind in ("none", "half"))))


@holds("EPN-04")
def no_tokens(context: Context) -> None:
    """Nothing on one rank, on all but one, on all."""
    case = draw(context).base((3, 2, 4))
    count = [context.rng.choice((1, 5, 9)) for _ in range(case.ranks)]
    turn = context.index % 3
    for rank in range(case.ranks):
        if turn == 1 or (turn == 0 and rank == context.rng.randrange(case.ranks)) or (turn == 2 and rank != 0):
            count[rank] = 0
    normal(context, case.but(tokens=tuple(count), bias=context.rng.randrange(3)))


@holds("EPN-05")
def any_sizes(context: Context) -> None:
    """Odd numbers of experts, choices, ranks and columns; more experts than tokens and fewer than ranks; large ones."""
    if context.index % LARGE == LARGE - 1:
        layouts = [name == "expand" for name in context.ep.layouts]
        many, wide, crowd = (context.rng.choice(layouts) for _ in range(3))
        normal(context, draw(context).many(draw(context).base()).but(bias=1, expand=many))
        normal(context, draw(context).wide(draw(context).base((2, 3))).but(expand=wide))
        normal(context, draw(context).crowd(draw(context).base((2,))).but(expand=crowd))
        normal(context, draw(context).long(draw(context).base((2, 3), bias=1)))
        return
    case = draw(context).odd(draw(context).base((3, 2, 1, 4)))
    tokens = tuple(context.rng.choice((1, 2, 3, 13, 33)) for _ in range(case.ranks))
    normal(context, case.but(tokens=tokens, capacity=context.rng.choice((0, 40))))


@holds("EPN-06")
def alignment_and_worst(context: Context) -> None:
    """Counts rounded up; a fixed number of rows."""
    case = draw(context).base((2, 3, 4))
    if context.index % 2:
        # As many rows as may come, or where the caller knows better as many as do.
        made = Round(context, case)
        most = case.ranks * case.most if context.index % 4 == 1 else max(1, *(len(want.x) for want in made.wants))
        normal(context, case.but(worst=most + context.rng.randrange(3)), made.inputs)
    else:
        routing = context.rng.choice(("mixed", "zipf", "avoid"))
        normal(context, case.but(alignment=context.rng.choice((2, 3, 4, 8, 128, 256, 300)), routing=routing))


@holds("EPN-07")
def expand(context: Context) -> None:
    """A row per token and local expert."""
    case = draw(context).base((2, 3, 4), expand=True, bias=context.index % 3)
    routing = ("mixed", "zipf", "avoid", "same", "one_rank")[context.index % 5]
    normal(context, case.but(alignment=context.rng.choice((1, 4, 16)), routing=routing))


@holds("EPN-08")
def fp8_rows(context: Context) -> None:
    """FP8 rows with float32 scales, and with packed ones."""
    data = context.rng.choice(("normal", "bits"))
    scales = ("float32", "int32")[context.index % 2]
    case = draw(context).base((2, 3), scales=scales, data=data, dtype=context.rng.choice(plain(context.ep)))
    if context.index % LARGE == LARGE - 1:
        case = draw(context).sized(draw(context).many(case))
    normal(context, case.but(expand=bool(context.index // 2 % 2) and "expand" in context.ep.layouts))


@holds("EPN-09")
def element_types(context: Context) -> None:
    """Every declared dtype of rows, of ordinary numbers and of any bits."""
    dtypes = plain(context.ep)
    data = ("bits", "normal")[context.index // len(dtypes) % 2]
    case = draw(context).base((2, 3), dtype=dtypes[context.index % len(dtypes)], data=data)
    normal(context, draw(context).sized(case.but(bias=1), ROWS))


@holds("EPN-10")
def fixed_order(context: Context) -> None:
    """Sums of rows of very different sizes, where every other order or a shorter accumulator gives other bits."""
    case = draw(context).base((4, 3, 2), routing="distinct", topk=0)
    topk = max(members(context.ep.topk, tuple(range(1, 9))))
    normal(context, case.but(topk=topk, bias=context.index % 2))


@holds("EPN-11")
def bias_and_weights(context: Context) -> None:
    """None, one and two biases; with weights and without; with weights that are NaN where no expert is chosen."""
    weights = ("holes", "", "any", "", "usual", "")[context.index % 6]
    case = draw(context).base((3, 2, 4), bias=(2, 1, 0)[context.index % 3], weights=weights)
    normal(
        context, case.but(routing=context.rng.choice(("mixed", "half", "zipf") if weights != "holes" else ("mixed",)))
    )


@holds("EPN-12")
def conservation(context: Context) -> None:
    """Without the oracle: rows sent back as they came are the token times its ranks; nothing is lost or made."""
    case = draw(context).base((3, 2, 4), bias=0, weights="")
    made = Round(context, case)
    # Whole numbers of few bits, so that sums are exact in every order.
    inputs = [oracle.RankInput((g.x.float() * 4).round().clamp(-16, 16).to(g.x.dtype), g.topk_idx) for g in made.inputs]
    made = Round(context, case, inputs)
    made.outputs = [want.x for want in made.wants]
    played = play(context, case, scripts(case, lambda r: [made.dispatch(r), made.combine(r)]))
    arrived = torch.zeros(case.ranks, dtype=torch.int64)
    counts: list[int] = []
    for rank, given in enumerate(inputs):
        homes = torch.tensor([len(oracle.ranks_of(row, case.local)) for row in given.topk_idx], dtype=torch.float32)
        # A sum begins with 0, which makes a negative zero positive.
        right = (given.x.float() * homes[:, None] + 0.0).to(given.x.dtype)
        text = differ(
            "combine of dispatch", played.result(rank, "combine")["combined_x"], right, lambda t: f"token {t}"
        )
        note(context, rank, "rows sent back unchanged", [text], lambda: "")
        arrived[rank] = len(played.result(rank, "dispatch")["recv_x"])
        counts += played.result(rank, "dispatch")["num_recv_tokens_per_expert"]
    sent = sum(len(oracle.ranks_of(row, case.local)) for given in inputs for row in given.topk_idx)
    chosen = sum(len(oracle.experts_of(row)) for given in inputs for row in given.topk_idx)
    if int(arrived.sum()) != sent:
        context.problem(f"{int(arrived.sum())} rows arrived on all ranks, {sent} were sent")
    if sum(counts) != chosen:
        context.problem(f"the counts of all experts sum to {sum(counts)}, {chosen} choices were made")


@holds("EPN-13")
def layout(context: Context) -> None:
    """Counts of where tokens go; a local call."""
    case = draw(context).odd(draw(context).base((3, 2, 4)))
    made = Round(context, case)
    steps = scripts(case, lambda r: [Step("layout", "layout", {"topk_idx": made.inputs[r].topk_idx}), made.dispatch(r)])
    played = play(context, case, steps)
    for rank, given in enumerate(made.inputs):
        laid_out(context, case, given, rank, played.result(rank, "layout"))


@holds("EPN-14")
def strided_inputs(context: Context) -> None:
    """Rows with NaN between them, choices with experts that do not exist between them; one row for all tokens."""
    case = draw(context).base((2, 3), routing="mixed", bias=1 + context.index % 2)
    normal(context, draw(context).lying(case))
