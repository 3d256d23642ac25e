"""The conformance suite of the kernel HAL: whether a backend keeps the specification, and what is broken if not.

``hal conform --backend NAME``, or ``pytest --pyargs hal_conformance --hal-backend NAME``. The suite sees the public
face of the HAL, the reference and the backend contract; it never asks whose backend it tests.
"""

from __future__ import annotations

from typing import Final

SUITE_VERSION: Final = "0.1.0"
"""Goes into every report; the exact text of the suite is bound by its hash."""
