"""What the ranks of `test_conformance_ranks` do."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from hal_conformance.ranks import Rank


def add_up(rank: Rank) -> float:
    rank.join()
    rank.phase("all_reduce")
    mine = torch.tensor([float(rank.rank + rank.payload["add"])])
    dist.all_reduce(mine)
    return float(mine)


def one_dies(rank: Rank) -> None:
    rank.join()
    rank.phase("before the exchange")
    if rank.rank == 1:
        if rank.payload is not None:
            os.kill(os.getpid(), rank.payload)
        os._exit(7)
    rank.phase("exchange")
    dist.barrier()


def one_hangs(rank: Rank) -> None:
    rank.phase("prepare")
    while rank.rank == 0:
        time.sleep(1)
    rank.phase("exchange")
    while not (rank.folder / "prepared").exists():
        time.sleep(1)


def one_raises(rank: Rank) -> None:
    rank.phase("check")
    if rank.rank == 1:
        raise ValueError("17 tokens expected")
    time.sleep(600)


def answers_and_falls(rank: Rank) -> str:
    """What a process group may do to an interpreter that ends after its peers."""
    import atexit

    atexit.register(os._exit, 3)
    return "fine"
