"""One rank of a team: a process that answers what `ranks.Team` asks, until its pipe closes."""

from __future__ import annotations

import faulthandler
import importlib
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from hal_conformance.parcel import pack, unpack
from hal_conformance.ranks import Rank, variables


def serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    """Call one function after the other and tell what each returned; the first that raises is the last."""
    with (Path(folder) / f"{rank}.output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable(2)
    os.environ.update(variables(rank, world))
    torch.set_num_threads(1)
    while True:
        try:
            target, payload = unpack(pipe.recv_bytes())
        except (EOFError, OSError):
            # At once: leaving in order may wait for peers that wait for this rank.
            os._exit(0)
        mine = Rank(rank, world, payload, Path(folder), pipe)
        module, _, name = target.partition(":")
        try:
            work = getattr(importlib.import_module(module), name)
            mine.phase("start")
            answer, failed = pack(("done", work(mine))), False
        except Exception as error:
            answer, failed = pack(("raised", f"{type(error).__name__}: {error}")), True
        pipe.send_bytes(answer)
        if failed:
            os._exit(1)
