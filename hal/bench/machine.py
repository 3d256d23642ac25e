"""What was measured on: enough to say whether two runs can be compared."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_CPUINFO: Final = Path("/proc/cpuinfo")
_ASSUMED_CACHE: Final = 32 << 20

_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor, its threads, and the software that matters.

    Attributes
    ----------
    processor : str
        The model's name and the instruction sets that decide speed.
    cores, threads : int
        Processors this process may run on, and threads given to every contender.
    last_level_cache : int
        Bytes.
    device : str
        What the backend says of its own: for an accelerator its name, architecture and driver.
    software, date : str
    load : float
        Processes that were running or waiting over the last minute, this one included: above ``cores`` the machine
        is shared and times are those of a shared machine.
    """

    processor: str
    cores: int
    threads: int
    last_level_cache: int
    device: str
    software: str
    date: str
    load: float

    @staticmethod
    def here(threads: int, device: str) -> Machine:
        """The machine the process runs on, now."""
        return Machine(
            processor=_processor(),
            cores=cores(),
            threads=threads,
            last_level_cache=last_level_cache(),
            device=device,
            software=f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            load=os.getloadavg()[0],
        )

    def lines(self) -> list[str]:
        """For people: two lines."""
        cache = self.last_level_cache / 2**20
        threads = f"{self.threads} {'thread' if self.threads == 1 else 'threads'} for every contender"
        return [
            f"{self.processor}, {self.cores} cores, last-level cache {cache:.0f} MiB; {self.date}",
            f"{threads}; load {self.load:.1f} before the run; {self.software}",
        ]


class Bystanders:
    """How much of the machine other processes take between construction and `share`."""

    def __init__(self) -> None:
        self._start = _clock_ticks()

    def share(self) -> float | None:
        """Processor time of everybody else over all there was, 0…1; None where the kernel does not say."""
        before, now = self._start, _clock_ticks()
        if before is None or now is None or now[1] <= before[1]:
            return None
        others = (now[0] - before[0]) / (now[1] - before[1])
        return min(1.0, max(0.0, others))


def _clock_ticks() -> tuple[float, float] | None:
    """Seconds all processors were busy for others, and seconds there were in all."""
    try:
        fields = [float(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = fields
    unit = os.sysconf("SC_CLK_TCK")
    busy = (user + nice + system + interrupts + soft_interrupts + stolen) / unit
    own = os.times()
    return busy - own.user - own.system, busy + (idle + waiting) / unit


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def flags() -> frozenset[str]:
    """Instruction sets as the kernel names them; empty where it does not say."""
    return frozenset(_cpuinfo("flags", "Features").split())


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, 32 MiB where the kernel does not say."""
    sizes = [_size(file.read_text()) for file in _CACHES.glob("index*/size")]
    return max(sizes, default=_ASSUMED_CACHE)


def free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    name = _cpuinfo("model name", "Processor") or platform.processor() or platform.machine()
    known = flags()
    return ", ".join([name, *(flag for flag in _FLAGS if flag in known)])


def _cpuinfo(*keys: str) -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _size(text: str) -> int:
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit
