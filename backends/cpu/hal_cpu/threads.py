"""How many threads the kernel may use."""

from __future__ import annotations

import os
from typing import Final

from hal.spec.errors import SpecError

ENV: Final = "HAL_CPU_THREADS"
MOST: Final = 1024


def forced_threads() -> int | None:
    """What ``HAL_CPU_THREADS`` asks for; None where torch's own setting decides.

    Raises
    ------
    SpecError
        It is set to something other than 1…1024.
    """
    text = os.environ.get(ENV)
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise SpecError(ENV, repr(text), f"1…{MOST}, or unset for torch.get_num_threads()")
    return int(text)
