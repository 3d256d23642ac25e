"""The oracle: float64, slow, obvious. Conformance, tests and the checks of the command line compare with it."""
