"""What the machine can do at most, measured by contenders that run in the same rounds as everybody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hal.bench.machine import last_level_cache
from hal.bench.rounds import Contender
from hal.bench.stats import Spread

GEMM: Final = 2048
_DEVICE_GEMM: Final = 8192
_DEVICE_BUFFER: Final = 1 << 30
_HOST_BUFFER: Final = 64 << 20

SGEMM: Final = ("limit", "sgemm")
BF16_GEMM: Final = ("limit", "bf16 gemm")
READ: Final = ("limit", "read")
COPY: Final = ("limit", "copy")


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of one run, in units of 1e9 a second, from the median times.

    Attributes
    ----------
    sgemm_gflops : Spread
        The peak: torch.mm of two float32 matrices of 2048²; on an accelerator two of bf16, 8192².
    bf16_gemm_gflops : Spread or None
        The same in bf16, for information.
    copy_gbps : Spread
        torch.Tensor.copy_ between buffers larger than the last-level cache; bytes read plus bytes written.
    read_gbps : Spread or None
        torch.sum over such a buffer; bytes read.
    """

    sgemm_gflops: Spread
    copy_gbps: Spread
    bf16_gemm_gflops: Spread | None = None
    read_gbps: Spread | None = None

    def roofline(self, flop: float, moved: float) -> float:
        """GFLOP/s that neither limit lets a kernel exceed that computes ``flop`` on ``moved`` bytes."""
        return min(self.sgemm_gflops.p50, flop / moved * self.copy_gbps.p50)

    def memory_bound(self, flop: float, moved: float) -> bool:
        """Whether the bandwidth is the lower of the two limits."""
        return flop / moved * self.copy_gbps.p50 < self.sgemm_gflops.p50


class LimitContenders:
    """The contenders that measure `Limits`, and the work each call of theirs does.

    Parameters
    ----------
    device : torch.device
    enter : callable
        Sets what holds for every contender, the number of threads for instance.
    compute : bool
        Also the matrix products; an operation that only moves bytes needs none.
    """

    def __init__(self, device: torch.device, enter: Callable[[], object], *, compute: bool = True) -> None:
        self._work: dict[tuple[str, str], float] = {}
        self.contenders: list[Contender] = []
        on_host = device.type == "cpu"
        size = max(_HOST_BUFFER, 2 * last_level_cache()) if on_host else _DEVICE_BUFFER
        self.buffer_bytes = size
        source = torch.ones(size // 4, device=device)
        target = torch.zeros_like(source)
        self._add(COPY, 2.0 * size, lambda _: target.copy_(source), enter)
        self._add(READ, float(size), lambda _: source.sum(), enter)
        if compute:
            n = GEMM if on_host else _DEVICE_GEMM
            products = ((SGEMM, torch.float32), (BF16_GEMM, torch.bfloat16)) if on_host else ((SGEMM, torch.bfloat16),)
            for key, dtype in products:
                left = torch.randn(n, n, device=device).to(dtype)
                right = torch.randn(n, n, device=device).to(dtype)
                result = torch.empty(n, n, device=device, dtype=dtype)
                self._add(key, 2.0 * n**3, _product(left, right, result), enter)

    def _add(
        self, key: tuple[str, str], work: float, call: Callable[[int], object], enter: Callable[[], object]
    ) -> None:
        self._work[key] = work
        self.contenders.append(Contender(key, call, enter))

    def rate(self, key: tuple[str, str], seconds: Sequence[float]) -> Spread:
        """GFLOP/s or GB/s of one limit from its samples."""
        return Spread.of([self._work[key] / s / 1e9 for s in seconds])

    def limits(self, samples: Mapping[tuple[str, str], Sequence[float]]) -> Limits:
        """All limits from the samples of a run, which must hold every one of `contenders`."""
        rates = {key: self.rate(key, samples[key]) for key in self._work}
        return Limits(rates[SGEMM], rates[COPY], rates.get(BF16_GEMM), rates.get(READ))


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Callable[[int], object]:
    return lambda _: torch.mm(left, right, out=out)
