"""DeepEP V2, as a script of its users would have it: both layouts, cached and without a count on the host."""

import argparse
import os
import tempfile
from itertools import product

import deep_ep
import torch
import torch.distributed as dist

from hal.reference import ep as reference

MOST, HIDDEN, TOPK = 24, 256, 3


def rank_main(rank: int, num_ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    experts = 4 * num_ranks
    hint = deep_ep.ElasticBuffer.get_buffer_size_hint(group, MOST, HIDDEN, num_topk=TOPK)
    assert hint > 0 and hint % (2 << 20) == 0
    buffer = deep_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_topk=TOPK,
        deterministic=True,
        explicitly_destroy=True,
    )
    assert buffer.get_logical_domain_size() == (1, num_ranks)
    num_sms = buffer.get_theoretical_num_sms(experts, TOPK)
    num_qps = buffer.get_theoretical_num_qps(num_sms)
    for fp8, expand, alignment, asynchronous, sync in product((0, 1), (0, 1), (1, 16), (0, 1), (1, 0)):
        inputs = inputs_of(num_ranks, experts, fp8)
        common = {
            "num_sms": num_sms,
            "num_qps": num_qps,
            "async_with_compute_stream": bool(asynchronous),
            "allocate_on_comm_stream": True,
        }
        check(buffer, rank, experts, inputs, bool(expand), alignment, bool(sync), common)
    buffer.barrier()
    buffer.destroy()
    dist.destroy_process_group()


def inputs_of(num_ranks, experts, fp8):
    seed = torch.Generator().manual_seed(5)
    made = []
    for r in range(num_ranks):
        n = max(MOST - 9 * r, 0)
        x = torch.randn(n, HIDDEN, generator=seed).bfloat16()
        x, scales = reference.fp8_cast(x, "fp8") if fp8 else (x, None)
        idx = torch.rand(n, experts, generator=seed).topk(TOPK, dim=1).indices
        idx[torch.rand(n, TOPK, generator=seed) < 0.2] = -1
        made.append(reference.RankInput(x, idx, torch.rand(n, TOPK, generator=seed), scales))
    return made


def done(values):
    if values[-1].event is not None:
        values[-1].current_stream_wait()
    return values


def check(buffer, rank, experts, inputs, expand, alignment, sync, common) -> None:
    num_ranks = len(inputs)
    local = experts // num_ranks
    mine = inputs[rank]
    want = reference.dispatch(inputs, experts, expand=expand, expert_alignment=alignment)
    plain = reference.dispatch(inputs, experts)[rank]
    expected, rows = want[rank], len(want[rank].x)
    stats = torch.ones(local, dtype=torch.int32)
    x = mine.x if mine.scales is None else (mine.x, mine.scales)
    recv_x, recv_idx, recv_weights, handle, _ = done(
        buffer.dispatch(
            x,
            mine.topk_idx,
            mine.topk_weights,
            cumulative_local_expert_recv_stats=stats,
            num_experts=experts,
            num_max_tokens_per_rank=MOST,
            expert_alignment=alignment,
            previous_event=buffer.capture(),
            do_cpu_sync=sync,
            do_expand=expand,
            use_tma_aligned_col_major_sf=expand,
            **common,
        )
    )
    data, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    room = rows
    if not sync:
        room = num_ranks * MOST
        if expand:
            room = -(-(room * min(TOPK, local) + (alignment - 1) * local) // alignment) * alignment
    assert len(data) == room
    assert torch.equal(data[:rows].view(torch.uint8), expected.x.view(torch.uint8))
    if scales is not None:
        assert torch.equal(scales[:rows], expected.scales)
        assert scales.stride() == ((1, -(-room // 4) * 4) if expand else (HIDDEN // 128, 1))
    assert torch.equal(recv_weights[:rows], expected.topk_weights)
    if expand:
        assert recv_idx is None
    else:
        assert torch.equal(recv_idx[:rows], expected.topk_idx) and (recv_idx[rows:] == -1).all()
    assert handle.num_recv_tokens_per_expert_list == (expected.num_tokens_per_expert if sync else [])

    counts = torch.tensor([int((plain.topk_idx == e).sum()) for e in range(local)])
    aligned = (counts + alignment - 1) // alignment * alignment
    ends = aligned.cumsum(0) - aligned + counts if expand else aligned.cumsum(0)
    assert torch.equal(handle.num_unaligned_recv_tokens_per_expert.long(), counts)
    assert torch.equal(stats.long(), counts + 1)
    assert torch.equal(handle.psum_num_recv_tokens_per_expert.long(), ends)
    sources = torch.tensor([source for source, _ in plain.source] or [0])[: len(plain.source)]
    assert torch.equal(
        handle.psum_num_recv_tokens_per_scaleup_rank.long(), sources.bincount(minlength=num_ranks).cumsum(0)
    )
    number = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    metadata = handle.recv_src_metadata[:number]
    assert metadata.shape[1] == TOPK + 2
    assert metadata[:, 0].tolist() == [source * MOST + token for source, token in plain.source]
    if expand:
        for row, (source, token) in enumerate(plain.source):
            for slot, at in enumerate(metadata[row, 2:].tolist()):
                assert (at < 0) == (int(plain.topk_idx[row, slot]) < 0)
                assert at < 0 or expected.source[at] == (source, token)

    again, _, again_weights, kept, _ = done(
        buffer.dispatch(
            x,
            topk_weights=mine.topk_weights,
            handle=handle,
            do_expand=expand,
            do_zero_padding=expand,
            **common,
        )
    )
    assert kept is handle and torch.equal(again_weights[:rows], expected.topk_weights)
    again = again[0] if isinstance(again, tuple) else again
    assert torch.equal(again[:rows].view(torch.uint8), expected.x.view(torch.uint8))

    outputs = [(w.x.float() * (1 + r)).bfloat16() for r, w in enumerate(want)]
    bias = [(torch.ones(len(g.x), HIDDEN).bfloat16(), torch.full((len(g.x), HIDDEN), 2.0).bfloat16()) for g in inputs]
    weights = [w.topk_weights for w in want]
    sums, sum_weights = reference.combine(
        outputs, want, inputs, experts, expand=expand, topk_weights=weights, bias=bias
    )[rank]
    y = torch.full((room, HIDDEN), float("nan"), dtype=torch.bfloat16)
    y[:rows] = outputs[rank]
    combined, combined_weights, _ = done(
        buffer.combine(y, handle, topk_weights=recv_weights, bias=bias[rank], **common)
    )
    assert torch.equal(combined, sums) and torch.equal(combined_weights, sum_weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, default=2)
    number = parser.parse_args().num_processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, args=(number, os.path.join(folder, "store")), nprocs=number)
    print("passed")
