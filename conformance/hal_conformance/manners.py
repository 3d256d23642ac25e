"""What a call must leave as it was in its process: settings and generators that everybody else there shares."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, Final

import torch


def _denormals() -> bool:
    """Whether they are kept. ``-ffast-math`` ends that for every thread that loads such a library."""
    return bool(torch.full((), 1e-40, dtype=torch.float32, device="cpu") * 0.5 != 0)


_SHARED: Final[dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "torch's float32 precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's generator": (lambda: torch.get_rng_state().numpy().tobytes(), lambda _: None),
    "Python's generator": (random.getstate, random.setstate),
    "denormal numbers": (_denormals, lambda kept: torch.set_flush_denormal(not kept)),
    "the working directory": (os.getcwd, os.chdir),
}
"""How each is read, and set back."""


def shared() -> dict[str, Any]:
    """All of it, by name."""
    return {name: read() for name, (read, _) in _SHARED.items()}


def changed(before: dict[str, Any]) -> list[str]:
    """The names of what differs from before. It is set back as far as that goes: one call is to blame, not the next."""
    names = [name for name, value in shared().items() if value != before[name]]
    for name in names:
        _SHARED[name][1](before[name])
    return names
