"""Started by torchrun on two nodes of two ranks: the launcher says where the nodes' bounds are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch, torch.distributed as dist, hal

dist.init_process_group("gloo")
rank = dist.get_rank()
x, idx = torch.full((4, 64), rank + 1.0).bfloat16(), torch.arange(8).view(4, 2)
with hal.EpBuffer(num_experts=8, hidden=64, topk=2, max_tokens_per_rank=4, backend="cpu") as buffer:
    got = buffer.dispatch(x, idx)
    back = buffer.combine(got.recv_x, got.handle).combined_x
    copies = buffer.layout(idx).is_token_in_rank.sum(1)
    assert torch.equal(back, x * copies[:, None]), back
    print(f"rank {rank}: {buffer.args.num_nodes} nodes of {buffer.args.ranks_per_node}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.sampled
@pytest.mark.long(12)
def test_torchrun_says_where_nodes_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [*command, "--node-rank", str(node), *where, str(program)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = "".join(agent.communicate(timeout=50)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    for rank in range(4):
        assert f"rank {rank}: 2 nodes of 2" in said, said
