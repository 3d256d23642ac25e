"""MLA decode in plain torch, float32: what a machine gets that could not compile the kernel. Correct, not fast."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hal.spec.mla import check_cu_seqlens
from hal.spec.tensors import require_values
from hal_cpu.threads import forced_threads

if TYPE_CHECKING:
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs


class TorchKernel:
    """Gathers each sequence's pages and attends with two matrix products.

    Parameters
    ----------
    reason : str
        Why there is no compiled kernel.
    """

    # How torch splits a product over threads is its own affair.
    batch_invariant = False

    def __init__(self, reason: str) -> None:
        forced_threads()  # a wrong setting is an error whichever kernel runs
        self._reason = reason
        self._launches = 0

    def details(self) -> dict[str, str]:
        """Name the reason and what to do about it."""
        return {
            "kernel": f"torch path: {self._reason}",
            "fix": "install a C++17 compiler (g++ or clang++), then pip install --force-reinstall --no-deps hal-cpu",
            "isa": "torch",
            "threads": str(torch.get_num_threads()),
        }

    def plan(self, args: MlaPlanArgs) -> object:
        """Check the lengths; there is nothing to prepare."""
        require_values("cache_seqlens", args.cache_seqlens < 0, args.cache_seqlens, "0 or more")
        if args.cu_seqlens_q is not None:
            check_cu_seqlens(args.cu_seqlens_q, None)
        return None

    @torch.no_grad()
    def decode(self, args: MlaDecodeArgs) -> None:
        """Attend one sequence at a time."""
        assert args.block_table is not None and args.cache_seqlens is not None
        _check_indices(args, args.block_table, args.cache_seqlens)
        q, out, lse = args.q, args.out, args.lse
        if args.cu_seqlens_q is None:
            starts = [i * args.s_q for i in range(args.batch + 1)]
            q = q.reshape(args.total_q, args.h_q, args.head_dim)
            out, lse = out.new_empty(args.total_q, args.h_q, args.head_dim_v), lse.new_empty(args.h_q, args.total_q)
        else:
            starts = args.cu_seqlens_q.tolist()
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            rows = slice(start, end)
            _attend(args, args.block_table[i], int(args.cache_seqlens[i]), q[rows], out[rows], lse[:, rows])
        if args.cu_seqlens_q is None:
            args.out.copy_(out.view(args.out.shape))
            args.lse.copy_(lse.view(args.h_q, args.batch, args.s_q).transpose(0, 1))
        self._launches += 1

    def launches(self) -> dict[str, int]:
        """Calls so far."""
        return {"torch": self._launches} if self._launches else {}


def _check_indices(args: MlaDecodeArgs, table: Tensor, lengths: Tensor) -> None:
    most = args.max_blocks * args.page_size
    legal = f"0…{most} (max_blocks {args.max_blocks} × page_size {args.page_size})"
    require_values("cache_seqlens", (lengths < 0) | (lengths > most), lengths, legal)
    pages = (lengths.long() + args.page_size - 1) // args.page_size
    used = torch.arange(args.max_blocks, device=args.block_table.device) < pages[:, None]
    bad = used & ((table < 0) | (table >= args.num_blocks))
    require_values("block_table", bad, table, f"0…{args.num_blocks - 1} within cache_seqlens")
    if args.cu_seqlens_q is not None:
        check_cu_seqlens(args.cu_seqlens_q, args.total_q)


def _attend(args: MlaDecodeArgs, table: Tensor, length: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
    """One sequence: q [s_q, h_q, d] → out [s_q, h_q, d_v], lse [h_q, s_q]."""
    queries = len(q)
    out.zero_()
    lse.fill_(math.inf)
    positions = torch.arange(length, device=args.q.device)
    keys = args.kv_cache[table[positions // args.page_size].long(), positions % args.page_size].float()
    # Queries that see equally many keys go together; a key that is not seen is not even multiplied by zero.
    step = 1 if args.causal else max(queries, 1)
    heads, group = args.h_kv, args.h_q // args.h_kv
    for i in range(0, queries, step):
        seen = length - queries + i + 1 if args.causal else length
        if seen <= 0:
            continue
        # Each KV head with all the rows it serves: [h_kv, step * group, …].
        rows = q[i : i + step].float().reshape(step, heads, group, -1).transpose(0, 1).reshape(heads, step * group, -1)
        by_head = keys[:seen].transpose(0, 1)
        scores = rows @ by_head.transpose(1, 2) * args.softmax_scale
        sums = torch.logsumexp(scores, -1)
        values = torch.softmax(scores, -1) @ by_head[..., : args.head_dim_v]
        out[i : i + step] = values.view(heads, step, group, -1).transpose(0, 1).reshape(step, heads * group, -1)
        sums = sums / math.log(2.0) if args.lse_base == "2" else sums
        lse[:, i : i + step] = sums.view(heads, step, group).transpose(1, 2).reshape(heads * group, step)
