"""The kernels all vendors share: their dialect, and what they compute with subgroups of every width."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import portable_backends
import pytest
import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import Inputs, build

import hal
import hal.portable
from hal import plugins
from hal.portable import ep_kernels
from hal.portable.direct import kernels as direct
from hal.portable.host import HostDevice
from hal.portable.mla import DECODE, SCHEDULE, Tile
from hal.portable.runtime import Source
from hal.spec.errors import CompileError, DeviceError
from hal.spec.limits import DENSE_LSE, DENSE_OUT
from hal.spec.mla import MlaGeometry

KERNELS = Path(hal.portable.__file__).parent / "kernels"

RULES = {
    "a pointer without its address space": re.compile(
        r"^(?!.*HAL_(GLOBAL|LOCAL)[^,(]*\*)[^/]*\b(hal_\w+|u?int|unsigned|double|float|void|u?char|u?short|u?long|half|\w+_t)\s*\*[\s*]*(const\s+)?\w+\s*[,;=)]"
    ),
    "a shuffle without mask and width": re.compile(r"__shfl|sub_group_"),  # and see `shuffles`
    "local memory whose size is not in the source": re.compile(
        r"extern\s+\w+|__shared__|__local|HAL_SHARED\((?![^()]*,[^()]*,)|HAL_SHARED\([^,]*,[^,]*,.*\b[a-z]\w*\)"
    ),
    "a literal width of subgroups": re.compile(
        r"[%/&<]\s*(31|32|63|64|127|128)u?\b|[%/&]\s*0x[137]f\b|>>\s*[567]u?\b|(WARP|SUBGROUP)\w*\s*=?=\s*\d|warpSize"
    ),
    "fast mathematics": re.compile(r"fast_math|__(exp|log|pow|sin|cos)\w*f\(|native_|half_(exp|log)|\bexp\(|\bexpf\("),
    "an atomic": re.compile(r"atom(ic)?_?\w*\("),
    "what C99 has not": re.compile(
        r"\btemplate\b|\bclass\b|\bauto\b|::|\bnew\b|static_cast|\bconstexpr\b|<<<|#include"
    ),
}


def shuffles(text: str) -> list[int]:
    """How many arguments each shuffle has, whatever calls are among them."""
    counts = []
    for found in re.finditer(r"HAL_SHUFFLE\w*\(", text):
        depth, commas = 1, 0
        for character in text[found.end() :]:
            depth += {"(": 1, ")": -1}.get(character, 0)
            commas += depth == 1 and character == ","
            if not depth:
                break
        counts.append(commas + 1)
    return counts


def findings(text: str) -> list[str]:
    bare = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.S)
    # A parameter a line, so that one qualifier does not stand for two pointers.
    lines = [part for line in bare.splitlines() for part in (line.split(",") if "*" in line else [line])]
    whole = bare.splitlines()
    per_line = [
        (rule, line)
        for rule, pattern in RULES.items()
        if "pointer" not in rule
        for line in whole
        if pattern.search(line)
    ]
    per_line += [("a shuffle without mask and width", "") for count in shuffles(bare) if count < 4]
    pointers = "a pointer without its address space"
    return [rule for rule, _ in per_line] + [pointers for line in lines if RULES[pointers].search(line + ",")]


@pytest.mark.parametrize("path", sorted(KERNELS.iterdir()), ids=lambda path: path.name)
def test_kernels_keep_to_the_dialect(path: Path) -> None:
    assert path.suffix == ".h"
    assert not findings(path.read_text())


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("HAL_INLINE void f(float *to) {", "pointer"),
        ("HAL_INLINE void f(HAL_LOCAL float *to, const int *from) {", "pointer"),
        ("x = HAL_SHUFFLE_XOR(x, 1, 8);", "shuffle"),
        ("x = HAL_SHUFFLE_XOR(f(x, 1), 1, 8);", "shuffle"),
        ("x = HAL_SHUFFLE_XOR(ALL, HAL_SHUFFLE_XOR(x, 1, 8), 1, 8);", "shuffle"),
        ("x = HAL_SHUFFLE_XOR(\n  f(x), 1, 8);", "shuffle"),
        ("x = __shfl_xor(x, 1);", "shuffle"),
        ("extern float room[];", "local memory"),
        ("HAL_SHARED(float, room);", "local memory"),
        ("HAL_SHARED(float, room, n);", "local memory"),
        ("HAL_INLINE void f(unsigned *to) {", "pointer"),
        ("HAL_INLINE void f(size_t *to) {", "pointer"),
        ("HAL_INLINE void f(float **to) {", "pointer"),
        ("int lane = thread % 32u;", "literal width"),
        ("int group = thread >> 5;", "literal width"),
        ("int lane = thread & 0x1f;", "literal width"),
        ("if (thread < 32) x = 1;", "literal width"),
        ("int lane = thread % 32;", "literal width"),
        ("y = __expf(x);", "fast"),
        ("atomicAdd(p, 1);", "atomic"),
        ("template <int N>", "C99"),
    ],
)
def test_the_lint_sees_what_it_forbids(line: str, rule: str) -> None:
    assert any(rule in found for found in findings(line)), findings(line)


def test_every_kernel_file_is_compiled() -> None:
    communicating = {name for one in (*ep_kernels.every(), *direct.every()) for name in one.files}
    assert {path.name for path in KERNELS.iterdir()} == set(SCHEDULE) | set(DECODE) | communicating


@pytest.fixture(scope="module", autouse=True)
def fibres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAL_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        patch.setattr(plugins, "_registry", portable_backends.registry())
        yield


SMALL = MlaCase(lengths=(131, 5), h_q=16, d=60, d_v=33, page=7)
CASES: dict[str, dict[str, Any]] = {
    "split, and empty ones": {"lengths": (700, 0, 33, 1)},
    "invariant, two heads": {"batch_invariant": True, "lengths": (1400, 90), "h_q": 20, "h_kv": 2},
    "ragged and causal": {"q_lens": (3, 2, 0, 17), "lengths": (80, 0, 9, 65), "h_q": 6, "h_kv": 2, "causal": True},
    "odd strides": {"q_layout": "odd", "kv_layout": "odd", "out_layout": "padded"},
    "base 2, with a plan": {"lse_base": "2", "plan": True},
}  # fmt: skip


def check(case: MlaCase, backend: str) -> None:
    inputs = build(case, 0)
    outcome = call(inputs, backend)
    verdict = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE)
    assert not outcome.problems, outcome.problems
    assert verdict.ok, f"{case.to_dict()}: out {verdict.out.to_dict()}, lse {verdict.lse.to_dict()}"


@pytest.mark.long(4)
@pytest.mark.parametrize("width", portable_backends.WIDTHS)
def test_every_width_of_subgroups_gives_the_reference(width: int) -> None:
    for changes in CASES.values():
        check(SMALL.but(**changes), portable_backends.name(width))


@pytest.mark.parametrize("setting", [torch.bfloat16, torch.device("meta")], ids=str)
def test_memory_is_of_the_size_and_on_the_device_it_was_asked_for_whatever_is_the_default(setting: Any) -> None:
    before = torch.get_default_dtype()
    with setting if isinstance(setting, torch.device) else contextlib.nullcontext():
        torch.set_default_dtype(setting if isinstance(setting, torch.dtype) else before)
        try:
            memory = HostDevice().empty(4096)
        finally:
            torch.set_default_dtype(before)
    assert (memory.nbytes, memory.device.type) == (4096, "cpu")


def test_calls_of_two_threads_share_no_local_memory() -> None:
    case, name = SMALL.but(lengths=(300, 40)), portable_backends.name(32)
    inputs = [build(case, seed) for seed in (0, 1)]

    def decoded(one: Inputs) -> torch.Tensor:
        tensors = one.q.view, one.kv_cache.view, one.block_table.view, one.cache_seqlens.view
        return hal.mla_decode(*tensors, head_dim_v=case.d_v, backend=name)[0]

    want = [decoded(one) for one in inputs]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda one=one: [decoded(one) for _ in range(8)]) for one in inputs]
    for run, alone in zip(runs, want, strict=True):
        assert all(torch.equal(out, alone) for out in run.result())


@pytest.mark.parametrize("width", [1, 128])
def test_usual_and_few_rows(width: int) -> None:
    check(SMALL.but(d=576, d_v=512, page=64), portable_backends.name(width))
    check(SMALL.but(h_q=1), portable_backends.name(width))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_elements(dtype: str) -> None:
    check(SMALL.but(dtype=dtype, lengths=(140, 0, 3)), portable_backends.name(32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_comes_out_bit_by_bit(dtype: torch.dtype) -> None:
    # Whatever the weight, out is V of the one token there is: reading and rounding of every number there is.
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    values = values[: len(values) // 64 * 64].view(-1, 1, 1, 64)
    count = len(values)
    table, lengths = torch.arange(count, dtype=torch.int32)[:, None], torch.ones(count, dtype=torch.int32)
    q = torch.zeros(count, 1, 1, 64, dtype=dtype)
    out, _ = hal.mla_decode(q, values, table, lengths, head_dim_v=64, backend=portable_backends.name(32))
    assert torch.equal(out, values)


def source(folder: Path, body: str, **flags: int) -> Source:
    path = folder / "mine.h"
    path.write_text("HAL_KERNEL(8)\nvoid mine(HAL_GLOBAL float *to, float value) {\n" + body + "\n}\n")
    return Source((str(path),), tuple(flags.items()))


def test_threads_that_part_at_a_barrier_are_an_error(tmp_path: Path) -> None:
    device = HostDevice()
    program = device.build(source(tmp_path, "if (HAL_THREAD < 4) HAL_BARRIER();\nto[HAL_THREAD] = value;"))
    with pytest.raises(DeviceError, match="lines 3 and the end"):
        device.launch(program, "mine", 1, 8, (torch.zeros(8), np.float32(1)))


def test_shuffles_stay_within_their_width(tmp_path: Path) -> None:
    device = HostDevice(subgroup=4)
    body = "to[HAL_THREAD] = HAL_SHUFFLE_XOR(HAL_ALL_LANES, value + HAL_THREAD, 1, 2);"
    to = torch.zeros(8)
    device.launch(device.build(source(tmp_path, body)), "mine", 1, 8, (to, np.float32(10)))
    assert to.tolist() == [11, 10, 13, 12, 15, 14, 17, 16]


def test_a_compile_error_names_file_and_line(tmp_path: Path) -> None:
    wrong = source(tmp_path, "to[0] = valve;")
    with pytest.raises(CompileError) as caught:
        HostDevice().build(wrong)
    assert (caught.value.source_path, caught.value.line) == (wrong.files[0], 3)
    assert f"{wrong.files[0]}:3" in caught.value.log and "valve" in caught.value.log


def test_more_memory_than_the_host_has() -> None:
    helps = r"the host has \d+ bytes, \d+ of them free; make the cache, the batch or the buffer smaller"
    with pytest.raises(DeviceError, match=rf"torch.full of {1 << 60} bytes: .*; {helps}"):
        HostDevice().empty(1 << 60)
    with pytest.raises(DeviceError, match=rf"of {1 << 60} bytes: .*; {helps}"):
        HostDevice().window(1 << 60)


@pytest.mark.parametrize("local_bytes", [1, 16 << 10, 48 << 10, 64 << 10, 128 << 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_fit_together(local_bytes: int, dtype: torch.dtype) -> None:
    facts = HostDevice(32, 2, local_bytes).facts
    for h_q, d, d_v in [(1, 1, 1), (4, 64, 64), (5, 65, 64), (128, 576, 512), (128, 576, 576)]:
        g = MlaGeometry(2, False, 1, h_q, 1, d, d_v, 64, dtype, "plain", False, False, torch.device("cpu"))
        tile = Tile.of(facts, g)
        assert tile.smallest or tile.local_bytes <= local_bytes
        assert tile.width_v <= tile.width_k and d <= tile.width_k and d_v <= tile.width_v
        assert tile.rows % tile.slices == 0 and tile.rows % tile.grain == 0
        assert tile.rows * 8 <= tile.threads
