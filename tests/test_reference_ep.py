"""Properties of the expert-parallel oracle that need no second oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.reference import ep
from hal.reference.ep import RankInput
from hal.spec.ep import CASTS, FP8

H = 16
unhurried = settings(deadline=None)  # the oracle is slow by design


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[RankInput], int]:
    """Every rank's inputs: holes, duplicates, ranks without tokens, experts that do not divide by ranks."""
    ranks = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 9))
    topk = draw(st.integers(1, 4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    inputs = []
    for rank in range(ranks):
        n = draw(st.integers(0, 6))
        x = torch.randn(n, H, generator=seed).bfloat16()
        if n:
            x[:, 0] = torch.arange(n) + 32 * rank  # tells tokens apart
        idx = torch.randint(-1, experts, (n, topk), generator=seed)
        inputs.append(RankInput(x, idx, torch.rand(n, topk, generator=seed), x[:, :1].float()))
    return inputs, experts


@unhurried
@given(groups())
def test_layout_agrees_with_what_is_received(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    received = ep.dispatch(inputs, experts)
    num_local = ep.local_experts(experts, len(inputs))
    layouts = [ep.layout(g.topk_idx, experts, len(inputs), 2) for g in inputs]
    for rank, got in enumerate(received):
        assert len(got.x) == sum(int(one.num_tokens_per_rank[rank]) for one in layouts)
        for local, count in enumerate(got.num_tokens_per_expert):
            expert = rank * num_local + local
            want = sum(int(one.num_tokens_per_expert[expert]) for one in layouts) if expert < experts else 0
            assert count == want
    for one in layouts:
        if one.num_tokens_per_node is not None:
            pairs = one.is_token_in_rank.split(2, dim=1)
            assert one.num_tokens_per_node.tolist() == [int(p.any(1).sum()) for p in pairs]


@unhurried
@given(groups())
def test_rows_are_ordered_and_whole(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    for got in ep.dispatch(inputs, experts):
        assert got.source == sorted(got.source)
        assert len(set(got.source)) == len(got.source)
        for row, (source, token) in enumerate(got.source):
            assert torch.equal(got.x[row], inputs[source].x[token])
            assert got.scales is not None
            assert torch.equal(got.scales[row], inputs[source].scales[token])
            assert (got.topk_idx[row] >= 0).any()
            assert got.topk_weights is not None
            assert (got.topk_weights[row][got.topk_idx[row] < 0] == 0).all()


@unhurried
@given(groups(), st.sampled_from([1, 4]))
def test_expand_groups_by_expert(group: tuple[list[RankInput], int], alignment: int) -> None:
    inputs, experts = group
    plain = ep.dispatch(inputs, experts)
    for got, flat in zip(ep.dispatch(inputs, experts, expand=True, expert_alignment=alignment), plain, strict=True):
        at = 0
        for local, (count, exact) in enumerate(zip(got.num_tokens_per_expert, flat.num_tokens_per_expert, strict=True)):
            assert count % alignment == 0
            assert 0 <= count - exact < alignment
            assert got.topk_idx[at : at + exact].tolist() == [local] * exact
            assert got.source[at : at + exact] == sorted(got.source[at : at + exact])
            assert not got.x[at + exact : at + count].any()
            assert got.topk_idx[at + exact : at + count].tolist() == [-1] * (count - exact)
            at += count
        assert at == len(got.x)


@unhurried
@given(groups(), st.booleans())
def test_combine_of_dispatch_multiplies_by_the_number_of_rows(group: tuple[list[RankInput], int], expand: bool) -> None:
    inputs, experts = group
    received = ep.dispatch(inputs, experts, expand=expand)
    num_local = ep.local_experts(experts, len(inputs))
    results = ep.combine([got.x for got in received], received, inputs, experts, expand=expand)
    for sent, (out, weights) in zip(inputs, results, strict=True):
        assert weights is None
        for token, row in enumerate(sent.topk_idx):
            copies = len(ep.experts_of(row)) if expand else len(ep.ranks_of(row, num_local))
            total = torch.zeros(H)
            for _ in range(copies):
                total = total + sent.x[token].float()
            assert torch.equal(out[token], total.bfloat16())


@unhurried
@given(groups())
def test_weights_come_back_as_they_went(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    received = ep.dispatch(inputs, experts)
    results = ep.combine(
        [got.x for got in received],
        received,
        inputs,
        experts,
        topk_weights=[got.topk_weights for got in received],
        bias=[(g.x,) for g in inputs],
    )
    for sent, (_, weights) in zip(inputs, results, strict=True):
        assert torch.equal(weights, sent.topk_weights.where(sent.topk_idx >= 0, 0.0))


@unhurried
@given(groups())
def test_nodes_of_one_rank_or_of_all_sum_as_flat(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    received = ep.dispatch(inputs, experts)
    outputs = [got.x for got in received]
    flat = ep.combine(outputs, received, inputs, experts)
    for size in (1, len(inputs)):
        for (a, _), (b, _) in zip(
            flat, ep.combine(outputs, received, inputs, experts, ranks_per_node=size), strict=True
        ):
            assert torch.equal(a, b)


def test_node_sums_are_rounded_in_between() -> None:
    # 2^24 + 1 + 1: flat loses both ones in float32, a node that adds its two ones first keeps them.
    inputs = [RankInput(torch.zeros(1, H), torch.tensor([[0, 2, 3]]))]
    inputs += [RankInput(torch.zeros(0, H), torch.zeros(0, 3, dtype=torch.int64)) for _ in range(3)]
    received = ep.dispatch(inputs, 4)
    outputs = [torch.full((len(got.x), H), 2.0**24 if rank == 0 else 1.0) for rank, got in enumerate(received)]
    flat = ep.combine(outputs, received, inputs, 4)[0][0]
    nodes = ep.combine(outputs, received, inputs, 4, ranks_per_node=2)[0][0]
    assert flat[0, 0] == 2.0**24
    assert nodes[0, 0] == 2.0**24 + 2


def test_nodes_are_added_in_the_order_of_the_choices_whatever_was_dropped() -> None:
    # Choices of ranks 0, 2, 1; rank 0 has no room for the last token. Its node is the first all the same: the bias of 1
    # and the other node's 1 are lost beside 2^24, one after the other. Added first, they would be 2.
    idx = torch.tensor([[0, 0, 0]] * 2 + [[0, 2, 1]])
    inputs = [RankInput(torch.zeros(3, H), idx)]
    inputs += [RankInput(torch.zeros(0, H), torch.zeros(0, 3, dtype=torch.int64)) for _ in range(3)]
    received = ep.dispatch(inputs, 4, max_recv_tokens=2)
    assert [got.num_dropped for got in received] == [1, 0, 0, 0]
    value = {1: 2.0**24, 2: 1.0}
    outputs = [torch.full((len(got.x), H), value.get(rank, 0.0)) for rank, got in enumerate(received)]
    bias = [[torch.ones(len(one.x), H)] for one in inputs]
    sums = ep.combine(outputs, received, inputs, 4, ranks_per_node=2, bias=bias)[0][0]
    assert sums[2, 0] == 2.0**24


@unhurried
@given(groups(), st.integers(1, 4))
def test_dropping_keeps_the_first_rows(group: tuple[list[RankInput], int], room: int) -> None:
    inputs, experts = group
    whole = ep.dispatch(inputs, experts)
    for got, full in zip(ep.dispatch(inputs, experts, max_recv_tokens=room), whole, strict=True):
        assert got.source == full.source[:room]
        assert got.num_dropped == max(len(full.source) - room, 0)


@unhurried
@given(groups())
def test_absent_ranks_take_no_part(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    gone = len(inputs) - 1
    received = ep.dispatch(inputs, experts, absent={gone})
    assert len(received[gone].x) == 0
    assert all(source != gone for got in received for source, _ in got.source)
    outs = ep.combine([got.x for got in received], received, inputs, experts, absent={gone})
    assert not outs[gone][0].any()


@unhurried
@given(groups(), st.sampled_from(CASTS))
def test_low_latency_holds_the_expand_rows(group: tuple[list[RankInput], int], cast: str) -> None:
    inputs, experts = group
    packed = ep.low_latency_dispatch(inputs, experts, 6, cast=cast)
    expanded = ep.dispatch(inputs, experts, expand=True)
    for pack, got in zip(packed, expanded, strict=True):
        assert pack.count.tolist() == got.num_tokens_per_expert
        at = 0
        for local, count in enumerate(pack.count.tolist()):
            sources = [
                (rank, int(pack.src_info[local, begin + i]))
                for rank, value in enumerate(pack.layout_range[local].tolist())
                for begin in [value >> 32]
                for i in range(value & 0xFFFFFFFF)
            ]
            assert sources == got.source[at : at + count]
            if cast == "none":
                assert torch.equal(pack.x[local, :count], got.x[at : at + count])
            at += count


@unhurried
@given(groups())
def test_low_latency_combine_is_the_weighted_identity(group: tuple[list[RankInput], int]) -> None:
    inputs, experts = group
    packed = ep.low_latency_dispatch(inputs, experts, 6)
    for sent, out in zip(inputs, ep.low_latency_combine([p.x for p in packed], packed, inputs), strict=True):
        weights = sent.topk_weights.where(sent.topk_idx >= 0, 0.0).double().sum(1, keepdim=True)
        torch.testing.assert_close(out.double(), sent.x.double() * weights, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("hidden", [16, 128, 144, 512, 1040])
@pytest.mark.parametrize("cast", CASTS[1:])
def test_fp8_cast_comes_back_within_its_step(hidden: int, cast: str) -> None:
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(1)) * 100
    x[0] = 0
    x[1] = 1e-6
    rows, scales = ep.fp8_cast(x, cast)
    groups = -(-hidden // 128)
    if cast == "fp8_ue8m0":
        exponents = scales.contiguous().view(torch.uint8).view(5, -1)[:, :groups]
        scales = torch.exp2(exponents.float() - 127)
    assert rows.dtype == FP8
    assert scales.shape == (5, groups)
    if cast != "fp8":
        assert torch.equal(scales, torch.exp2(scales.log2().round()))
    wide = scales.repeat_interleave(128, 1)[:, :hidden]
    back = rows.float() * wide
    assert ((back - x).abs() <= x.abs() / 16 + wide * 2**-9).all()
    assert (rows.float().abs() <= 448).all()


def test_power_of_two_scale_is_not_doubled_when_exact() -> None:
    x = torch.full((1, 128), 448.0 * 2)
    rows, scales = ep.fp8_cast(x, "fp8_pow2")
    assert scales.item() == 2.0
    assert (rows.float() == 448).all()
