"""Work that is put off to another thread, on the stream of whoever asked for it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def current_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """In another thread, whose own is another: the stream that is current here, in whose order the rows were made."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    within: contextlib.AbstractContextManager[Any] = module.stream(module.current_stream(device))
    return within
