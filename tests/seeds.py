"""One fresh seed a run, printed in the header of pytest; ``HAL_TEST_SEED=N`` replays a run."""

from __future__ import annotations

import os
import random

ENV = "HAL_TEST_SEED"

# The environment carries the seed to the worker processes of pytest-xdist, which must collect the same tests.
SEED = int(os.environ.setdefault(ENV, str(random.SystemRandom().randrange(2**31))))
