"""What the kernel computes, held against the float64 reference, on every instruction set and on the torch path."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import Case, Kernel, check, decode, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Row counts around every tile height and lane count, and shapes that are one short of them.
HEADS = [(1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (8, 1), (9, 1), (9, 3), (16, 1), (17, 1), (24, 2), (33, 1), (48, 1)]
HEADS += [(63, 1), (64, 8), (80, 1), (126, 2), (128, 1), (129, 1), (200, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_common_shape(kernel: Kernel, dtype: torch.dtype) -> None:
    check(kernel, make([700, 64, 1], h_q=16, dtype=dtype))


def test_another_default_device_changes_nothing(kernel: Kernel) -> None:
    case = make([70, 5], h_q=4, d=64, d_v=64, page=16)
    want = decode(kernel, case)
    with torch.device("meta"):
        got = decode(kernel, case)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_any_number_of_heads(kernel: Kernel, h_q: int, h_kv: int) -> None:
    check(kernel, make([131, 5], h_q=h_q, h_kv=h_kv, seed=h_q))


@pytest.mark.parametrize("page", [1, 2, 3, 16, 63, 64, 65, 100, 128, 256])
def test_any_page_size(kernel: Kernel, page: int) -> None:
    check(kernel, make([257, 128, 64, 1], h_q=4, page=page, seed=page))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "d_v"), [(1, 1), (3, 2), (7, 7), (17, 5), (64, 64), (100, 99), (575, 511), (576, 576)])
def test_any_head_dimension(kernel: Kernel, d: int, d_v: int, dtype: torch.dtype) -> None:
    for h_q in (2, 19):
        check(kernel, make([70, 3], h_q=h_q, d=d, d_v=d_v, dtype=dtype, seed=d))


@pytest.mark.parametrize("s_q", [1, 2, 3, 7])
def test_causal_is_aligned_at_the_bottom_right(kernel: Kernel, s_q: int) -> None:
    # 1 and 2 tokens under 7 queries: the first ones see nothing at all.
    check(kernel, make([1, 2, 7, 64, 65, 66, 190], s_q=s_q, h_q=6, causal=True, seed=s_q))


def test_a_long_causal_block_of_queries(kernel: Kernel) -> None:
    check(kernel, make([150, 90], s_q=90, h_q=4, d=64, d_v=32, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_queries(kernel: Kernel, causal: bool) -> None:
    case = make([80, 0, 200, 3, 9, 65], queries=[3, 2, 1, 5, 0, 17], h_q=6, h_kv=2, causal=causal)
    check(kernel, case)


def test_a_long_sequence_is_split_and_merged(kernel: Kernel) -> None:
    check(kernel, make([9001, 17], h_q=32, d=128, d_v=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(kernel: Kernel, dtype: torch.dtype) -> None:
    case = make([100, 65], s_q=2, h_q=12, h_kv=2, d=60, d_v=33, dtype=dtype, strided=True, causal=True)
    check(kernel, case)
    assert case.out is not None
    storage = case.out.as_strided((case.out.untyped_storage().nbytes() // case.out.element_size(),), (1,), 0)
    assert storage.isfinite().sum() == case.out.numel(), "something was written outside out"


def test_shared_memory_of_inputs(kernel: Kernel) -> None:
    case = make([70], s_q=2, h_q=4)
    case.q = case.q[:, :1].expand(-1, 2, -1, -1)
    case.block_table = case.block_table.expand(3, -1)
    case.cache_seqlens = torch.tensor([70, 64, 1], dtype=torch.int32)
    case.q = case.q.expand(3, -1, -1, -1)
    check(kernel, case)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 2.5])
def test_scale_and_base(kernel: Kernel, scale: float | None, base: str) -> None:
    check(kernel, make([90], h_q=20, d=64, d_v=64, softmax_scale=scale, lse_base=base, dtype=torch.float32))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 5, 0]])
def test_nothing_to_attend_to(kernel: Kernel, lengths: list[int]) -> None:
    out, lse = check(kernel, make(lengths, h_q=20))
    for i, length in enumerate(lengths):
        if length == 0:
            assert not out[i].any() and lse[i].isposinf().all()


def test_no_queries(kernel: Kernel) -> None:
    check(kernel, make([5, 6], s_q=0))
    check(kernel, make([5, 6], queries=[0, 0]))


def test_large_scores_do_not_overflow(kernel: Kernel) -> None:
    # Scores up to some 1e5: all the weight on one token, no infinity on the way.
    case = make([300], h_q=20, d=64, d_v=64, dtype=torch.float32, magnitude=100.0, softmax_scale=1.0)
    out, lse = decode(kernel, case)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("h_q", [2, 20])
def test_nan_of_an_attended_row_reaches_just_its_readers(kernel: Kernel, h_q: int) -> None:
    case = make([70], s_q=3, h_q=h_q, d=40, d_v=24, causal=True)
    page, offset = case.block_table[0, 1], 69 - 64
    case.kv_cache[page, offset, 0, :] = torch.nan  # seen by the last query alone
    out, lse = decode(kernel, case)
    assert out[0, :2].isfinite().all() and lse[0, :, :2].isfinite().all()
    assert out[0, 2].isnan().all() and lse[0, :, 2].isnan().all()


@pytest.mark.parametrize("h_q", [2, 20])
def test_nan_of_one_query_stays_there(kernel: Kernel, h_q: int) -> None:
    case = make([200], h_q=h_q, d=40, d_v=24)
    clean, _ = decode(kernel, case)
    case.q[0, 0, 1] = torch.nan
    out, lse = decode(kernel, case)
    assert out[0, 0, 1].isnan().all() and lse[0, 1, 0].isnan()
    keep = torch.arange(h_q) != 1
    assert out[0, 0, keep].equal(clean[0, 0, keep])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_scores_return(kernel: Kernel, value: float) -> None:
    case = make([200], h_q=20, d=40, d_v=24, dtype=torch.float32)
    case.kv_cache[case.block_table[0, :3].long()] = value
    decode(kernel, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_the_dtype_is_read_and_rounded_right(kernel: Kernel, dtype: torch.dtype) -> None:
    # One token: out is that token, whatever the weight, so out repeats the cache bit for bit.
    size = 576
    patterns = torch.arange(0, 65536, 97 if dtype == torch.float32 else 1).to(torch.int32)
    values = patterns.to(torch.int16).view(dtype) if dtype != torch.float32 else (patterns * 65537).view(torch.float32)
    values = values[values.isfinite()]
    values = values[: len(values) // size * size].view(-1, 1, 1, size)
    lengths = torch.ones(len(values), dtype=torch.int32)
    table = torch.arange(len(values), dtype=torch.int32)[:, None]
    q = torch.zeros(len(values), 1, 2, size, dtype=dtype)
    out, _ = decode(kernel, Case(q, values, table, lengths, None, size))
    assert out[:, :, 0].equal(values[:, :, 0])


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 300), min_size=1, max_size=5),
        "h_kv": st.integers(1, 3),
        "page": st.integers(1, 256),
        "d": st.integers(1, 96),
        "dtype": st.sampled_from(DTYPES),
        "causal": st.booleans(),
        "lse_base": st.sampled_from(["e", "2"]),
        "batch_invariant": st.booleans(),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, group=st.integers(1, 40), s_q=st.integers(0, 5), ragged=st.booleans(), data=st.data())
def test_anything_legal(isa: Kernel, shape: dict, group: int, s_q: int, ragged: bool, data: st.DataObject) -> None:
    queries = None
    if ragged:
        size = len(shape["lengths"])
        queries = data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    d_v = data.draw(st.integers(1, shape["d"]))
    case = make(**shape, d_v=d_v, h_q=shape["h_kv"] * group, s_q=s_q, queries=queries)
    check(isa, case)
