"""Splits over tokens, rows, batch and threads: what they may change (time) and what not (bits, values)."""

from __future__ import annotations

import random

import pytest
import torch
from cpu_cases import Case, Kernel, check, decode, make, plan

INVARIANT = [
    {"h_q": 1, "d": 128, "d_v": 64},
    {"h_q": 20, "d": 128, "d_v": 64},
    {"h_q": 6, "h_kv": 2, "s_q": 3, "causal": True, "d": 96, "d_v": 96},
    {"h_q": 130, "d": 64, "d_v": 64},
]
LENGTHS = [1500, 3, 0, 64, 9000, 513, 2048, 65]


def threads(kernel: Kernel, count: int) -> None:
    kernel._threads = count  # what HAL_CPU_THREADS sets


def alone(case: Case, i: int) -> Case:
    """One sequence of a dense batch by itself."""
    one = slice(i, i + 1)
    return case.with_(q=case.q[one], block_table=case.block_table[one], cache_seqlens=case.cache_seqlens[one])


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_batch_invariant_bits_do_not_depend_on_the_batch(isa: Kernel, shape: dict) -> None:
    case = make(LENGTHS, batch_invariant=True, **shape)
    threads(isa, 2)
    out, lse = check(isa, case)
    for i in range(len(LENGTHS)):
        one_out, one_lse = decode(isa, alone(case, i))
        assert one_out[0].equal(out[i]) and one_lse[0].equal(lse[i]), f"sequence {i} alone"
    order = torch.tensor(random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS)))
    turned = case.with_(
        q=case.q[order], block_table=case.block_table[order], cache_seqlens=case.cache_seqlens[order].contiguous()
    )
    turned_out, turned_lse = decode(isa, turned)
    assert turned_out.equal(out[order]) and turned_lse.equal(lse[order])


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_batch_invariant_bits_do_not_depend_on_threads(isa: Kernel, shape: dict) -> None:
    for lengths in ([9000], LENGTHS):
        case = make(lengths, batch_invariant=True, **shape)
        threads(isa, 1)
        out, lse = decode(isa, case)
        for count in (2, 3, 7, 64):
            threads(isa, count)
            more_out, more_lse = decode(isa, case)
            assert more_out.equal(out) and more_lse.equal(lse), f"{count} threads, lengths {lengths}"


def test_batch_invariant_bits_do_not_depend_on_pages(isa: Kernel) -> None:
    results = []
    for page in (1, 48, 256):
        case = make([1500], h_q=20, d=64, d_v=64, page=page, batch_invariant=True)
        results.append(decode(isa, case))
    for out, lse in results[1:]:
        assert out.equal(results[0][0]) and lse.equal(results[0][1])


def test_batch_invariant_ragged(isa: Kernel) -> None:
    case = make([3000, 70, 9], queries=[3, 2, 1], h_q=8, d=64, d_v=64, causal=True, batch_invariant=True)
    threads(isa, 3)
    out, lse = check(isa, case)
    first = case.with_(
        q=case.q[:3],
        block_table=case.block_table[:1],
        cache_seqlens=case.cache_seqlens[:1],
        cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32),
    )
    one_out, one_lse = decode(isa, first)
    assert one_out.equal(out[:3]) and one_lse.equal(lse[:, :3])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 1000])
@pytest.mark.parametrize("lengths", [[9000], [1, 5000, 0, 300], [700] * 9])
@pytest.mark.parametrize("invariant", [False, True])
def test_any_number_of_threads(native: Kernel, count: int, lengths: list[int], invariant: bool) -> None:
    threads(native, count)
    check(native, make(lengths, h_q=20, d=64, d_v=64, batch_invariant=invariant))


def test_the_same_call_gives_the_same_bits(native: Kernel) -> None:
    case = make([5000, 77], h_q=40)
    threads(native, 2)
    out, lse = decode(native, case)
    for _ in range(20):
        again_out, again_lse = decode(native, case)
        assert again_out.equal(out) and again_lse.equal(lse)


def test_bits_do_not_depend_on_the_callers_float_mode(native: Kernel) -> None:
    # Subnormal products count on every thread or on none.
    case = make([2000], h_q=20, d=64, d_v=64, dtype=torch.float32, magnitude=1e-20, softmax_scale=1.0)
    out, _ = decode(native, case)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        flushed, _ = decode(native, case)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.equal(out)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("queries", [None, [2, 0, 1, 3]])
def test_a_plan_gives_the_same_bits(native: Kernel, queries: list[int] | None, invariant: bool) -> None:
    case = make([3000, 64, 0, 500], queries=queries, h_q=32, d=64, d_v=64, batch_invariant=invariant)
    threads(native, 2)
    out, lse = check(native, case)
    schedule = plan(native, case)
    for _ in range(3):
        planned_out, planned_lse = check(native, case, schedule)
        assert planned_out.equal(out) and planned_lse.equal(lse)


def test_a_plan_made_for_more_threads_still_works(native: Kernel) -> None:
    case = make([3000, 64], h_q=32, d=64, d_v=64)
    threads(native, 64)
    schedule = plan(native, case)
    threads(native, 1)
    check(native, case, schedule)


def test_one_long_sequence_makes_work_for_every_thread(native: Kernel) -> None:
    case = make([8192], h_q=128, d=64, d_v=64)
    threads(native, 4)
    assert plan(native, case).parts >= 4
    assert plan(native, case.with_(batch_invariant=True)).parts == 4


def test_little_work_stays_on_one_thread(native: Kernel) -> None:
    threads(native, 8)
    assert plan(native, make([20], h_q=4)).parts == 1


def test_the_torch_path_ignores_plans(kernel: Kernel) -> None:
    case = make([300, 5], h_q=4)
    check(kernel, case, plan(kernel, case))
