"""Normal mode of DeepEP V1, as a script of its users would have it; run it with several processes."""

import argparse
import os
import tempfile
from itertools import product

import deep_ep
import torch
import torch.distributed as dist

from hal.reference import ep as reference


def rank_main(rank: int, num_ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    group = dist.new_group(list(range(num_ranks)))
    buffer = deep_ep.Buffer(group, int(2e9), 0, explicitly_destroy=True)
    deep_ep.Buffer.set_num_sms(24)
    config = deep_ep.Config(24, 8, 256)
    for tokens, hidden, experts, topk in ((64, 512, 16, 4), (33, 128, 4 * num_ranks, 3)):
        check(buffer, group, config, rank, num_ranks, [tokens + 3 * r for r in range(num_ranks)], hidden, experts, topk)
    assert buffer.get_dispatch_config(num_ranks).num_sms == 24
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


def inputs_of(tokens, hidden, experts, topk, fp8):
    seed = torch.Generator().manual_seed(hidden + experts)
    made = []
    for n in tokens:
        x = torch.randn(n, hidden, generator=seed).bfloat16()
        idx = torch.rand(n, experts, generator=seed).topk(topk, dim=1).indices.to(deep_ep.topk_idx_t)
        idx[torch.rand(n, topk, generator=seed) < 0.2] = -1
        weights = torch.rand(n, topk, generator=seed)
        x, scales = reference.fp8_cast(x, "fp8") if fp8 else (x, None)
        made.append(reference.RankInput(x, idx, weights, scales))
    return made


def check(buffer, group, config, rank, num_ranks, tokens, hidden, experts, topk) -> None:
    for fp8, with_topk, asynchronous, previous in product((False, True), repeat=4):
        if previous != asynchronous and hidden == 128:
            continue
        inputs = inputs_of(tokens, hidden, experts, topk, fp8)
        want = reference.dispatch(inputs, experts)
        mine, expected = inputs[rank], want[rank]
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(mine.topk_idx, experts)
        counted = reference.layout(mine.topk_idx, experts, num_ranks)
        assert torch.equal(per_rank, counted.num_tokens_per_rank) and per_node is None
        assert torch.equal(per_expert, counted.num_tokens_per_expert)
        assert torch.equal(in_rank, counted.is_token_in_rank)

        args = {
            "x": (mine.x, mine.scales.T.contiguous().T) if fp8 else mine.x,
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
            "config": config,
            "async_finish": asynchronous,
        }
        if with_topk:
            args.update(topk_idx=mine.topk_idx, topk_weights=mine.topk_weights)
        if previous:
            args.update(previous_event=buffer.capture(), allocate_on_comm_stream=asynchronous)
        recv_x, recv_idx, recv_weights, per_local_expert, handle, event = buffer.dispatch(**args)
        if asynchronous:
            event.current_stream_wait()
        same_rows(recv_x, expected)
        assert per_local_expert == expected.num_tokens_per_expert
        assert type(handle) is tuple and len(handle) == 6

        sent = torch.stack([reference.layout(g.topk_idx, experts, num_ranks).num_tokens_per_rank for g in inputs])
        assert torch.equal(handle[0], sent.cumsum(0).int())
        assert handle[3].tolist() == [token for _, token in expected.source]
        assert torch.equal(handle[4], in_rank)
        if with_topk:
            assert torch.equal(recv_idx, expected.topk_idx) and torch.equal(recv_weights, expected.topk_weights)
            room = sum(tokens)
            worst_x, worst_idx, worst_weights, none, _, event = buffer.dispatch(num_worst_tokens=room, **args)
            if asynchronous:
                event.current_stream_wait()
            rows = len(expected.x)
            same_rows(tuple(t[:rows] for t in worst_x) if fp8 else worst_x[:rows], expected)
            assert none == [] and len(worst_idx) == len(worst_weights) == room
            assert torch.equal(worst_idx[:rows], expected.topk_idx) and (worst_idx[rows:] == -1).all()
            aligned = buffer.dispatch(expert_alignment=8, **args)
            aligned[5].event and aligned[5].current_stream_wait()
            assert aligned[3] == reference.dispatch(inputs, experts, expert_alignment=8)[rank].num_tokens_per_expert
        else:
            assert recv_idx is None and recv_weights is None

        cached = {"x": args["x"], "handle": handle, "config": config, "async_finish": asynchronous}
        again, no_idx, no_weights, no_list, no_handle, event = buffer.dispatch(**cached)
        if asynchronous:
            with event:
                pass
        same_rows(again, expected)
        assert no_idx is no_weights is no_list is no_handle is None

        outputs = [(w.x.float() * (1 + r)).bfloat16() for r, w in enumerate(want)]
        for biases in range(3):
            bias = [tuple(torch.full((n, hidden), 0.5 + b).bfloat16() for b in range(biases)) for n in tokens]
            weights = [w.topk_weights for w in want]
            sums = reference.combine(outputs, want, inputs, experts, topk_weights=weights, bias=bias)
            passed = bias[rank] if biases == 2 else bias[rank][0] if biases else None
            combined, combined_weights, event = buffer.combine(
                outputs[rank],
                handle,
                topk_weights=recv_weights,
                bias=passed,
                config=config,
                previous_event=buffer.capture() if previous else None,
                async_finish=asynchronous,
            )
            if asynchronous:
                event.current_stream_wait()
            wanted = sums[rank][0]
            if with_topk:
                assert torch.equal(combined, wanted) and torch.equal(combined_weights, sums[rank][1])
            else:
                # Without top-k the order of summation is that of the ranks.
                assert combined_weights is None
                torch.testing.assert_close(combined, wanted, rtol=0.01, atol=0.01)
        dist.barrier(group)


def same_rows(got, expected) -> None:
    got_x, got_scales = got if isinstance(got, tuple) else (got, None)
    assert torch.equal(got_x.view(torch.uint8), expected.x.view(torch.uint8))
    assert got_scales is None if expected.scales is None else torch.equal(got_scales, expected.scales)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, default=2)
    number = parser.parse_args().num_processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, args=(number, os.path.join(folder, "store")), nprocs=number)
    print("passed")
