"""Stands in for ``flash_mla``: importing it gives ``hal.compat.flash_mla``. Written by ``hal install-shims``."""

from hal.compat.shims import stand_in

stand_in(__name__)
