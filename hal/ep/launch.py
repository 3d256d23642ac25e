"""What the launcher and the machine say about where a buffer's ranks run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import torch

from hal.spec.errors import SpecError, UnsupportedError, first_line

RANKS_PER_NODE_ENV: Final = "HAL_EP_RANKS_PER_NODE"
_MOST: Final = 999_999


def launched_ranks_per_node(num_ranks: int) -> int | None:
    """Ranks of a node as ``HAL_EP_RANKS_PER_NODE`` says, else torchrun for a group of all its ranks, else None.

    Raises
    ------
    SpecError
        The variable is no positive integer.
    """
    said = os.environ.get(RANKS_PER_NODE_ENV)
    if said is not None:
        if (ranks := _positive(said)) is None:
            raise SpecError(RANKS_PER_NODE_ENV, repr(said), f"an integer of 1…{_MOST}, or unset")
        return ranks
    # A group that is not the whole world says nothing about how its ranks lie on nodes.
    whole = os.environ.get("WORLD_SIZE", "") == str(num_ranks)
    return _positive(os.environ.get("LOCAL_WORLD_SIZE", "")) if whole else None


def _positive(said: str) -> int | None:
    # Digits of other scripts, and powers, are digits to Python too.
    if not (said.isascii() and said.isdigit() and len(said) <= len(str(_MOST))):
        return None
    return int(said) or None


def resolved_device(device: object, declared: Sequence[str], backend: str) -> torch.device:
    """The device as tensors on it say it (a type alone is its current device), by default the backend's first.

    Raises
    ------
    SpecError
        Not a device, or not one of this machine.
    UnsupportedError
        Of a type that the backend does not declare.
    """
    if device is None:
        device = declared[0]
    if not isinstance(device, (str, torch.device)):
        raise SpecError("device", type(device).__name__, "a torch.device, a string or None")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise SpecError("device", repr(device), "the name of a device") from None
    if wanted.type not in declared:
        raise UnsupportedError(backend, "device", str(wanted), ", ".join(declared))
    if wanted.type == "cpu":
        return torch.device("cpu")
    try:
        return torch.empty(0, dtype=torch.float32, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError("device", str(wanted), f"a device of this machine ({first_line(error)})") from None
