"""What a kernel means: arguments, shapes, dtypes, errors and capabilities. No device code.

``SPEC_VERSION`` is ``major.minor``. A backend built for another major, or for a later minor than this one, is refused.
"""

from __future__ import annotations

from typing import Final

SPEC_VERSION: Final = "1.0"
