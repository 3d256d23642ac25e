"""The Triton kernels in Triton's interpreter, against the float64 reference.

`test_interpreter` runs this file in a process with ``TRITON_INTERPRET=1``, which is read when triton is imported.
"""

from __future__ import annotations

import math
import os
import random
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import Inputs, build
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from interpreted import NAME, Interpreted
from seeds import SEED

import hal
from hal import plugins
from hal.portable.triton import tuning
from hal.portable.triton.mla import Sizes
from hal.spec.limits import DENSE_LSE, DENSE_OUT

plugins._registry = plugins.Registry([EntryPoint(NAME, "interpreted:plugin", plugins.GROUP)])


def check(case: MlaCase, number: int = 0, *, exact: bool = False) -> Inputs:
    inputs = build(case, number)
    outcome = call(inputs, NAME)
    verdict = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE)
    assert not outcome.problems, outcome.problems
    assert verdict.ok, f"{case.to_dict()}: out {verdict.out.to_dict()}, lse {verdict.lse.to_dict()}"
    if exact:
        assert verdict.out.max_abs < 1e-5
    return inputs


def backend() -> Interpreted:
    found = plugins.select(NAME).backend
    assert isinstance(found, Interpreted)
    return found


BASE = MlaCase(lengths=(131, 5), h_q=16)
CASES: dict[str, dict[str, Any]] = {
    "common": {},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "split over every share": {"lengths": (900,)},
    "more shares than steps": {"lengths": (1,)},
    "longer than one share, then short ones": {"lengths": (700, 1, 64, 33, 0, 400)},
    "several tiles side by side": {"h_q": 64},
    "more tiles than fit side by side": {"h_q": 200, "h_kv": 2},
    "pages of 1": {"page": 1},
    "pages of 3": {"page": 3},
    "pages of 100": {"page": 100},
    "pages of 256": {"page": 256, "lengths": (257, 256, 1)},
    "d 512": {"d": 512},
    "d 576, V as wide": {"d_v": 576, "dtype": "float32"},
    "odd columns": {"d": 575, "d_v": 511},
    "fewer columns than a tile": {"d": 7, "d_v": 7},
    "one column": {"d": 1, "d_v": 1, "dtype": "float32"},
    "a tail that is not full": {"d": 80, "d_v": 48},
    "causal": {"causal": True, "s_q": 3, "h_q": 6, "lengths": (1, 2, 7, 64, 65, 190)},
    "many causal queries": {"causal": True, "s_q": 40, "h_q": 4, "d": 64, "d_v": 32, "lengths": (90, 150)},
    "ragged": {"q_lens": (3, 2, 1, 5, 0, 17), "lengths": (80, 0, 200, 3, 9, 65), "h_q": 6, "h_kv": 2, "causal": True},
    "nothing at all": {"lengths": ()},
    "no queries": {"s_q": 0},
    "no tokens": {"lengths": (0, 0)},
    "base 2": {"lse_base": "2"},
    "negative scale": {"scale": -0.3},
    "scale 0": {"scale": 0.0},
    "poison inf": {"poison": "inf"},
    "entries of every kind": {"garbage": -(2**31)},
    "pages in common": {"pages": "shared", "lengths": (200, 190, 130)},
    "strides": {"q_layout": "odd", "kv_layout": "odd", "out_layout": "padded", "d": 60, "d_v": 33},
    "heads first": {"q_layout": "heads_first", "kv_layout": "heads_first", "out_layout": "heads_first", "h_kv": 2},
    "with a plan": {"plan": True, "s_q": 2, "table_layout": "strided"},
    "underflow": {"data": "underflow"},
    "far below zero": {"data": "negative"},
    "large numbers": {"data": "large"},
    "invariant": {"batch_invariant": True, "lengths": (400, 3, 100)},
    "invariant, heads": {"batch_invariant": True, "lengths": (400, 90), "h_q": 40, "h_kv": 2, "d": 64, "d_v": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    check(BASE.but(**CASES[name]))


def test_float32_is_exact_to_its_last_bits() -> None:
    check(BASE.but(dtype="float32", lengths=(300, 17), h_q=5, page=7), exact=True)


def test_one_token_comes_out_bit_by_bit() -> None:
    # Whatever the weight, out is V of that token: reading and rounding of every bfloat16 there is.
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # The interpreter reads subnormal numbers wrongly.
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.bfloat16).tiny)]
    values = values[: len(values) // 576 * 576].view(-1, 1, 1, 576)
    count = len(values)
    table, lengths = torch.arange(count, dtype=torch.int32)[:, None], torch.ones(count, dtype=torch.int32)
    out, _ = hal.mla_decode(
        torch.zeros(count, 1, 1, 576).bfloat16(), values, table, lengths, head_dim_v=576, backend=NAME
    )
    assert out.equal(values)


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 150), min_size=1, max_size=3).map(tuple),
        "h_kv": st.integers(1, 2),
        "page": st.sampled_from([1, 5, 16, 32, 64, 100, 256]),
        "d": st.integers(1, 80),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
        "causal": st.booleans(),
        "lse_base": st.sampled_from(["e", "2"]),
        "batch_invariant": st.booleans(),
        "kv_layout": st.sampled_from(["contiguous", "odd", "padded_token", "blocks_inner"]),
        "q_layout": st.sampled_from(["contiguous", "odd", "heads_first"]),
        "out_layout": st.sampled_from(["none", "padded", "heads_first"]),
        "plan": st.booleans(),
    }
)


