"""The attacking inputs: guarded memory, poison where nobody may read, the same bits from the same seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge, magnitudes
from hal_conformance.inputs import DATA, build, make_out
from hal_conformance.memory import place, same_bits, unwritten

from hal.spec.limits import DENSE_LSE, DENSE_OUT

SMALL = MlaCase(lengths=(5, 33, 0), h_q=4, d=24, d_v=16, page=16)


@pytest.mark.parametrize(
    ("data", "dtype"), list(itertools.product(DATA, ("bfloat16", "float16", "float32"))), ids=lambda v: str(v)
)
def test_numbers_are_finite_where_used_and_the_reference_stays_finite(data: str, dtype: str) -> None:
    inputs = build(SMALL.but(data=data, dtype=dtype), 1)
    assert bool(inputs.q.view.isfinite().all())
    assert all(bool(inputs.keys(j).isfinite().all()) for j in range(3))
    expected = expect(inputs)
    assert bool(expected.out.isfinite().all())
    assert expected.lse.isinf().sum() == SMALL.h_q
    assert all(bool((m >= 1).all()) for m in magnitudes(inputs))


def test_unused_memory_is_poison_and_unused_entries_are_garbage() -> None:
    inputs = build(SMALL.but(garbage=-7), 1)
    used = 5 + 33
    assert int(inputs.kv_cache.view.isnan().all(-1).logical_not().sum()) == used
    assert int((inputs.block_table.view == -7).sum()) == inputs.block_table.view.numel() - 1 - 3


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two, other = build(SMALL, 1), build(SMALL, 1), build(SMALL, 2)
    assert same_bits(one.kv_cache.storage, two.kv_cache.storage)
    assert not same_bits(one.q.storage, other.q.storage)


@pytest.mark.parametrize("layout", ["padded_row", "padded_token", "padded_block", "odd", "heads_first", "blocks_inner"])
def test_cache_layouts_are_views_of_other_strides(layout: str) -> None:
    plain, view = build(SMALL.but(h_kv=2), 1), build(SMALL.but(h_kv=2, kv_layout=layout), 1)
    assert view.kv_cache.view.stride() != plain.kv_cache.view.stride()
    assert view.kv_cache.view.stride(-1) == 1
    assert same_bits(view.kv_cache.view, plain.kv_cache.view)


@pytest.mark.parametrize(("layout", "dim"), [("q_layout", 0), ("kv_layout", 2), ("table_layout", 0)])
def test_what_is_expanded_is_in_memory_once(layout: str, dim: int) -> None:
    inputs = build(SMALL.but(h_kv=2, pages="ordered", **{layout: "expanded"}), 1)
    view = {"q_layout": inputs.q, "kv_layout": inputs.kv_cache, "table_layout": inputs.block_table}[layout].view
    assert view.shape[dim] > 1
    assert view.stride(dim) == 0
    assert all(guarded.overrun() == "" == guarded.modified() for guarded in inputs.guarded())
    outcome = call(inputs, "cpu")
    assert outcome.problems == []
    assert judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE).ok


def test_a_wide_table_has_columns_nobody_uses_and_a_pool_edges_of_its_own() -> None:
    wide = build(SMALL.but(table_layout="wide", garbage=-7), 1)
    assert wide.table.shape[1] > 1024
    assert int((wide.table != -7).sum()) == 1 + 3
    table = build(SMALL.but(lengths=(1600, 800), pages="pool"), 1).table
    edges = [*table[0, [0, 99]].tolist(), *table[1, [0, 49]].tolist()]
    assert len({*edges} - {*table[0, 1:99].tolist(), *table[1, 1:49].tolist()}) == 4


def test_shared_pages_are_shared() -> None:
    case = SMALL.but(lengths=(70, 70, 70), pages="shared")
    table = build(case, 1).table[:, :5].tolist()
    assert set(table[0]) & set(table[1])
    assert len(set(table[2])) < 5


def test_every_write_outside_a_tensor_is_seen() -> None:
    for at in (-1, 3 * 8, 5):
        guarded = place("out", (3, 5), torch.float32, "cpu", fill=None, pad=(3, 0))
        assert guarded.overrun() == ""
        first = guarded.view.storage_offset()
        guarded.storage[first + at] = 1.0
        assert "out" in guarded.overrun(), at


def test_fresh_outputs_are_told_from_computed_nan() -> None:
    out = make_out(SMALL.but(out_layout="contiguous"))
    assert out is not None
    assert bool(out.view.isnan().all())
    assert bool(unwritten(out.view).all())
    out.view.fill_(torch.nan)
    assert not bool(unwritten(out.view).any())


def test_a_changed_input_is_seen() -> None:
    inputs = build(SMALL, 1)
    inputs.cache_seqlens.view[0] += 1
    assert [g.name for g in inputs.guarded() if g.modified()] == ["cache_seqlens"]


def test_a_case_survives_json() -> None:
    case = SMALL.but(q_lens=(1, 2, 0), scale=0.5, kv_layout="odd", plan=True)
    assert MlaCase.from_dict(case.to_dict()) == case


def test_a_watched_call_of_the_installed_backend_is_right() -> None:
    inputs = build(SMALL.but(out_layout="padded"), 1)
    outcome = call(inputs, "cpu")
    assert outcome.problems == []
    assert judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE).ok
