"""Validated arguments of a decode, for tests that call a driver or a tier without the front."""

from __future__ import annotations

import inspect
from typing import Any

from hal.spec.mla import MlaDecodeArgs, check_decode

_PLAIN: dict[str, Any] = {"causal": False, "lse_base": "e", "batch_invariant": False}


def decode_args(**given: Any) -> MlaDecodeArgs:
    """`check_decode` of what is given; all else is absent or as the front's defaults have it."""
    return check_decode(**(dict.fromkeys(inspect.signature(check_decode).parameters) | _PLAIN | given))