@seed(SEED)
@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes, group=st.integers(1, 24), s_q=st.integers(0, 3), ragged=st.booleans(), data=st.data())
def test_anything_legal(shape: dict[str, Any], group: int, s_q: int, ragged: bool, data: st.DataObject) -> None:
    case = BASE.but(**shape, h_q=shape["h_kv"] * group, s_q=s_q, d_v=data.draw(st.integers(1, shape["d"])))
    if ragged:
        size = len(case.lengths)
        case = case.but(q_lens=tuple(data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))))
    check(case, data.draw(st.integers(0, 2**31)))


def test_rows_of_an_invariant_batch_do_not_depend_on_it() -> None:
    case = BASE.but(lengths=(90, 400, 0, 170), batch_invariant=True, d=64, d_v=32, h_q=20, data="hot")
    inputs = build(case, 3)
    q, cache, table, lengths = inputs.arguments()[0]
    options: dict[str, Any] = {"head_dim_v": 32, "batch_invariant": True, "backend": NAME}
    out, lse = hal.mla_decode(q, cache, table, lengths, **options)
    for rows in ([0], [1], [3], [3, 1, 0], [1, 1, 1, 1, 1, 1]):
        again = hal.mla_decode(q[rows], cache, table[rows], lengths[rows], **options)
        assert again[0].equal(out[rows]) and again[1].equal(lse[rows]), f"rows {rows}"


