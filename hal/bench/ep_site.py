"""Where a rank of ``hal bench ep`` keeps its tensors, how it meets the others, and how its calls are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Call = Callable[[], object]

_PRODUCT: Final = 2048


class Site(Protocol):
    """The host, or a rank's own device.

    Attributes
    ----------
    device : torch.device
    group : str
        What ``init_process_group`` is to be given.
    exchange : str
        What moves tensors of ``device`` between ranks, as torch.distributed calls it; empty where nothing does.
    absent : str
        Why ``exchange`` is empty.
    copied : str
        Where `copy` goes; empty on the host.
    """

    device: torch.device
    group: str
    exchange: str
    absent: str
    copied: str

    def meet(self) -> None:
        """Return when all ranks are here and have nothing left to do."""

    def settle(self) -> None:
        """Return when all that was asked for is done."""

    def timed(self, call: Call, count: int) -> list[float]:
        """Seconds of so many calls, each until its result is there."""

    def compute(self, seconds: float) -> float:
        """Compute for about so long, and say how many times as long that took as when nothing else runs."""

    def copy(self, rows: Tensor) -> Call:
        """A copy of rows that says what the machine can do at most."""


class Host:
    """A call is over when it returns."""

    device = torch.device("cpu")
    group = exchange = "gloo"
    absent = copied = ""

    def meet(self) -> None:
        """By gloo's barrier."""
        dist.barrier()

    def settle(self) -> None:
        """Nothing is under way."""

    def timed(self, call: Call, count: int) -> list[float]:
        """By the wall clock."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    def compute(self, seconds: float) -> float:
        """Turn in circles."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return 1.0

    def copy(self, rows: Tensor) -> Call:
        """Within memory."""
        copied = torch.empty_like(rows)
        return lambda: copied.copy_(rows)


class Device:
    """A rank's own accelerator: rank i has device i of the machine, or where there are fewer, i modulo their number.

    A call is timed between two events on an idle device: from when it is made until its result is there, and without
    the host's waking up afterwards.

    Parameters
    ----------
    kind : str
        The type of device, as torch calls it.
    rank, ranks : int
    """

    def __init__(self, kind: str, rank: int, ranks: int) -> None:
        self._module: Any = torch.get_device_module(kind)
        self.count: int = self._module.device_count()
        self.device = torch.device(kind, rank % self.count)
        self._module.set_device(self.device.index)
        library = dist.get_default_backend_for_device(kind)
        shared = ranks > self.count
        # A communication library wants a device for every rank; what else ranks tell each other goes over the host.
        self.exchange = "" if shared else library
        self.absent = f"{ranks} ranks share {self.count} devices, and {library} wants one for each" if shared else ""
        self.group = "gloo" if shared else f"cpu:gloo,{kind}:{library}"
        self.copied = (
            "to the next device, by all at once" if self.count > 1 else "within the only device, by all at once"
        )
        self._alone: float | None = None
        self._factors: Tensor | None = None

    def meet(self) -> None:
        """Over the host, once the device is idle."""
        self.settle()
        dist.all_reduce(torch.zeros(1))

    def settle(self) -> None:
        """Until the device is idle."""
        self._module.synchronize(self.device)

    def timed(self, call: Call, count: int) -> list[float]:
        """By the device's clock."""
        found = []
        for _ in range(count):
            before, after = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            self.settle()
            before.record()
            call()
            after.record()
            after.synchronize()
            found.append(before.elapsed_time(after) * 1e-3)
        return found

    def compute(self, seconds: float) -> float:
        """Multiply matrices, which takes every processor of the device; whoever takes one of them makes it longer."""
        if self._alone is None:
            self.timed(self._product, 3)
            self._alone = min(self.timed(self._product, 20))
        count = max(1, round(seconds / self._alone))

        def products() -> None:
            for _ in range(count):
                self._product()

        (taken,) = self.timed(products, 1)
        return taken / (count * self._alone)

    def _product(self) -> None:
        if self._factors is None:
            self._factors = torch.ones(2, _PRODUCT, _PRODUCT, dtype=torch.bfloat16, device=self.device)
        torch.mm(self._factors[0], self._factors[0], out=self._factors[1])

    def copy(self, rows: Tensor) -> Call:
        """To the next device of the machine, by all ranks at once; within the device where it is the only one."""
        next_one = torch.device(self.device.type, (self.device.index + 1) % self.count)
        copied = torch.empty_like(rows, device=next_one)
        return lambda: copied.copy_(rows)


def site(kind: str, rank: int, ranks: int) -> Site:
    """Of a rank whose backend takes tensors of this type of device."""
    return Host() if kind == "cpu" else Device(kind, rank, ranks)
