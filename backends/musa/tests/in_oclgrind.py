"""A few small batches decoded on the platform in force, or a kernel that is wrong; `test_oclgrind` reads the log."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import ep_cases
import torch
import torch.distributed as dist
from ep_cases import Case
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import build

from hal import plugins
from hal.portable import opencl
from hal.portable.ep_kernels import EpKernels
from hal.portable.runtime import Source
from hal.spec.limits import DENSE_LSE, DENSE_OUT

SMALL = MlaCase(lengths=(20, 3, 0), h_q=2, d=64, d_v=40, page=7)
CASES = [
    SMALL,
    SMALL.but(lengths=(40, 9), s_q=2, h_q=9, causal=True),
    SMALL.but(lengths=(300,), h_q=1, dtype="float16", plan=True),
    SMALL.but(lengths=(1200, 10), h_q=4, d=24, d_v=16, page=16, batch_invariant=True),
    SMALL.but(lengths=(30, 9), q_lens=(3, 1), h_q=4, h_kv=2, dtype="float32", causal=True),
    SMALL.but(lengths=(17,), d=576, d_v=512),
    SMALL.but(q_layout="odd", kv_layout="odd", out_layout="padded"),
]
RACE = """
HAL_KERNEL(8)
void race(HAL_GLOBAL float *to) {
  to[HAL_THREAD / 2] = HAL_THREAD;
}
"""


def decode() -> None:
    for number, case in enumerate(CASES):
        inputs = build(case, number)
        outcome = call(inputs, "musa")
        verdict = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE)
        assert verdict.ok and not outcome.problems, (case.to_dict(), outcome.problems)
    print(f"{len(CASES)} right")


def communicate() -> None:
    """Both modes among ranks of one, so that one process does all that several would."""
    opencl.OpenClDevice.unified = True  # it works in memory it is given, but does not say so
    folder = tempfile.mkdtemp()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    case = Case(ranks=1, tokens=(70,), experts=5, backend="musa")
    expanded = replace(case, expand=True, alignment=4, fp8="fp8", hidden=144, bias=2, tokens=(9,))
    ep_cases.normal(0, [replace(case, bias=1), expanded, replace(case, room=6, overflow="drop", hidden=8)])
    small = replace(case, tokens=(7,), hidden=272)
    ep_cases.packed(0, [(small, cast) for cast in ("none", "fp8", "fp8_ue8m0")])
    device = plugins.select("musa").backend._kernels.on(0).device
    kernels = EpKernels(device)
    x, queue = torch.randn(3, 200).to(torch.float8_e4m3fn), device.queue()
    got = kernels.dequantise(queue, x, torch.ones(3, 2), torch.float32)
    queue.finish()
    assert torch.equal(got, x.float())
    print("right")


def race() -> None:
    device = opencl.OpenClDevice(opencl.choose())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "race.h")
        path.write_text(RACE)
        program, queue = device.build(Source((str(path),), ())), device.queue()
        queue.launch(program, "race", 1, 8, (queue.write(torch.zeros(8))[0],))
        queue.finish()


if __name__ == "__main__":
    {"decode": decode, "communicate": communicate, "race": race}[sys.argv[1]]()
