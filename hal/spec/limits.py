"""How far a result may be from the float64 reference.

The limits are the published ones of FlashMLA, with two differences that only make them stricter or better defined:
they hold for every (query, head) row and never for a whole tensor, and the absolute limits, published for data within
±1, grow with the data where a test uses larger numbers. A vendor may tighten them (`Limits.tightened`), nothing else.

Expert-parallel calls have no limits: moved rows keep their bits, and sums are float32 additions in a stated order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hal.spec.errors import SpecError


@dataclass(frozen=True, slots=True)
class Limits:
    """An element passes within ``absolute`` *or* ``relative``; a row also needs its cosine difference below ``cosine``.

    Attributes
    ----------
    absolute, relative, cosine : float
    """

    absolute: float
    relative: float
    cosine: float

    def tightened(self, factor: float) -> Limits:
        """The same limits times a factor of at most 1.

        Raises
        ------
        SpecError
            The factor would loosen them, or is not positive.
        """
        if not 0 < factor <= 1:
            raise SpecError("tighten", factor, "a factor above 0 and at most 1: limits may only be tightened")
        return Limits(self.absolute * factor, self.relative * factor, self.cosine * factor)


DENSE_OUT: Final = Limits(8e-4, 2.01 / 128, 5e-6)
DENSE_LSE: Final = Limits(1e-6, 8.01 / 65536, 1e-7)
