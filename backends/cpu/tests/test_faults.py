"""Indices that must never be followed, whatever the validation level and whether or not a plan is passed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from cpu_cases import GARBAGE, Case, Kernel, decode, make, plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.spec.errors import SpecError, UnsupportedError
from hal.spec.plan import check_plan
from hal.spec.validation import set_validation, validation_level


@pytest.fixture(params=["off", "shapes", "full"], autouse=True)
def validation(request: pytest.FixtureRequest) -> Iterator[None]:
    before = validation_level()
    set_validation(request.param)
    yield
    set_validation(before)


def edit(case: Case, name: str, index: int | tuple[int, int], value: int) -> Case:
    tensor = getattr(case, name).clone()
    tensor[index] = value
    return case.with_(**{name: tensor})


LEGAL: Callable[[], Case] = lambda: make([130, 0, 64], queries=[2, 0, 3], h_q=4, d=32, d_v=32)  # noqa: E731
BAD = [
    ("cache_seqlens", 0, -1),
    ("cache_seqlens", 1, -(2**31)),
    ("cache_seqlens", 2, 2**31 - 1),
    ("cache_seqlens", 2, 5 * 64 + 1),
    ("block_table", (0, 0), -1),
    ("block_table", (0, 2), 7),
    ("block_table", (2, 0), GARBAGE),
    ("block_table", (0, 1), -(2**31)),
    ("cu_seqlens_q", 0, 1),
    ("cu_seqlens_q", 0, -1),
    ("cu_seqlens_q", 1, 4),
    ("cu_seqlens_q", 2, -5),
    ("cu_seqlens_q", 3, 4),
    ("cu_seqlens_q", 3, 2**31 - 1),
]


@pytest.mark.parametrize(("name", "index", "value"), BAD)
def test_a_bad_index_is_refused_by_name(kernel: Kernel, name: str, index: int | tuple[int, int], value: int) -> None:
    case = LEGAL()
    assert case.block_table.shape[1] == 5
    with pytest.raises(SpecError) as caught:
        decode(kernel, edit(case, name, index, value))
    assert caught.value.argument == name
    decode(kernel, case)


def test_the_error_says_where(native: Kernel) -> None:
    with pytest.raises(SpecError, match=r"block_table: got 9 at \[0, 1\]; legal: 0…6 within cache_seqlens"):
        decode(native, edit(make([130, 64, 64], h_q=4), "block_table", (0, 1), 9).with_(causal=True))
    with pytest.raises(SpecError, match=r"cache_seqlens: got 999 at \[1\]; legal: 0…320 \(max_blocks 5 × page_size 64"):
        decode(native, edit(make([130, 64, 64], h_q=4), "cache_seqlens", 1, 999))


@pytest.mark.parametrize(("name", "index", "value"), BAD)
def test_a_plan_does_not_switch_the_checks_off(
    native: Kernel, name: str, index: int | tuple[int, int], value: int
) -> None:
    case = LEGAL()
    schedule = plan(native, case)
    with pytest.raises(SpecError) as caught:
        decode(native, edit(case, name, index, value), schedule)
    assert caught.value.argument == name


def test_a_plan_for_something_else_is_refused(native: Kernel) -> None:
    case = make([130, 0, 64], s_q=2, h_q=4, d=32, d_v=32)
    others = [
        edit(case, "cache_seqlens", 0, 129),
        case.with_(causal=True),
        case.with_(batch_invariant=True),
        case.with_(head_dim_v=31),
        case.with_(q=case.q[:, :1]),
        case.with_(q=case.q[:, :, :2]),
        make([130, 0], s_q=2, h_q=4, d=32, d_v=32),
        LEGAL(),
    ]
    for other in others:
        schedule = plan(native, other)
        with pytest.raises(SpecError) as caught:
            decode(native, case, schedule)
        assert caught.value.argument == "plan"


def test_a_plan_checks_its_lengths(kernel: Kernel) -> None:
    with pytest.raises(SpecError, match="cache_seqlens"):
        plan(kernel, edit(LEGAL(), "cache_seqlens", 2, -1))
    with pytest.raises(SpecError, match="cu_seqlens_q"):
        plan(kernel, edit(LEGAL(), "cu_seqlens_q", 1, 7))


@pytest.mark.parametrize("sizes", [{"s_q": 2**31 - 1}, {"h_q": 2**30}, {"s_q": 2**26}])
def test_a_plan_for_more_rows_than_fit_memory_is_refused(native: Kernel, sizes: dict[str, int]) -> None:
    arguments = {"h_q": 4, "s_q": 1} | sizes
    arguments["h_kv"] = arguments["h_q"]
    lengths = torch.tensor([5], dtype=torch.int32)
    options = (None, 64, 64, 64, torch.bfloat16, "plain", False, False)
    args = check_plan(lengths, arguments["h_q"], arguments["h_kv"], arguments["s_q"], *options)
    with pytest.raises(UnsupportedError, match="rows"):
        native.plan(args)


def test_no_pages_at_all(kernel: Kernel) -> None:
    case = make([0, 0], h_q=4, d=32, d_v=32)
    empty = case.with_(kv_cache=case.kv_cache[:0], block_table=case.block_table[:, :0])
    out, lse = decode(kernel, empty)
    assert not out.any() and lse.isposinf().all()
    with pytest.raises(SpecError):
        decode(kernel, edit(empty, "cache_seqlens", 1, 1))


integers = st.one_of(st.integers(-3, 12), st.integers(-(2**31), 2**31 - 1))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(-2, 30), integers), min_size=3, max_size=3),
    table=st.lists(integers, min_size=12, max_size=12),
    offsets=st.lists(integers, min_size=4, max_size=4),
)
def test_no_integers_crash_it(native: Kernel, lengths: list[int], table: list[int], offsets: list[int]) -> None:
    case = make([7, 8, 9], queries=[2, 2, 2], h_q=2, d=8, d_v=8, page=4)
    case.cache_seqlens = torch.tensor(lengths, dtype=torch.int32)
    case.block_table = torch.tensor(table, dtype=torch.int32).view(3, 4)
    case.cu_seqlens_q = torch.tensor(offsets, dtype=torch.int32)
    for schedule in (None, plan(native, make([7, 8, 9], queries=[2, 2, 2], h_q=2, d=8, d_v=8, page=4))):
        # Nearly every draw is illegal, and the few legal ones must simply return.
        with contextlib.suppress(SpecError):
            decode(native, case, schedule)
