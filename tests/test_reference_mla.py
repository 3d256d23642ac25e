"""The oracle itself: against torch's own attention, and against properties that need no oracle."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_cases import Case, Inputs, make

from hal.reference import mla as reference

cases = st.builds(
    Case,
    b=st.integers(0, 3),
    s_q=st.integers(1, 4),
    s_k=st.integers(0, 30),
    h_q=st.sampled_from([2, 4, 6]),
    h_kv=st.sampled_from([1, 2]),
    causal=st.booleans(),
    varlen=st.booleans(),
    zero_lengths=st.booleans(),
    d=st.integers(1, 24),
    d_v=st.just(1),
    page_size=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)


def contiguous_keys(inputs: Inputs, j: int) -> torch.Tensor:
    """[length, h_kv, d], fetched token by token through the table."""
    page = inputs.kv_cache.shape[1]
    length = int(inputs.cache_seqlens[j])
    rows = [inputs.kv_cache[int(inputs.block_table[j, t // page]), t % page] for t in range(length)]
    return torch.stack(rows) if rows else inputs.kv_cache.new_zeros(0, *inputs.kv_cache.shape[2:])


@settings(max_examples=150, deadline=None)
@given(case=cases, data=st.data())
def test_agrees_with_torch_attention(case: Case, data: st.DataObject) -> None:
    if case.b == 0:
        return
    inputs = make(case)
    d_v = data.draw(st.integers(1, case.d))
    out, lse = reference.mla_decode(*inputs.tensors(), head_dim_v=d_v, causal=case.causal)
    for j in range(case.b):
        keys = contiguous_keys(inputs, j).double().repeat_interleave(case.h_q // case.h_kv, dim=1).transpose(0, 1)
        q = inputs.q[j].double().transpose(0, 1)
        length = keys.shape[1]
        position = torch.arange(length)[None, :]
        allowed = torch.ones(case.s_q, length, dtype=torch.bool)
        if case.causal:
            allowed = position <= length - case.s_q + torch.arange(case.s_q)[:, None]
        scores = (q @ keys.transpose(1, 2)) / math.sqrt(case.d)
        scores = scores.masked_fill(~allowed, -math.inf)
        some = allowed.any(1)
        want = torch.nn.functional.scaled_dot_product_attention(q, keys, keys[..., :d_v], attn_mask=allowed)
        torch.testing.assert_close(out[j][some], want.transpose(0, 1)[some], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse[j][:, some], scores.logsumexp(-1)[:, some], rtol=1e-9, atol=1e-9)
        assert (out[j][~some] == 0).all()
        assert lse[j][:, ~some].isposinf().all()


@settings(max_examples=50, deadline=None)
@given(case=cases)
def test_ragged_queries_are_the_sequences_one_by_one(case: Case) -> None:
    inputs = make(case)
    counts = [j % (case.s_q + 1) for j in range(case.b)]
    q = torch.cat([inputs.q[j, :n] for j, n in enumerate(counts)] + [inputs.q.new_zeros(0, case.h_q, case.d)])
    starts = torch.tensor([0, *torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
    out, lse = reference.mla_decode(
        q, *inputs.tensors()[1:], head_dim_v=1, causal=case.causal, cu_seqlens_q=starts, lse_base="2"
    )
    assert out.shape == (sum(counts), case.h_q, 1)
    assert lse.shape == (case.h_q, sum(counts))
    for j, (a, z) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        alone = (
            inputs.q[j : j + 1, : z - a],
            inputs.kv_cache,
            inputs.block_table[j : j + 1],
            inputs.cache_seqlens[j : j + 1],
        )
        one_out, one_lse = reference.mla_decode(*alone, head_dim_v=1, causal=case.causal)
        assert out[a:z].equal(one_out[0])
        torch.testing.assert_close(lse[:, a:z] * math.log(2), one_lse[0])


@settings(max_examples=50, deadline=None)
@given(case=cases, cut=st.integers(0, 3))
def test_merging_a_split_context_gives_the_whole(case: Case, cut: int) -> None:
    inputs = make(case)
    q, cache, table, lengths = inputs.tensors()
    pages = min(cut, table.shape[1])
    head = lengths.clamp(max=pages * case.page_size)
    parts = [(table, head), (table[:, pages:].contiguous(), lengths - head)]
    results = [reference.mla_decode(q, cache, t, n.to(torch.int32), head_dim_v=1) for t, n in parts]
    outs, lses = zip(*results, strict=True)
    out, lse = reference.mla_merge(outs, lses)
    want_out, want_lse = reference.mla_decode(q, cache, table, lengths, head_dim_v=1)
    torch.testing.assert_close(out, want_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, want_lse, rtol=1e-9, atol=1e-9)
