"""Torch's default element type and device are the program's: engines set them, and nothing here may depend on them.

A combine with weights once corrupted the heap under a bfloat16 default: the kernel wrote float32 into half the memory.
"""

from __future__ import annotations

import ast
from pathlib import Path

import default_dtype_cases as cases
import pytest
import torch
from ep_ranks import run_ranks
from mla_cases import Case, make

import hal

ROOT = Path(__file__).parent.parent
# Factories whose element type is the default where none is given; integer arguments make torch.full and tensor exact.
FACTORIES = {"empty", "zeros", "ones", "rand", "randn", "linspace", "logspace", "eye", "empty_strided"}


@pytest.mark.parametrize(
    "folder", ["hal", "backends/cpu/hal_cpu", "integrations/vllm", "integrations/sglang/hal_sglang"]
)
def test_every_allocation_says_its_element_type(folder: str) -> None:
    assert without("dtype", FACTORIES, folder) == []


@pytest.mark.parametrize("folder", ["hal/ep", "hal/spec", "hal/portable", "backends/cpu/hal_cpu"])
def test_every_allocation_says_its_device(folder: str) -> None:
    assert without("device", FACTORIES | {"arange", "full", "tensor"}, folder) == []


def without(argument: str, factories: set[str], folder: str) -> list[str]:
    """Where one of these functions of torch is called without this argument."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not {"bench", "cli", "tests"} & set(path.parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in factories
        and not any(keyword.arg in (argument, None) for keyword in node.keywords)
    ]


@pytest.mark.parametrize(("nodes", "pre_reduce"), [(1, False), (2, False), (2, True)])
def test_expert_parallel_results_do_not_depend_on_it(nodes: int, pre_reduce: bool) -> None:
    run_ranks(2, cases.same, nodes, pre_reduce, limit=60)


def test_decode_does_not_depend_on_it() -> None:
    inputs = make(Case(b=3, s_q=2, s_k=200, h_q=8, h_kv=1, causal=True, varlen=True))
    want = hal.mla_decode(*inputs.tensors(), causal=True)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            got = hal.mla_decode(*inputs.tensors(), causal=True)
        finally:
            torch.set_default_dtype(torch.float32)
        assert [one.dtype for one in got] == [one.dtype for one in want]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
