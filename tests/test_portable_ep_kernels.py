"""The kernels of expert parallelism, on the host with subgroups of every width: each against torch."""

from __future__ import annotations

from collections.abc import Iterator

import portable_backends
import pytest
import torch

from hal.portable.ep_kernels import EpKernels, Rows
from hal.portable.host import HostDevice
from hal.portable.runtime import Handle
from hal.portable.shared import SharedMemory
from hal.spec.errors import DeviceError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAL_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(params=portable_backends.WIDTHS)
def kernels(request: pytest.FixtureRequest) -> EpKernels:
    return EpKernels(HostDevice(request.param))


def chosen(n: int, topk: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, experts, (n, topk), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("repeat", [False, True])
def test_layout(kernels: EpKernels, repeat: bool) -> None:
    base, span, bins = 4, 3, 5
    idx = chosen(150, 4, 24)
    counts, order, found = kernels.layout(
        kernels.device.queue(), idx, torch.arange(bins, dtype=torch.int32) * 150, bins * 150, base, span, bins, repeat
    )
    bin_of = torch.where((idx >= base) & (idx < base + span * bins), (idx - base) // span, -1)
    places = torch.full_like(idx, -1)
    for b in range(bins):
        tokens = (bin_of == b).any(1).nonzero()[:, 0]
        assert counts[b] == len(tokens) and found[150 * b :][: len(tokens)].tolist() == tokens.tolist()
        for place, token in enumerate(tokens.tolist()):
            here = (bin_of[token] == b).nonzero()[:, 0]
            places[token, here if repeat else here[:1]] = place
    assert torch.equal(order, places)


@pytest.mark.parametrize("row_bytes", [48, 20])
def test_copy(kernels: EpKernels, row_bytes: int) -> None:
    source = torch.randint(0, 255, (9, row_bytes), dtype=torch.uint8)
    rows = torch.tensor([99, 3, -1, 8, 9, 0, 3], dtype=torch.int32)
    for clear in (False, True):
        to = torch.full((8, row_bytes), 7, dtype=torch.uint8)
        queue = kernels.device.queue()
        into = Rows(queue.write(to)[0], row_bytes, at=row_bytes)
        kernels.copy(queue, into, kernels.rows_of(queue, source), rows, 1, 6, 9, clear)
        for i, row in enumerate([3, -1, 8, -1, 0, 3]):
            want = source[row] if row >= 0 else torch.full((row_bytes,), 0 if clear else 7, dtype=torch.uint8)
            assert torch.equal(to[1 + i], want)
        assert (to[[0, 7]] == 7).all()


def test_rows_that_do_not_lie_on_words_are_copied_first(kernels: EpKernels) -> None:
    x = torch.arange(5 * 9 + 1, dtype=torch.int16).to(torch.float16)[1:].view(5, 9)[:, :8]
    queue, to = kernels.device.queue(), torch.zeros(5, 8, dtype=torch.float16)
    into = Rows(queue.write(to)[0], 16)
    kernels.copy(queue, into, kernels.rows_of(queue, x), torch.arange(5, dtype=torch.int32), 0, 5, 5, False)
    assert torch.equal(to, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(kernels: EpKernels, dtype: torch.dtype) -> None:
    n, topk, columns = 5, 3, 100
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(n, topk, columns, generator=generator).to(dtype)
    table[1, 2] = float("nan")
    place = torch.tensor([[0, 1, 2], [4, 3, -1], [-1, -1, -1], [-1, 0, 1], [9, -1, 8]], dtype=torch.int32)
    weights = torch.randn(n, topk, generator=generator)
    bias = [torch.randn(n, columns + 4, generator=generator).to(dtype)[:, :columns] for _ in range(2)]
    for biases, factor, out_type in (([], None, dtype), (bias, None, dtype), (bias[:1], weights, torch.float32)):
        total = torch.zeros(n, columns)
        for one in biases:
            total += one.float()
        for k in range(topk):
            rows = table[:, k].float() if factor is None else table[:, k].float() * factor[:, k, None]
            total += rows.where((place[:, k] >= 0)[:, None], 0.0)
        out = torch.full((n, columns), 7.0, dtype=out_type)
        kernels.reduce(kernels.device.queue(), out, table, place, factor, biases)
        assert torch.equal(out, total.to(out_type))


@pytest.mark.parametrize("cast", ["fp8", "fp8_pow2", "fp8_ue8m0"])
def test_casts(kernels: EpKernels, cast: str) -> None:
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 4, 6)[:, None]
    x[0, :128], x[1, 5], x[2, 7] = 0.0, float("nan"), 448.0 * 2.0**20
    rows, words = kernels.cast(kernels.device.queue(), x, cast)
    padded = torch.nn.functional.pad(x, (0, 84)).view(6, 3, 128)
    highest = padded.abs().amax(2).clamp(min=1e-4)
    scale, inverse = highest * torch.tensor(1 / 448), 448 / highest
    if cast != "fp8":
        scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
        inverse = 1 / scale
    fine = ~highest.isnan()
    if cast == "fp8_ue8m0":
        codes = words.view(torch.uint8).view(6, 4)[:, :3]
        assert torch.equal((codes.int()[fine] - 127).float(), torch.log2(scale)[fine])
    else:
        assert torch.equal(words.view(torch.float32)[fine], scale[fine])
    want = (padded * inverse[:, :, None]).to(torch.float8_e4m3fn).view(6, 384)[:, :300]
    there = fine.repeat_interleave(128, 1)[:, :300]
    assert torch.equal(rows.view(torch.uint8)[there], want.view(torch.uint8)[there])
    assert rows.float()[1, 5].isnan()


def test_every_code_comes_back(kernels: EpKernels) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(1, 256)
    x, scales = codes.view(torch.float8_e4m3fn), torch.tensor([[1.0, 0.5]])
    for dtype in DTYPES:
        got = kernels.dequantise(kernels.device.queue(), x, scales, dtype)
        want = (x.float() * scales.repeat_interleave(128, 1)).to(dtype)
        assert torch.equal(got.nan_to_num(9999), want.nan_to_num(9999))


def test_flags(kernels: EpKernels) -> None:
    window = kernels.device.window(4 * 16 * 4)
    queue = kernels.device.queue()
    kernels.signal(queue, window.memory, 2 * 16, 5)
    assert kernels.seen(window.memory, 4, 16, 5, torch.device("cpu")) == [0, 0, 5, 0]


def test_a_window_is_seen_by_who_opens_it_and_nothing_else_is_taken_for_one() -> None:
    made = SharedMemory.make(5000)
    assert (made.memory == 0).all()
    opened = SharedMemory.open(made.handle)
    opened.memory[4999] = 7
    assert made.memory[4999] == 7
    made.close()
    made.close()
    assert opened.memory[4999] == 7
    for wrong in (Handle(4096, files=opened.handle.files), Handle(0, files=opened.handle.files), Handle(5000)):
        with pytest.raises(DeviceError, match="a window of"):
            SharedMemory.open(wrong)
    with open("/proc/self/exe", "rb") as file, pytest.raises(DeviceError, match="unsealed"):
        SharedMemory.open(Handle(5000, files=(file.fileno(),)))
