"""How fast a kernel reads a peer's window, by how that was opened: cudaIpc handles beside torch's symmetric memory.

    windows.py [--sizes 65536 ...]

Both processes read the other's memory at the same time, 16 bytes a thread, on all processors; medians of 50. Its
symmetric memory is CUDA's virtual memory management; the other is cudaMalloc, opened by cudaIpcOpenMemHandle
as the driver of the CUDA backend does. Two devices are wanted, and cupy. Prints GB/s; exit code 2 where they are not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

RANKS: Final = 2
ROUNDS: Final = 50
SIZES: Final = (1 << 16, 1 << 20, 1 << 23, 1 << 26, 1 << 28)
_READ: Final = r"""
extern "C" __global__ void read(const uint4 *from, uint4 *to, long long words) {
  for (long long at = blockIdx.x * 512ll + threadIdx.x; at < words; at += gridDim.x * 512ll * 4) {
    uint4 found[4];
    for (int i = 0; i < 4; i++) if (at + i * gridDim.x * 512ll < words) found[i] = from[at + i * gridDim.x * 512ll];
    for (int i = 0; i < 4; i++) if (at + i * gridDim.x * 512ll < words) to[at + i * gridDim.x * 512ll] = found[i];
  }
}
"""


def ipc(size: int, rank: int) -> int:
    """The peer's window, as the backend opens it."""
    from hal_cuda.driver import CudaDevice

    device = CudaDevice(rank)
    mine = device.window(size)
    handles: list[Any] = [None] * RANKS
    dist.all_gather_object(handles, mine.handle)
    peer = device.peer(handles[1 - rank])
    kept.append((device, mine, peer))
    return int(peer)


def symmetric(size: int, rank: int) -> int:
    """The peer's window, as torch opens it."""
    import torch.distributed._symmetric_memory as memory

    mine = memory.empty(size, dtype=torch.uint8, device=f"cuda:{rank}")
    there = memory.rendezvous(mine, dist.group.WORLD)
    kept.append((mine, there))
    return int(there.buffer_ptrs[1 - rank])


kept: list[Any] = []
"""Windows, while they are read."""


def rank_main(given: argparse.Namespace) -> int:
    """One rank."""
    import cupy

    rank = given.rank
    torch.cuda.set_device(rank)
    cupy.cuda.Device(rank).use()
    store = dist.FileStore(given.store, RANKS)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=RANKS)
    read = cupy.RawKernel(_READ, "read")
    largest = max(given.sizes)
    windows = {"cudaIpc": ipc(largest, rank), "symmetric memory": symmetric(largest, rank)}
    landing = torch.empty(largest, dtype=torch.uint8, device="cuda")
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    groups = 3 * torch.cuda.get_device_properties(rank).multi_processor_count
    for size in given.sizes:
        times: dict[str, list[float]] = {name: [] for name in windows}
        for _ in range(ROUNDS):
            for name, address in windows.items():
                torch.cuda.synchronize()
                dist.barrier()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with stream:
                    begin.record()
                    read((groups,), (512,), (address, landing.data_ptr(), size // 16))
                    end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1e3)
        if rank == 0:
            found = {name: statistics.median(taken) for name, taken in times.items()}
            said = ", ".join(f"{name} {taken:.1f} µs ({size / taken / 1e3:.0f} GB/s)" for name, taken in found.items())
            print(f"{size} bytes: {said}")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def main() -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        return rank_main(given)
    if torch.cuda.device_count() < RANKS:
        print(f"windows.py: {torch.cuda.device_count()} devices of CUDA; {RANKS} are wanted", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, os.fspath(Path(__file__).resolve()), *sys.argv[1:], "--store", f"{folder}/store"]
        started = [subprocess.Popen([*own, "--rank", str(rank)]) for rank in range(RANKS)]
        codes = [process.wait() for process in started]
    return max(abs(code) for code in codes)


if __name__ == "__main__":
    sys.exit(main())
