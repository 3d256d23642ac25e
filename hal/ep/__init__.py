"""Expert-parallel communication over processes: the public buffer and the contract of the engines behind it."""