@pytest.mark.parametrize("invariant", [False, True])
def test_a_plan_owns_all_memory_and_serves_every_layer(invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BASE.but(lengths=(300, 90), batch_invariant=invariant, plan=True)
    inputs = build(case, 5)
    args, keywords = inputs.arguments()
    plan = hal.mla_plan(
        inputs.cache_seqlens.view, h_q=16, head_dim=576, head_dim_v=512, batch_invariant=invariant, backend=NAME
    )
    first = hal.mla_decode(*args, **keywords, plan=plan, batch_invariant=invariant, backend=NAME)
    launches = dict(backend().launches())
    out = torch.empty_like(first[0])
    # The schedule is not made again, and nothing is allocated beside the results, which are the front's.
    monkeypatch.setattr(type(backend().kernels), "_plan", None)
    again = hal.mla_decode(*args, **keywords, plan=plan, out=out, batch_invariant=invariant, backend=NAME)
    assert again[0].equal(first[0]) and again[1].equal(first[1])
    made = {name: count - launches[name] for name, count in backend().launches().items()}
    merges = made.pop("triton:mla_merge@interpreter")
    assert made == {"triton:mla_schedule@interpreter": 0, "triton:mla_decode@interpreter": 1} and merges == 1


BAD = [
    ("block_table", (0, 1), -1),
    ("block_table", (0, 0), 2147480000),
    ("block_table", (1, 0), -(2**31)),
    ("cache_seqlens", 0, -1),
    ("cache_seqlens", 1, 2**31 - 1),
    ("cache_seqlens", 0, 10_000),
    ("cu_seqlens_q", 0, 1),
    ("cu_seqlens_q", 1, 2**31 - 1),
    ("cu_seqlens_q", 1, -5),
    ("cu_seqlens_q", 2, 3),
]


WAYS = [(page, invariant) for page in (3, 64) for invariant in (False, True)]


def ways(name: str, value: int) -> list[tuple[int, bool]]:
    """One that the seed of this run draws; all with ``HAL_SWEEP=all``."""
    everything = os.environ.get("HAL_SWEEP") == "all"
    return WAYS if everything else [random.Random(f"{SEED} {name} {value}").choice(WAYS)]


@pytest.mark.parametrize(
    ("name", "where", "value", "page", "invariant"), [(*bad, *way) for bad in BAD for way in ways(bad[0], bad[2])]
)
def test_what_is_out_of_range_is_noticed_and_never_followed(
    name: str, where: int | tuple[int, int], value: int, page: int, invariant: bool
) -> None:
    case = BASE.but(lengths=(130, 64), q_lens=(2, 2), h_q=4, page=page, d=32, d_v=32, batch_invariant=invariant)
    inputs = build(case, 1)
    getattr(inputs, name).view[where] = value
    inputs.seal()
    outcome = call(inputs, NAME)
    assert not outcome.problems, outcome.problems
    # Around the cache and in its unused pages there is NaN. A length too long takes in what the table has of those, and
    # rows that no query offset covers are not computed.
    if name == "block_table":
        assert not outcome.out.isnan().any() and not outcome.lse.isnan().any()
    # The front's own check of values is left out, so that the kernels' is seen.
    hal.set_validation("full")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hal.spec.mla._check_values", lambda args: None)
            with pytest.raises(hal.SpecError) as caught:
                call(inputs, NAME)
    finally:
        hal.set_validation("shapes")
    assert caught.value.argument == name
    check(case)


def test_lengths_that_shrank_or_grew_under_a_plan_stay_within_their_memory() -> None:
    # With validation off nobody compares a plan with its lengths: results mean nothing, but memory is respected.
    case = BASE.but(lengths=(130, 64), d=32, d_v=32)
    inputs = build(case, 1)
    args, keywords = inputs.arguments()
    hal.set_validation("off")
    try:
        for planned in ((1, 1), (100_000, 7), (0, 0), (2**31 - 1, 2**31 - 1)):
            plan = hal.mla_plan(
                torch.tensor(planned, dtype=torch.int32), h_q=16, head_dim=32, head_dim_v=32, backend=NAME
            )
            hal.mla_decode(*args, **keywords, plan=plan, backend=NAME)
    finally:
        hal.set_validation("shapes")
    assert not any(guarded.modified() for guarded in inputs.guarded())


def test_workspace_does_not_depend_on_lengths() -> None:
    for invariant in (False, True):
        sizes = set()
        for lengths in ((1, 1), (90_000, 4)):
            seqlens = torch.tensor(lengths, dtype=torch.int32)
            schedule: Any = hal.mla_plan(seqlens, h_q=64, batch_invariant=invariant, backend=NAME).schedule
            sizes.add(schedule.slots.shape)
        assert len(sizes) == 1


def test_the_steps_are_cut_into_equal_shares() -> None:
    lengths = torch.tensor([700, 0, 64, 33], dtype=torch.int32)
    plan: Any = hal.mla_plan(lengths, h_q=16, backend=NAME).schedule
    sizes: Sizes = plan.sizes
    begin, block = tuning.table("interpreter").begin, sizes.variant.block_n
    steps = [math.ceil(n / block) + begin for n in lengths.tolist()]
    assert plan.prefix.tolist() == [sum(steps[:i]) for i in range(len(steps) + 1)]
    cuts = [sum(steps) * p // sizes.parts for p in range(sizes.parts)]
    assert plan.first.tolist() == [sum(end <= cut for end in plan.prefix[1:].tolist()) for cut in cuts]
