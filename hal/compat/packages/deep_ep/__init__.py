"""Stands in for ``deep_ep``: importing it gives ``hal.compat.deep_ep``. Written by ``hal install-shims``."""

from hal.compat.shims import stand_in

stand_in(__name__)
