"""Low-latency mode of DeepEP V1 with hooks, as a script of its users would have it."""

import argparse
import os
import tempfile

import deep_ep
import torch
import torch.distributed as dist

from hal.reference import ep as reference

TOKENS, HIDDEN, TOPK = 12, 512, 4
CASTS = {
    "none": {"use_fp8": False},
    "fp8": {},
    "fp8_pow2": {"round_scale": True},
    "fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def rank_main(rank: int, num_ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    experts = 4 * num_ranks
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, num_ranks, experts)
    buffer = deep_ep.Buffer(
        group,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=experts // num_ranks,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    buffer.clean_low_latency_buffer(TOKENS, HIDDEN, experts)
    seed = torch.Generator().manual_seed(1)
    inputs = []
    for r in range(num_ranks):
        x = torch.randn(TOKENS - r, HIDDEN, generator=seed).bfloat16()
        idx = torch.rand(TOKENS - r, experts, generator=seed).topk(TOPK, dim=1).indices
        idx[0, 1] = -1
        inputs.append(reference.RankInput(x, idx, torch.rand(TOKENS - r, TOPK, generator=seed)))
    mine = inputs[rank]
    for cast, flags in CASTS.items():
        want = reference.low_latency_dispatch(inputs, experts, TOKENS, cast=cast)
        for hooked in (False, True):
            stats = torch.zeros(experts // num_ranks, dtype=torch.int32)
            waits = torch.zeros(num_ranks, dtype=torch.int64)
            recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
                mine.x,
                mine.topk_idx,
                TOKENS,
                experts,
                cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=waits,
                async_finish=not hooked,
                return_recv_hook=hooked,
                **flags,
            )
            torch.ones(64, 64) @ torch.ones(64, 64)  # what an engine computes while rows travel
            if hooked:
                hook()
            else:
                assert hook is None
                event.current_stream_wait()
            source, ranges, most, hidden, total = handle
            assert type(handle) is tuple and (most, hidden, total) == (TOKENS, HIDDEN, experts)
            assert torch.equal(count, want[rank].count) and torch.equal(stats, count)
            assert torch.equal(ranges, want[rank].layout_range)
            rows, scales = recv_x if cast != "none" else (recv_x, None)
            assert rows.shape == (experts // num_ranks, num_ranks * TOKENS, HIDDEN)
            if scales is not None:
                width, dtype = (HIDDEN // 512, torch.int32) if cast == "fp8_ue8m0" else (HIDDEN // 128, torch.float32)
                assert scales.shape == (*rows.shape[:2], width) and scales.dtype == dtype
                assert scales.stride() == (width * num_ranks * TOKENS, 1, num_ranks * TOKENS)
            for e, n in enumerate(count.tolist()):
                assert torch.equal(rows[e, :n].view(torch.uint8), want[rank].x[e, :n].view(torch.uint8))
                assert torch.equal(source[e, :n], want[rank].src_info[e, :n])
                assert scales is None or torch.equal(scales[e, :n], want[rank].scales[e, :n])

            outputs = [torch.randn(w.x.shape, generator=seed).bfloat16() for w in want]
            sums = reference.low_latency_combine(outputs, want, inputs)
            for zero_copy in (False, True):
                if zero_copy:
                    buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = outputs[rank]
                out = torch.empty(len(mine.x), HIDDEN, dtype=torch.bfloat16)
                combined, event, hook = buffer.low_latency_combine(
                    outputs[rank],
                    mine.topk_idx,
                    mine.topk_weights,
                    # A handle that was taken apart and put together again is a handle.
                    (source, ranges, most, hidden, total),
                    zero_copy=zero_copy,
                    async_finish=not hooked,
                    return_recv_hook=hooked,
                    out=out,
                )
                if hooked:
                    hook()
                else:
                    event.current_stream_wait()
                assert combined is out and torch.equal(out, sums[rank])

    status = torch.full((num_ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * num_ranks
    dist.barrier()
    other = (rank + 1) % num_ranks
    buffer.low_latency_update_mask_buffer(other, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.nonzero().flatten().tolist() == [other]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, default=2)
    number = parser.parse_args().num_processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, args=(number, os.path.join(folder, "store")), nprocs=number)
    print("passed")
