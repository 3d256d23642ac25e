"""The oracle: float64, slow, obvious. Conformance compares with it; nothing else of the HAL imports it."""
